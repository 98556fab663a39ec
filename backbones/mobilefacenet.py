"""MobileFaceNet (Chen et al. 2018, arXiv:1804.07573) in its two published forms.

``MobileFaceNet`` is the 1.2 M parameter network of AdaDistill; ``MBF`` is InsightFace's wider
``mbf`` and ``mbf_large``. Both are made of depthwise bottlenecks: expand 1x1, depthwise 3x3,
project 1x1 without activation. Modules that differ only in their attribute names exist twice,
because those names are the keys of the released checkpoints.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from backbones.layers import in_float32, init_kaiming
from utils.errors import InputError

# --- AdaDistill's mobilefacenet: keys conv, bn, prelu


class ConvUnit(nn.Module):
    """Convolution, BatchNorm, and a PReLU unless the unit is ``linear``."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        linear: bool = False,
    ):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, channels, kernel, stride, padding, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(channels)
        self.prelu = nn.Identity() if linear else nn.PReLU(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.prelu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Depthwise bottleneck with ``width`` inner channels; ``residual`` adds the input."""

    def __init__(
        self, in_channels: int, channels: int, width: int, stride: int, residual: bool = False
    ):
        super().__init__()
        self.conv = ConvUnit(in_channels, width)
        self.conv_dw = ConvUnit(width, width, 3, stride, 1, groups=width)
        self.project = ConvUnit(width, channels, linear=True)
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.project(self.conv_dw(self.conv(x)))
        return x + out if self.residual else out


class ResidualStage(nn.Module):
    """``count`` residual bottlenecks of one shape."""

    def __init__(self, channels: int, width: int, count: int):
        super().__init__()
        self.model = nn.Sequential(
            *(Bottleneck(channels, channels, width, 1, residual=True) for _ in range(count))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class MobileFaceNet(nn.Module):
    """AdaDistill's ``mobilefacenet``: (B, 3, 112, 112) -> (B, embedding_size) float32.

    input_size and output_name are what AdaDistill's scripts pass. Raises InputError for another
    input than 112x112, or another output than GDC (global depthwise convolution).
    """

    def __init__(
        self, input_size: Sequence[int], embedding_size: int = 512, output_name: str = "GDC"
    ):
        super().__init__()
        if tuple(input_size) != (112, 112):
            raise InputError(f"MobileFaceNet: input_size={input_size}, but images are (112, 112)")
        if output_name != "GDC":
            raise InputError(f"MobileFaceNet: output_name={output_name!r}, but only 'GDC' is built")
        self.conv1 = ConvUnit(3, 64, 3, 2, 1)
        self.conv2_dw = ConvUnit(64, 64, 3, 1, 1, groups=64)
        self.conv_23 = Bottleneck(64, 64, 128, 2)
        self.conv_3 = ResidualStage(64, 128, 4)
        self.conv_34 = Bottleneck(64, 128, 256, 2)
        self.conv_4 = ResidualStage(128, 256, 6)
        self.conv_45 = Bottleneck(128, 128, 512, 2)
        self.conv_5 = ResidualStage(128, 256, 2)
        self.conv_6_sep = ConvUnit(128, 512)
        self.output_layer = nn.Sequential(
            OrderedDict(
                conv_6_dw=ConvUnit(512, 512, 7, groups=512, linear=True),
                flatten=nn.Flatten(),
                linear=nn.Linear(512, embedding_size, bias=False),
                bn=nn.BatchNorm1d(embedding_size, affine=False),
            )
        )
        init_kaiming(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_23(self.conv2_dw(self.conv1(x)))
        x = self.conv_34(self.conv_3(x))
        x = self.conv_45(self.conv_4(x))
        return in_float32(self.output_layer, self.conv_6_sep(self.conv_5(x)))


# --- InsightFace's mbf and mbf_large: everything is called layers


class Chain(nn.Module):
    """The given modules one after another; ``residual`` adds the input."""

    def __init__(self, *modules: nn.Module, residual: bool = False):
        super().__init__()
        self.layers = nn.Sequential(*modules)
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layers(x)
        return x + out if self.residual else out


class MBF(nn.Module):
    """InsightFace's MobileFaceNet: (B, 3, 112, 112) -> (B, embedding_size) float32.

    blocks: residual bottlenecks in each of four stages (a first stage of one is a plain grouped
    convolution). scale: width in units of 64 channels.
    """

    def __init__(self, embedding_size: int, blocks: Sequence[int], scale: int):
        super().__init__()
        narrow, wide = 64 * scale, 128 * scale
        if blocks[0] == 1:
            first = _conv(narrow, narrow, 3, 1, 1, groups=64)
        else:
            first = _residuals(narrow, 128, blocks[0])
        self.layers = nn.ModuleList(
            [
                _conv(3, narrow, 3, 2, 1),
                first,
                _depthwise(narrow, narrow, 128, 2),
                _residuals(narrow, 128, blocks[1]),
                _depthwise(narrow, wide, 256, 2),
                _residuals(wide, 256, blocks[2]),
                _depthwise(wide, wide, 512, 2),
                _residuals(wide, 256, blocks[3]),
            ]
        )
        self.conv_sep = _conv(wide, 512)
        self.features = Chain(
            _conv(512, 512, 7, groups=512, linear=True),
            nn.Flatten(),
            nn.Linear(512, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),
        )
        init_kaiming(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return in_float32(lambda top: self.features(self.conv_sep(top)), x)


def _conv(
    in_channels: int,
    channels: int,
    kernel: int = 1,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    linear: bool = False,
) -> Chain:
    conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, groups=groups, bias=False)
    activation = () if linear else (nn.PReLU(channels),)
    return Chain(conv, nn.BatchNorm2d(channels), *activation)


def _depthwise(
    in_channels: int, channels: int, width: int, stride: int, residual: bool = False
) -> Chain:
    return Chain(
        _conv(in_channels, width),
        _conv(width, width, 3, stride, 1, groups=width),
        _conv(width, channels, linear=True),
        residual=residual,
    )


def _residuals(channels: int, width: int, count: int) -> Chain:
    return Chain(*(_depthwise(channels, channels, width, 1, residual=True) for _ in range(count)))
