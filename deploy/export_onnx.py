"""Turn a checkpoint into an ONNX model, checked against PyTorch before it gets its name.

    python deploy/export_onnx.py --checkpoint 600backbone.pth           # 600backbone.onnx
    python deploy/export_onnx.py --checkpoint 600backbone.pth --int8    # and .int8.onnx

The network is recognised by its weights (any of backbones/, as this repository, AdaDistill,
InsightFace, AdaFace or CVLFace save it). The model takes (N, 3, 112, 112) float32 RGB in [-1, 1],
or with --uint8 (N, 112, 112, 3) uint8 RGB as decoded, and gives (N, D) features that are not
normalised; N is open. BatchNorm is folded into the layers beside it. Metadata: network,
embedding_size, parameters, color_space, normalisation, numbers, step, checkpoint,
checkpoint_sha256, checkpoint_color_space. A checkpoint that was trained on BGR images becomes a
model that takes RGB; --color-space says which, where its file does not.

onnxruntime and PyTorch must agree on real images (--images, else the training set of the run's
config.json, else drawn faces): a cosine of at least 0.9999 for every image (--fp16: 0.999), or
nothing is written. --int8 is onnxruntime's static quantisation, calibrated on images of a training
set (--calibration-rec, else the run's); how it compares is printed: cosine to float, accuracy on
the pair sets, size, latency. Needs requirements/onnx.txt.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from deploy import checks
from deploy.graph import OLDEST_OPSET, OPSET, to_fp16, to_onnx, write_metadata
from deploy.model import Model, add_color_space, load_to_export
from deploy.quantise import LEAST_OPSET, to_int8
from utils.command_line import command_parser
from utils.errors import InputError, run
from utils.files import prepare_file, temporary_folder, write_json
from utils.teacher.onnx_graph import NORMALISED, PIXELS, require_onnx
from utils.weights.read import split_mark


def main() -> None:
    args = parse_arguments()
    require_onnx("deploy")
    if args.threads:
        torch.set_num_threads(args.threads)
    original = load_to_export(args.checkpoint, args.color_space)
    paths = plan(args)
    evidence = checks.gather(args)
    with temporary_folder(".export-", paths["float32"].absolute().parent) as folder:
        drafts = {numbers: folder / path.name for numbers, path in paths.items()}
        write_models(original, args, evidence, drafts)
        rows = checks.check(original, drafts, evidence)
        for numbers, path in paths.items():
            os.replace(drafts[numbers], path)
    print(checks.show(original, evidence, rows))
    print(original.describe())
    if args.results_json:
        write_json(args.results_json, rows)
    print("written: " + ", ".join(map(str, paths.values())))


def plan(args: argparse.Namespace) -> dict[str, Path]:
    """{"float32", "float16", "int8": the file}, as far as they are asked for.

    Raises InputError if nothing can be written there.
    """
    file, average = split_mark(args.checkpoint)
    output = args.output or file.with_suffix(".ema.onnx" if average else ".onnx")
    if output.suffix != ".onnx":
        raise InputError(f"--output: {output} must end in .onnx")
    paths = {"float32": output.with_name(f"{output.stem}.onnx")}
    if args.fp16:
        paths["float16"] = output.with_name(f"{output.stem}.fp16.onnx")
    if args.int8:
        paths["int8"] = output.with_name(f"{output.stem}.int8.onnx")
    for path in paths.values():
        prepare_file(path, "--output")
    if args.results_json:
        prepare_file(args.results_json, "--results-json")
    return paths


def write_models(
    original: Model, args: argparse.Namespace, evidence: checks.Evidence, paths: dict[str, Path]
) -> None:
    """Export the network, and make of the float model the others that are asked for."""
    exported = to_onnx(original.network, args.uint8, args.opset)
    for numbers, path in paths.items():
        model = exported
        if numbers == "float16":
            model = to_fp16(exported)
        elif numbers == "int8":
            model = to_int8(exported, evidence.calibration, args.uint8)
        write_metadata(
            model,
            **original.about(),
            numbers=numbers,
            normalisation=(PIXELS if args.uint8 else NORMALISED).description,
            checkpoint=args.checkpoint.name,
        )
        path.write_bytes(model.SerializeToString())


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="<step>backbone.pth, or a published .pth, .ckpt or .safetensors",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.onnx",
        help="default: beside the checkpoint; the others are FILE.fp16.onnx and FILE.int8.onnx",
    )
    parser.add_argument(
        "--uint8",
        action="store_true",
        help="take (N, 112, 112, 3) uint8, with the normalisation inside",
    )
    parser.add_argument(
        "--int8", action="store_true", help="also write a statically quantised model"
    )
    parser.add_argument(
        "--fp16",
        action="store_true",
        help="also write a model that computes in float16; its input and output stay as they are",
    )
    parser.add_argument(
        "--opset",
        type=int,
        default=OPSET,
        choices=range(OLDEST_OPSET, OPSET + 1),
        metavar="N",
        help=f"{OLDEST_OPSET} ... {OPSET} (%(default)s), for older runtimes; --int8 from "
        f"{LEAST_OPSET} on",
    )
    add_color_space(parser)
    parser.add_argument(
        "--images",
        type=Path,
        metavar="PATH",
        help="what to check on: a folder "
        "with train.rec, a folder of aligned faces or of identities, a pair set .bin",
    )
    parser.add_argument(
        "--calibration-rec",
        type=Path,
        metavar="DIR",
        help="of --int8: a folder with train.rec, or of identities",
    )
    parser.add_argument(
        "--calibration-images",
        type=int,
        default=256,
        metavar="N",
        help="how many of them, spread evenly (%(default)s)",
    )
    parser.add_argument(
        "--val-data",
        type=Path,
        metavar="DIR",
        help="of --int8: folder of the pair sets (default: the run's val_rec)",
    )
    parser.add_argument(
        "--val-targets",
        nargs="+",
        metavar="NAME",
        help="of --int8: pair sets there, by spaces or commas (default: the run's that are there)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of PyTorch and onnxruntime, for the latency (default: PyTorch's)",
    )
    parser.add_argument("--results-json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    if args.calibration_images < 1 or (args.threads or 1) < 1:
        raise InputError("--calibration-images and --threads must be at least 1")
    if args.int8 and args.opset < LEAST_OPSET:
        raise InputError(
            f"--int8 needs --opset {LEAST_OPSET} or newer, not {args.opset}: the operators that "
            "quantise each channel by itself came with it; leave --int8 out, or choose a newer one"
        )
    unused = [
        flag
        for flag in ("calibration_rec", "val_data", "val_targets")
        if getattr(args, flag) and not args.int8
    ]
    if unused:
        raise InputError(
            f"--{unused[0].replace('_', '-')} is of --int8; add --int8, or leave it out"
        )
    return args


if __name__ == "__main__":
    run(main)
