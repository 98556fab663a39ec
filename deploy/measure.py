"""What a deployed model is judged by: agreement, multiply-adds, size, latency, throughput."""

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deploy.model import Model
from utils.errors import InputError
from utils.files import utf8_path
from utils.teacher.onnx_graph import IMAGE, inputs_of, require_onnx, weight_files

# operators that multiply by weights, and which of their inputs those are; the eight-bit ones are of
# other quantisers
WEIGHTS = dict(
    Conv=1,
    Gemm=1,
    MatMul=1,
    ConvInteger=1,
    MatMulInteger=1,
    QLinearConv=3,
    QLinearMatMul=3,
    QGemm=3,
    FusedConv=1,
    FusedGemm=1,
    FusedMatMul=1,
    MatMulIntegerToFloat=1,
    DynamicQuantizeMatMul=1,
)
# of each timing, at least
RUNS = 10


class Agreement(NamedTuple):
    """How alike the features of two models are.

    difference: the largest of two numbers. largest: number. least_cosine, mean_cosine: of images.
    """

    difference: float
    largest: float
    least_cosine: float
    mean_cosine: float


class Timing(NamedTuple):
    """latency: median seconds of one image; throughput: images per second, ``batch`` at a time."""

    latency: float
    throughput: float
    batch: int


def agreement(features: np.ndarray, reference: np.ndarray) -> Agreement:
    """Compare features (N, D), raw as the networks give them.

    Raises InputError if they are of another shape.
    """
    if features.shape != reference.shape:
        raise InputError(f"features of shape {features.shape} where {reference.shape} are expected")
    products = np.einsum("nd,nd->n", features, reference, dtype=np.float64)
    lengths = np.linalg.norm(features.astype(np.float64), axis=1)
    reference_lengths = np.linalg.norm(reference.astype(np.float64), axis=1)
    cosines = products / (lengths * reference_lengths)
    return Agreement(
        float(np.abs(features - reference).max()),
        float(np.abs(reference).max()),
        float(cosines.min()),
        float(cosines.mean()),
    )


def multiply_adds(model: Model) -> int:
    """Multiplications of convolutions and linear layers for one image.

    Papers call them multiply-adds (half of the FLOPs). Biases and activations are not counted.
    """
    return count_in_graph(model.path) if model.is_onnx else count_in_network(model.network)


def count_in_network(network: nn.Module) -> int:
    device = next(network.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, *IMAGE, device=device))
    return counter.get_total_flops() // 2


def count_in_graph(path: Path) -> int:
    """The same from the shapes in an ONNX graph, quantised or not.

    Raises InputError if it does not tell them.
    """
    graph, shapes = shapes_in(path)
    total = 0
    for node in graph.node:
        if node.op_type not in WEIGHTS:
            continue
        output, weight = shapes.get(node.output[0]), shapes.get(node.input[WEIGHTS[node.op_type]])
        if not output or not weight or not all(output + weight):
            raise InputError(
                f"{path}: the graph does not tell the shapes of its {node.op_type} "
                f"{node.name}, so its multiply-adds cannot be counted"
            )
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        each = weight[1:] if "Conv" in node.op_type or transposed else weight[-2:-1]
        total += int(np.prod(output)) * int(np.prod(each))
    return total


def shapes_in(path: Path) -> tuple:
    """A graph and {value: shape} for one image, 0 where a size is not told."""
    onnx = require_onnx("model")
    model = onnx.load(utf8_path(path))
    inputs_of(model.graph)[0].type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph

    def sizes(value) -> list[int]:
        return [dim.dim_value for dim in value.type.tensor_type.shape.dim]

    shapes = {value.name: sizes(value) for value in (*graph.value_info, *graph.input)}
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    shapes |= {value.name: [size or 1 for size in sizes(value)] for value in graph.output}
    return graph, shapes


def megabytes(path: Path) -> float:
    """Size on disk in MB (10^6 bytes), of an ONNX model with the files that hold its weights."""
    files = weight_files(path, "model") if path.suffix == ".onnx" else [path]
    return sum(file.stat().st_size for file in files) / 1e6


def measure(network: nn.Module, batch: int, device: torch.device, seconds: float = 1.0) -> Timing:
    """Latency and throughput on random images that lie on the device.

    They are medians over at least ``seconds``. The number of threads is PyTorch's, which ONNX
    models take over.
    """
    single = float(np.median(run_times(network, 1, device, seconds)))
    together = float(np.median(run_times(network, batch, device, seconds))) if batch > 1 else single
    return Timing(single, batch / together, batch)


def run_times(network: nn.Module, batch: int, device: torch.device, seconds: float) -> list[float]:
    """Seconds of each run, after two that are not counted."""
    images = torch.rand(batch, *IMAGE, generator=torch.Generator().manual_seed(0))
    images = images.mul_(2).sub_(1).to(device)
    times = []
    with torch.inference_mode():
        for _ in range(2):
            network(images)
        while len(times) < RUNS or sum(times) < seconds:
            synchronize(device)
            start = time.perf_counter()
            network(images)
            synchronize(device)
            times.append(time.perf_counter() - start)
    return times


def threads_in_words() -> str:
    """How many threads a network computes with."""
    threads = torch.get_num_threads()
    return "1 thread" if threads == 1 else f"{threads} threads"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
