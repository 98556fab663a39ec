"""Evaluate one checkpoint on everything that is there: pair sets (LFW, CFP-FP, AgeDB-30, ...),
IJB-B and IJB-C, TinyFace.

    python eval/run_full_eval.py --checkpoint output/AdaDistill/600backbone.pth \\
        --results-json results.json --report-dir report

prints the network and how it was run, for each pair set accuracy ± standard deviation over the ten
folds (in %) and the mean norm of the features, for IJB the true accept rates at six false accept
rates and the 1:N figures, for TinyFace the rank-k rates, and "skipped <set>: no <path>" for each
set that only the configuration names and that is not there. --report-dir adds report.html, and
thresholds.json: the cosine to ask for at a false accept rate, which deploy/compare_faces.py decides
by. A checkpoint may be an ONNX model (requirements/onnx.txt), so that what is deployed is measured.

A set that the command line names must be there; so must the folder. On several ranks: torchrun
--nproc_per_node 4 eval/run_full_eval.py ...
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval import evaluate
from eval.report import files, tables
from eval.report.html_report import write_page
from eval.report.thresholds import write_thresholds
from utils import distributed
from utils.command_line import command_parser
from utils.errors import InputError, run
from utils.files import prepare_file, prepare_folder, write_json
from utils.weights.read import split_mark


def main() -> None:
    arguments = parse_arguments()
    if arguments.results_json:
        prepare_file(arguments.results_json, "--results-json")
    if arguments.report_dir:
        prepare_folder(arguments.report_dir, "--report-dir")
    if not split_mark(arguments.checkpoint)[0].is_file():
        raise InputError(f"--checkpoint: no file at {arguments.checkpoint.absolute()}")
    evaluator = evaluate.Evaluator(arguments)
    job = evaluator.plan(arguments.checkpoint)
    exhibits = [] if arguments.report_dir else None
    results = evaluator.evaluate_checkpoint(job, exhibits)
    if distributed.is_main():
        report(arguments, evaluator, job, results, exhibits)
    distributed.shutdown()


def report(
    arguments: argparse.Namespace,
    evaluator: evaluate.Evaluator,
    job: evaluate.Job,
    results: dict,
    exhibits: list | None,
) -> None:
    """Print the figures and write what the command line asks for."""
    skipped = files.format_skipped(evaluator.skipped)
    description = evaluator.describe(job)
    print(f"{arguments.checkpoint} ({description})\n{tables.format_results(results)}")
    print(skipped, end="")
    if arguments.results_json:
        write_json(arguments.results_json, results)
    if not arguments.report_dir:
        return
    path = arguments.checkpoint.absolute()
    order = evaluator.order(job)
    digest = job.sha256()
    evaluation = {
        "checkpoint": str(path),
        "SHA-256": digest,
        **evaluator.settings(job),
        "color_space": order,
    }
    write_page(
        arguments.report_dir / "report.html",
        f"{path.name}\n{path.parent}\n{description}",
        results,
        exhibits,
        {"Evaluation": evaluation, "Run": evaluator.run_configuration(arguments.checkpoint)},
        skipped.splitlines(),
    )
    thresholds = arguments.report_dir / "thresholds.json"
    write_thresholds(thresholds, arguments.checkpoint, digest, order, exhibits)


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="<step>backbone.pth, a published .pth, .ckpt or .safetensors, or an ONNX model",
    )
    parser.add_argument("--results-json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--report-dir",
        type=Path,
        metavar="DIR",
        help="write report.html there (tables, curves, histograms and the hardest pairs on one "
        "page) and thresholds.json",
    )
    evaluate.add_arguments(parser)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run(main)
