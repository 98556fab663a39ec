"""Evaluate one checkpoint: accuracy on the pair sets (LFW, CFP-FP, AgeDB-30, ...).

    python eval/run_full_eval.py --checkpoint output/AdaDistill/600backbone.pth --config config/config.py --results-json results.json

prints the network and how it was run, for each pair set accuracy ± standard deviation over the ten folds (in %) and the mean norm of the
features, and "skipped <set>: no <path>" for each set that only the configuration names and that is not there.

A set that --val-data or --val-targets names must be there. On several ranks: torchrun --nproc_per_node 4 eval/run_full_eval.py ...
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval import evaluate, report
from utils import distributed
from utils.errors import InputError, run


def main() -> None:
    arguments = parse_arguments()
    if arguments.results_json:
        report.prepare_folder(arguments.results_json.absolute().parent, "--results-json")
    if not arguments.checkpoint.is_file():
        raise InputError(f"--checkpoint: no file at {arguments.checkpoint.absolute()}")
    evaluator = evaluate.Evaluator(arguments)
    job = evaluator.plan(arguments.checkpoint)
    results = evaluator.evaluate_checkpoint(job)
    if distributed.is_main():
        print(f"{arguments.checkpoint} ({evaluator.describe(job)})\n{report.format_verification(results)}\n{report.format_skipped(evaluator.skipped)}", end="")
        if arguments.results_json:
            report.write_json(arguments.results_json, results)
    distributed.shutdown()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="<step>backbone.pth, or a published .pth, .ckpt or .safetensors")
    parser.add_argument("--results-json", type=Path, metavar="FILE", help="write all figures there")
    evaluate.add_arguments(parser)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run(main)
