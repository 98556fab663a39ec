"""A header by the names of its method and its loss, and what of its options goes together."""

import torch
from torch import nn

from utils.errors import InputError, nearest
from utils.losses.centers import CENTERS
from utils.losses.header import GeometryMargin, Header
from utils.losses.margins import MARGINS


def build_header(
    method,
    loss,
    embedding_size,
    num_classes,
    *,
    s=64.0,
    m=None,
    h=0.333,
    t_alpha=0.01,
    adaptive_alpha=True,
    use_geom_margin=False,
    geom_margin_w=1.0,
    geom_margin_k=3.0,
    geom_margin_warmup_epoch=0,
    sample_rate=1.0,
    alpha=0.0,
    header_weight=1.0,
    feature_weight=0.0,
    centers_dtype=torch.float32,
    centers_on_host=False,
    header_precision="fp32",
) -> nn.Module:
    """A header for (D = embedding_size, C = num_classes); see ``Header`` for what it returns.

    method: "standalone" (centres learned), "AMLDistill" (the teacher's, frozen: load them) or
    "AdaDistill" (moving average of teacher features).
    loss: a name of MARGINS; m=None takes its own default. s: scale of the logits.
    h, t_alpha: AdaFace's concentration and momentum. adaptive_alpha: AdaDistill's weighted alpha.
    geom_*: geometry margin, warm-up in epochs.
    sample_rate: share of the classes that enter the softmax of a step, those of the batch always
    among them.
    alpha: AdaDistill's, constant; 0: adaptive.
    header_weight, feature_weight: of the two parts of the loss; see ``Header``.
    centers_dtype: float32 or bfloat16, in which centres (and learned ones' momentum) are kept; all
    products are of float32 numbers. centers_on_host: they stay in the host's memory when the header
    is moved to a GPU. header_precision: "fp32", or "tf32" for the products on a GPU.
    Raises InputError for unknown names and for combinations that make no sense.
    """
    for what, name, known in (("method", method, CENTERS), ("loss", loss, MARGINS)):
        if name not in known:
            raise InputError(
                f"unknown {what} {name!r}{nearest(name, known)}; known: {', '.join(known)}"
            )
    check_options(loss, use_geom_margin, sample_rate, header_weight, feature_weight, method)
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha={alpha} must be at least 0 (adaptive) and at most 1")
    centers = CENTERS[method](
        num_classes,
        embedding_size,
        centers_dtype,
        centers_on_host,
        header_precision,
        adaptive_alpha,
        constant_alpha=alpha,
    )
    margin = MARGINS[loss](m, h=h, t_alpha=t_alpha)
    geometry = None
    if use_geom_margin:
        geometry = GeometryMargin(geom_margin_w, geom_margin_k, geom_margin_warmup_epoch)
    return Header(centers, margin, s, geometry, sample_rate, header_weight, feature_weight)


def check_options(
    loss, use_geom_margin, sample_rate, header_weight, feature_weight, method=None
) -> None:
    """Raises InputError for what makes no sense together; method None: not known yet."""
    if use_geom_margin and method == "standalone":
        raise InputError(
            "use_geom_margin needs a teacher: use AdaDistill or AMLDistill, "
            "or set use_geom_margin=False"
        )
    if use_geom_margin and loss == "MLLoss":
        raise InputError(
            "use_geom_margin widens a margin and MLLoss has none: "
            "choose ArcFace, CosFace or AdaFace"
        )
    if not 0 < sample_rate <= 1:
        raise InputError(f"sample_rate={sample_rate} must be above 0 and at most 1")
    for key, weight in (("header_weight", header_weight), ("feature_weight", feature_weight)):
        if not 0 <= weight < float("inf"):
            raise InputError(f"{key}={weight} must be at least 0 and finite")
    if feature_weight and method == "standalone":
        raise InputError(
            "feature_weight needs a teacher: use AdaDistill or AMLDistill, or set feature_weight=0"
        )
    if not header_weight and not feature_weight:
        raise InputError(
            "header_weight=0 and feature_weight=0 leave nothing to learn from: set one of them"
        )
