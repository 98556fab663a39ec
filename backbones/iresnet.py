"""IResNet: the ResNet of ArcFace, InsightFace and AdaDistill.

Its residual unit is the improved one of Duta et al. 2020, arXiv:2004.04989.
"""

from collections.abc import Sequence

import torch
from torch import nn

from backbones.layers import in_float32
from utils.errors import InputError

_WIDTHS = (64, 128, 256, 512)
# Residual blocks in each of the four stages.
IRESNETS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}


class SEModule(nn.Module):
    """Squeeze-and-excitation (Hu et al. 2018, arXiv:1709.01507).

    Each channel is scaled by a gate that is computed from all of them.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.sigmoid(self.fc2(self.relu(self.fc1(self.avg_pool(x)))))


class IBasicBlock(nn.Module):
    """BN, conv, BN, PReLU, strided conv, BN, optional SE, added to the input.

    Where the shape changes, to its 1x1 projection.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, use_se: bool, project: bool):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        # Identities hold no weights, so state dicts are those of the published files.
        self.se_block = SEModule(channels) if use_se else nn.Identity()
        self.downsample = _projection(in_channels, channels, stride) if project else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.se_block(self.bn3(self.conv2(out))) + self.downsample(x)


class IResNet(nn.Module):
    """Four stages of residual blocks on 112x112 faces, a linear layer, a BatchNorm of unit scale.

    Input (B, 3, 112, 112), output (B, embedding_size) float32.
    blocks: residual blocks of each stage.
    """

    def __init__(
        self, blocks: Sequence[int], embedding_size: int, use_se: bool = False, dropout: float = 0.0
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        in_widths = (64, *_WIDTHS[:-1])
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            _stage(*spec, use_se) for spec in zip(in_widths, _WIDTHS, blocks, strict=True)
        )
        self.bn2 = nn.BatchNorm2d(512)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(512 * 7 * 7, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        # The scale of the embedding stays fixed, as published: margins look at directions, and it
        # would only drift.
        self.features.weight.requires_grad = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.dropout(self.bn2(x).flatten(1))
        return in_float32(lambda flat: self.features(self.fc(flat)), x)


def _stage(in_channels: int, channels: int, blocks: int, use_se: bool) -> nn.Sequential:
    first = IBasicBlock(in_channels, channels, 2, use_se, project=True)
    return nn.Sequential(
        first,
        *(IBasicBlock(channels, channels, 1, use_se, project=False) for _ in range(blocks - 1)),
    )


def _projection(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
    )


# --- as AdaDistill's and InsightFace's scripts call them


def _published(name: str):
    def build(
        pretrained: bool = False,
        progress: bool = True,
        dropout: float = 0.0,
        num_features: int = 512,
        use_se: bool = False,
    ) -> IResNet:
        """The network with fresh weights; num_features: dimensions of the embedding.

        Raises InputError for pretrained=True: no weights come with it.
        """
        if pretrained:
            raise InputError(
                f"{name}(pretrained=True): no weights come with the network; load a checkpoint "
                "with load_state_dict, or set pretrained_backbone_path"
            )
        return IResNet(IRESNETS[name], num_features, use_se=use_se, dropout=dropout)

    return build


iresnet18 = _published("iresnet18")
iresnet34 = _published("iresnet34")
iresnet50 = _published("iresnet50")
iresnet100 = _published("iresnet100")
iresnet200 = _published("iresnet200")
