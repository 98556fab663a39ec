"""How far two right results may lie apart: bounds that follow from the arithmetic, so that tests
hold on every processor.

A float32 operation is off by at most U of its result, and rounding errors are independent: n of
them add up to sqrt(n) U. All partial sums of a product of two unit vectors are at most 1, in
whatever order they are added, with or without fused multiply-add.
"""

import math
import re

import torch

# float32, float16 and bf16 hold a number to half a unit in the last place: of its size, at most
U, U16, UBF16 = 2.0**-24, 2.0**-11, 2.0**-8


def cosine(size: int) -> float:
    """Of two vectors of ``size`` numbers: sqrt(size) U of their product and half as much of either
    length.
    """
    return 2 * math.sqrt(size) * U


def logit(size: int, scale: float = 64.0) -> float:
    """Of scale * cosine.

    The softmax turns it into as large a relative error of a probability, twice for its denominator.
    """
    return scale * cosine(size)


def feature_gradient(features: torch.Tensor, scale: float = 64.0) -> float:
    """L2 norm of the error of d loss / d features (B, D), the loss being the mean of B
    cross-entropies.

    A sample's gradient is a sum of centres of unit length by (scale / B) (p - y) / |f|, and the
    probabilities p, which add up to 1, are off by 2 logit() of their size.
    """
    lengths = features.detach().norm(dim=1)
    return 2 * logit(features.shape[1], scale) * float((scale / len(features) / lengths).norm())


def network(layers: int, terms: int = 512) -> float:
    """Of an output of ``layers`` convolutions, relative to the largest one: each is a sum of up to
    ``terms``, and the next one passes its error on.

    In which order they are added depends on the processor, the memory format and the size of the
    batch.
    """
    return math.sqrt(layers * terms) * U


def printed(text: str, label: str) -> float:
    """The number that follows ``label`` in a text; with d digits it is off by up to 10^-d / 2."""
    actual = re.search(re.escape(label) + r"\s*(-?\d+(?:\.\d+)?)", text)
    assert actual, f"no number after {label!r} in {text!r}"
    return float(actual[1])
