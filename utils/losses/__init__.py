"""Losses: one header made of class centres and a margin."""

from utils.losses.build import build_header, check_options
from utils.losses.header import Header

__all__ = ["Header", "build_header", "check_options"]

# AdaDistill's classes, one for each method and loss, as (method, loss) of ``build_header``.
_REPLACED = {
    "MLLoss": ("standalone", "MLLoss"),
    "CosFace": ("standalone", "CosFace"),
    "ArcFace": ("standalone", "ArcFace"),
    "AdaFace": ("standalone", "AdaFace"),
    "ACosFace": ("AdaDistill", "CosFace"),
    "AdaptiveACosFace": ("AdaDistill", "CosFace"),
    "AdaptiveAArcFace": ("AdaDistill", "ArcFace"),
    "AdaptiveAAdaFace": ("AdaDistill", "AdaFace"),
}


def __getattr__(name: str):
    """Raises ImportError for AdaDistill's classes; it shows the call that replaces them."""
    if name not in _REPLACED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    method, loss = _REPLACED[name]
    option = ", alpha=0.9" if name == "ACosFace" else ""
    raise ImportError(
        f"utils.losses has no {name}: one header replaces all of them: header = "
        f'build_header("{method}", "{loss}", in_features, out_features, s=s, m=m{option}); '
        "loss, stats = header(features, labels, features_t)"
    )
