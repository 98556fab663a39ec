"""The number formats a network can compute in, and which one this hardware prefers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from utils.errors import InputError

# autocast's dtype; None: no autocast
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# PyTorch's words for how float32 matrices are multiplied on a GPU
PRODUCTS = {"fp32": "ieee", "tf32": "tf32"}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which networks on ``device`` compute in "fp32", "bf16" or "fp16"."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def choose_precision(precision: str, device: torch.device) -> str:
    """ "auto" -> bf16 where the hardware multiplies it natively, else fp32.

    Raises InputError if the precision is not one that is used on this device.
    """
    if device.type == "mps":
        if precision not in ("auto", "fp32"):
            raise InputError(
                f"precision={precision}: device=mps computes in float32; set precision=fp32"
            )
        return "fp32"
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # no public name for these in PyTorch 2.11 to 2.15; AVX-512 without bf16 only emulates
            # it, three times slower than fp32
            native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return "bf16" if native else "fp32"
    return precision


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """In this block a GPU multiplies float32 matrices in "fp32" or "tf32", whatever was set before.

    tf32 rounds both matrices to a mantissa of 10 bits and adds in float32. The setting is the
    process's: it counts for autograd's threads, too.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = PRODUCTS[precision]
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def cudnn_benchmark(on: bool) -> Iterator[None]:
    """In this block cuDNN tries its convolutions for every new shape and takes the fastest.

    That pays where shapes stay as they are: in training.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def float64_device(device: torch.device) -> torch.device:
    """Where float64 is computed for ``device``: there, but for MPS, which has none, on the host."""
    return torch.device("cpu") if device.type == "mps" else device
