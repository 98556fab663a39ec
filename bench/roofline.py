"""On paper: how fast a training step can be on a GPU, from operations and bytes that are counted.

    python bench/roofline.py

Every operation of a step runs on tensors without memory. A kernel takes at least as long as its
arithmetic or its reads and writes, whichever is longer, at the card's published peak. Nothing here
is measured. "eager": every operation is a kernel. "compiled": as torch.compile fuses, what works
number by number joins its neighbours, and BatchNorm reads for its statistics and again to apply
them. "fused": BatchNorm's statistics come with the convolution before it, as hand-written kernels
could do it; a teacher's, which stand still, are part of the convolution.
"""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backbones import build_backbone
from utils.losses import build_header

BATCH, C, D = 512, 85_742, 512
# of 26 epochs of MS1MV2
STEPS = 26 * (5_822_653 // BATCH)
# seconds a kernel takes the host to start: by PyTorch, by compiled code, in a CUDA graph; orders of
# magnitude, which depend on the processor
LAUNCH = (8e-6, 4e-6, 1e-6)
# passes over BatchNorm's inputs for its statistics, before those that apply them
STATISTICS = {"native_batch_norm": 1, "native_batch_norm_backward": 2}
PRODUCTS = {"convolution", "convolution_backward", "mm", "addmm"}


class Card(NamedTuple):
    """Published peaks: bytes a second, and operations a second by kind, without sparsity."""

    memory: float
    bf16: float = 989e12
    tf32: float = 494e12
    fp32: float = 67e12


CARDS = {"H100 SXM": Card(3.35e12), "H200": Card(4.8e12)}


class Kernel(NamedTuple):
    """bytes: eager, compiled, fused; 0: part of another. kind: of Card."""

    bytes: tuple[int, int, int]
    operations: int = 0
    kind: str = "fp32"


class Counter(TorchDispatchMode):
    """Collects the kernels of what runs."""

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            # the check of labels, which a GPU does not do
            return 0
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(("prim::", "detach", "empty")):
            self.kernels.append(kernel(name, args, result))
        return result


def kernel(name: str, args, result) -> Kernel:
    inputs = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
    moved = sum(map(size, inputs + [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]))
    if name in ("index", "index_put_"):
        # the rows that are read or written, not all there are
        moved = 2 * size(args[2] if name == "index_put_" else result)
    if name in PRODUCTS:
        return Kernel((moved,) * 3, *arithmetic(name, args, result))
    if name == "native_batch_norm" and not args[5]:
        return Kernel((moved, moved, 0))
    if name in STATISTICS:
        both = moved + sum(map(size, inputs[: STATISTICS[name]]))
        return Kernel((both, both, moved))
    # a residual connection reads what no neighbour has just computed
    beyond = size(inputs[1]) if name == "add" and inputs[0].dim() == 4 else 0
    return Kernel((moved, beyond, beyond))


def arithmetic(name: str, args, result) -> tuple[int, str]:
    """Operations, two for each multiply-add, and where: depthwise ones use no tensor cores."""
    if not name.startswith("convolution"):
        left, right = args[-2:]
        return 2 * left.numel() * right.shape[-1], "fp32"
    backward = name == "convolution_backward"
    out, weight = (args[0], args[2]) if backward else (result, args[1])
    # FlopCounterMode takes the backward pass of a depthwise convolution for that of a dense one
    products = sum(args[-1][:2]) if backward else 1
    kind = "bf16" if weight.shape[1] > 1 else "fp32"
    return products * 2 * out.numel() * weight[0].numel(), kind


def size(tensor: torch.Tensor) -> int:
    """Bytes: activations (B, C, H, W) are bf16, all else is as it is."""
    return tensor.numel() * (2 if tensor.dim() == 4 else tensor.element_size())


def of_network(name: str, training: bool) -> list[Kernel]:
    with FakeTensorMode(), torch.set_grad_enabled(training):
        network = build_backbone(name, D).train(training)
        with Counter() as counter:
            output = network(torch.zeros(BATCH, 3, 112, 112))
            if training:
                output.backward(torch.zeros_like(output))
    return counter.kernels


def of_header() -> list[Kernel]:
    """AdaDistill's, forward and backward; the lengths of its centres are known from before."""
    header = build_header("AdaDistill", "ArcFace", D, C)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for _ in range(2):
            features = torch.zeros(BATCH, D, requires_grad=True)
            with Counter() as counter:
                header(features, torch.zeros(BATCH).long(), features.detach())[0].backward()
    return counter.kernels


def seconds(kernels: list[Kernel], card: Card, way: int) -> float:
    """The least time of the kernels one after another; way: of Kernel.bytes."""
    return sum(
        max(x.operations / getattr(card, x.kind), x.bytes[way] / card.memory) for x in kernels
    )


def launches(kernels: list[Kernel], way: int) -> int:
    return sum(x.bytes[min(way, 1)] > 0 for x in kernels)


def main() -> None:
    # as on a GPU: none of the shares that a CPU's threads take of a product
    torch.set_num_threads(1)
    students = {name: of_network(name, True) for name in ("mobilefacenet", "mbf", "iresnet50")}
    teacher, header = of_network("iresnet50", False), of_header()
    print_row("forward and backward", "TFLOP", "GB", "compiled", "fused", "kernels", "compiled")
    for name, part in (*students.items(), ("iresnet50, teacher", teacher), ("header", header)):
        moved = [sum(x.bytes[way] for x in part) / 1e9 for way in range(3)]
        operations = sum(x.operations for x in part) / 1e12
        print_row(name, operations, *moved, launches(part, 0), launches(part, 1))
    steps = {f"{name} + header": [part] for name, part in students.items()}
    steps["mobilefacenet, live teacher"] = [students["mobilefacenet"], teacher]
    for card_name, card in CARDS.items():
        print_row(
            f"\n{card_name}: ms of a step",
            "eager",
            "compiled",
            "fused",
            *["launches"] * 3,
            "hours",
            "compiled",
        )
        for name, networks in steps.items():
            print_row(name, *figures_of_step(networks, header, card))
        in_tf32 = card._replace(fp32=card.tf32)
        print_row("header", 1e3 * seconds(header, card, 0))
        print_row("header in tf32", 1e3 * seconds(header, in_tf32, 0))


def figures_of_step(networks: list, header: list[Kernel], card: Card) -> list[float]:
    """Milliseconds of the GPU and of starting its kernels, each way, and hours of 26 epochs.

    The header is never compiled. The host starts kernels while the GPU computes.
    """
    own, own_start = seconds(header, card, 0), launches(header, 0) * LAUNCH[0]
    times = [own + sum(seconds(x, card, way) for x in networks) for way in range(3)]
    counts = [sum(launches(x, way) for x in networks) for way in range(3)]
    starts = [own_start + n * each for n, each in zip(counts, LAUNCH, strict=True)]
    hours = [STEPS * max(times[way], starts[way]) / 3600 for way in range(2)]
    return [1e3 * x for x in times + starts] + hours


def print_row(name: str, *cells) -> None:
    shown = (f"{x:9.2f}" if isinstance(x, float) else f"{x:>9}" for x in cells)
    print(f"{name:32}" + "".join(shown))


if __name__ == "__main__":
    main()
