"""IR: the improved ResNet as AdaFace and CVLFace release it (Kim et al. 2022, arXiv:2204.00964).

The same design as ``backbones.iresnet``, with other keys, a max-pool shortcut where only the size
changes, and no learned scale or shift on the embedding. AdaFace's own files expect BGR input,
CVLFace's RGB.
"""

from collections.abc import Sequence

import torch
from torch import nn

from backbones.layers import in_float32, init_kaiming

_WIDTHS = (64, 128, 256, 512)


class BasicBlockIR(nn.Module):
    """BN, conv, BN, PReLU, strided conv, BN, added to the input.

    The input is subsampled or projected to the same shape.
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        if in_channels == channels:
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class IR(nn.Module):
    """Four stages of ``BasicBlockIR`` on 112x112 faces, BN, dropout, linear, BN without weights.

    Input (B, 3, 112, 112), output (B, embedding_size) float32.
    blocks: residual blocks of each stage.
    """

    def __init__(self, blocks: Sequence[int], embedding_size: int, dropout: float = 0.0):
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)
        )
        self.body = nn.Sequential(*_body(blocks))
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(512 * 7 * 7, embedding_size),
            nn.BatchNorm1d(embedding_size, affine=False),
        )
        init_kaiming(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return in_float32(self.output_layer, self.body(self.input_layer(x)))


def _body(blocks: Sequence[int]) -> list[BasicBlockIR]:
    layers, in_channels = [], 64
    for channels, count in zip(_WIDTHS, blocks, strict=True):
        layers.append(BasicBlockIR(in_channels, channels, 2))
        layers.extend(BasicBlockIR(channels, channels, 1) for _ in range(count - 1))
        in_channels = channels
    return layers
