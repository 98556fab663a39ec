"""The header's products in fp32 and tf32: where each counts, and how far off a logit can be."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests import rounding
from utils.losses import build_header
from utils.losses.center_products import cosines

B, C, D, S = 16, 300, 512, 64.0
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"}
# bits of float32's mantissa that tf32 does not have
LOST = 13


class TensorCores(TorchDispatchMode):
    """Matrix products as a GPU makes them: of tf32 numbers while that is set, added in float32.

    nearest: whether numbers are rounded to the nearest or cut off; both are seen on GPUs.
    """

    def __init__(self, nearest: bool = True):
        super().__init__()
        self.nearest = nearest
        # the setting at every product
        self.settings = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().partition(".")[0] in PRODUCTS and args[-1].dtype == torch.float32:
            self.settings.append(torch.backends.cuda.matmul.fp32_precision)
            if self.settings[-1] == "tf32":
                # the last two are multiplied
                args = (*args[:-2], *(self.rounded(matrix) for matrix in args[-2:]))
        return func(*args, **(kwargs or {}))

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        bits = x.contiguous().view(torch.int32)
        if self.nearest:
            bits = bits + (1 << (LOST - 1))
        return (bits & -(1 << LOST)).view(torch.float32)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    features, teacher = torch.randn(2, B, D, generator=generator)
    return features, torch.randint(C, (B,), generator=generator), teacher


def header_of(method: str, precision: str):
    torch.manual_seed(1)
    header = build_header(method, "ArcFace", D, C, header_precision=precision)
    header.centers.defer = True
    return header


@pytest.mark.parametrize("nearest", [True, False])
def test_tf32_moves_a_logit_by_no_more_than_its_mantissa(inputs, nearest):
    # Each of the D pairs of numbers is off by two roundings of at most half a unit of 2^-10, or two
    # cuts of a whole one; by Cauchy-Schwarz their products add up to that part of |f| |w| = 1.
    each = 2.0 ** -(11 if nearest else 10)
    bound = S * ((1 + each) ** 2 - 1) + rounding.logit(D, S)
    features = F.normalize(inputs[0])
    errors = {}
    for precision in ("fp32", "tf32"):
        centers = header_of("AdaDistill", precision).centers
        exact = S * features.double() @ F.normalize(centers.weight.double()).t()
        with TensorCores(nearest):
            logits = S * cosines(features, centers, None)[0]
        errors[precision] = float((logits - exact).abs().max())
    assert errors["fp32"] <= rounding.logit(D, S) < errors["tf32"] <= bound


@pytest.mark.parametrize("precision, setting", [("fp32", "ieee"), ("tf32", "tf32")])
@pytest.mark.parametrize("before", ["highest", "high"])
@pytest.mark.parametrize("method", ["standalone", "AdaDistill"])
def test_only_the_products_with_centers_have_the_headers_precision(
    inputs, method, precision, setting, before
):
    features, labels, teacher = inputs
    header = header_of(method, precision)
    torch.set_float32_matmul_precision(before)
    outside = torch.backends.cuda.matmul.fp32_precision
    try:
        with TensorCores() as cores:
            loss, _ = header(features.requires_grad_() @ torch.eye(D), labels, teacher)
            loss.backward()
            if header.centers.learned:
                header.centers.step(0.1, 0.9, 5e-4)
        # of what the process is left with, both of PyTorch's settings still say the same
        assert torch.get_float32_matmul_precision() == before
        assert torch.backends.cuda.matmul.fp32_precision == outside
    finally:
        torch.set_float32_matmul_precision("highest")
    own = 3 if header.centers.learned else 2
    assert cores.settings.count(setting) >= own
    # the product that plays the network
    others = [other for other in cores.settings if other != setting]
    if outside != setting:
        assert set(others) == {outside} and len(cores.settings) - len(others) == own


def test_the_loss_moves_no_more_than_two_logits(inputs):
    # log-sum-exp moves by at most the largest change of a logit, the target's logit by another
    losses = {}
    for precision in ("fp32", "tf32"):
        with TensorCores():
            losses[precision] = float(header_of("AdaDistill", precision)(*inputs)[0])
    # ArcFace's margin m lengthens a change of the cosine c by |cos m + c sin m / sin(theta)| <= 2
    # while |c| <= 0.9
    assert 0 < abs(losses["tf32"] - losses["fp32"]) <= 3 * S * 2.0**-10
