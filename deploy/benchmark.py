"""How large and how fast are these models on this machine? The table that papers print.

    python deploy/benchmark.py 600backbone.pth 600backbone.int8.onnx --batch 32 --threads 1
    python deploy/benchmark.py 600backbone.pth 600backbone.onnx --device cuda --batch 256

prints for each model its network, the colour order it was trained on, numbers it computes with,
parameters, multiply-adds (of convolutions and linear layers, for one image), size on disk, latency
of one image (median) and images per second at the batch size. Checkpoints run in PyTorch, ONNX
models in onnxruntime (requirements/onnx.txt). Images lie in memory, decoded and normalised; those
that take uint8 are given it, which counts.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from deploy.measure import measure, megabytes, multiply_adds, threads_in_words
from deploy.model import Model, add_color_space, load_model
from eval.report.tables import Table, format_table
from utils import distributed
from utils.command_line import command_parser
from utils.errors import InputError, run
from utils.files import prepare_file, write_json
from utils.teacher.onnx import CUDA


def main() -> None:
    args = parse_arguments()
    if args.results_json:
        prepare_file(args.results_json, "--results-json")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = distributed.init(args.device)
    models = [load_model(path, "model", args.color_space) for path in args.models]
    for model in models:
        if device.type == "mps" and model.is_onnx:
            raise InputError(
                f"{model.path}: onnxruntime does not compute on MPS: measure ONNX "
                "models with --device cpu"
            )
    rows = {str(model.path): measure_model(model, args.batch, device) for model in models}
    name = device_name(device)
    print(f"{name}, {threads_in_words()}")
    print(format_table(tabulate(rows, args.batch)))
    if args.results_json:
        results = dict(device=name, threads=torch.get_num_threads(), batch=args.batch, models=rows)
        write_json(args.results_json, results)


def measure_model(model: Model, batch: int, device: torch.device) -> dict:
    """All figures of a model, in the units of their names."""
    timing = measure(model.network.to(device), batch, device)
    numbers = "float32"
    if model.is_onnx:
        numbers = model.network.about.get("numbers", "?")
        if device.type == "cuda" and CUDA not in model.network.session.get_providers():
            raise InputError(
                f"{model.path}: onnxruntime has no working CUDA provider here: pip install "
                "onnxruntime-gpu in place of onnxruntime, or --device cpu"
            )
    return dict(
        network=model.name,
        color_space=model.color_space,
        numbers=numbers,
        embedding_size=model.embedding_size,
        parameters=model.parameters,
        multiply_adds=multiply_adds(model),
        megabytes=megabytes(model.path),
        latency_milliseconds=1000 * timing.latency,
        images_per_second=timing.throughput,
    )


def tabulate(rows: dict[str, dict], batch: int) -> Table:
    columns = [
        "network",
        "colours",
        "numbers",
        "params (M)",
        "multiply-adds (M)",
        "size (MB)",
        "latency (ms)",
        f"images/s at {batch}",
    ]
    cells = {
        name: [
            row["network"],
            row["color_space"],
            row["numbers"],
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['multiply_adds'] / 1e6:.1f}",
            f"{row['megabytes']:.2f}",
            f"{row['latency_milliseconds']:.2f}",
            f"{row['images_per_second']:.1f}",
        ]
        for name, row in rows.items()
    }
    return Table("", "model", columns, cells)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return {"cpu": "CPU", "mps": "Apple GPU"}[device.type]


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "models",
        type=Path,
        nargs="+",
        metavar="MODEL",
        help="checkpoints (.pth, .ckpt, .safetensors) and ONNX models",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=32,
        metavar="N",
        help="images at a time of the throughput (%(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads of PyTorch and onnxruntime (default: PyTorch's)",
    )
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, cuda:N or mps")
    add_color_space(parser)
    parser.add_argument("--results-json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", args.device):
        raise InputError(f"--device {args.device} is unknown: cpu, cuda, cuda:N or mps")
    if args.batch < 1 or (args.threads or 1) < 1:
        raise InputError("--batch and --threads must be at least 1")
    return args


if __name__ == "__main__":
    run(main)
