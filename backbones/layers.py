"""What backbones share: the float32 tail, and the initialisation of those other than IResNet."""

from collections.abc import Callable

import torch
from torch import nn


def in_float32(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply ``layer`` to ``x`` in float32, outside any autocast.

    The embedding is what margins and evaluation see; a bfloat16 last layer would round its cosines
    to 0.004.
    """
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.float())


def init_kaiming(network: nn.Module) -> None:
    """Initialise in place as AdaFace and InsightFace's MobileFaceNet do.

    He normal over fan-out, biases 0; norms keep 1 and 0.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
