"""The networks people train and distil, by the names their checkpoints are known under."""

import difflib
from functools import partial

from torch import nn

from backbones.ir import IR
from backbones.iresnet import IRESNETS, IResNet
from backbones.mobilefacenet import MBF, MobileFaceNet
from utils.errors import InputError

# Residual blocks in each of the four stages.
_IRS = {
    "ir18": (2, 2, 2, 2),
    "ir50": (3, 4, 14, 3),
    "ir101": (3, 13, 30, 3),
}
_MOBILE = {
    "mobilefacenet": partial(MobileFaceNet, (112, 112)),
    "mbf": partial(MBF, blocks=(1, 4, 6, 2), scale=2),
    "mbf_large": partial(MBF, blocks=(2, 8, 12, 4), scale=4),
}
NAMES = (*_MOBILE, *IRESNETS, *_IRS)


def build_backbone(
    name: str, embedding_size: int = 512, use_se: bool = False, dropout: float = 0.0
) -> nn.Module:
    """Build the network called ``name`` with freshly initialised weights.

    It maps (B, 3, 112, 112) RGB (AdaFace's released weights: BGR) in [-1, 1] to (B, embedding_size)
    float32 features, not normalised, whatever the autocast precision. State-dict keys are those of
    the published checkpoints: AdaDistill and InsightFace (iresnet*, mobilefacenet, mbf*), AdaFace
    and CVLFace (ir*).
    use_se: squeeze-and-excitation, of iresnet*.
    dropout: before the last layer, of iresnet* and ir*.
    Raises InputError for an unknown name or an option that the network does not have.
    """
    if name not in NAMES:
        raise InputError(_unknown(name))
    if use_se and name not in IRESNETS:
        raise InputError(
            f"network {name} has no squeeze-and-excitation variant (SE); only "
            f"{', '.join(IRESNETS)} have"
        )
    if name in IRESNETS:
        return IResNet(IRESNETS[name], embedding_size, use_se=use_se, dropout=dropout)
    if name in _IRS:
        return IR(_IRS[name], embedding_size, dropout=dropout)
    if dropout:
        raise InputError(f"network {name} has no dropout; only iresnet* and ir* have")
    return _MOBILE[name](embedding_size)


def _unknown(name: str) -> str:
    nearest = difflib.get_close_matches(str(name), NAMES, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    return f"unknown network {name!r}{hint}; known: {', '.join(NAMES)}"
