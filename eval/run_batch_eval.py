"""Evaluate all checkpoints of a run, or of every run in a folder, and compare them.

    python eval/run_batch_eval.py --checkpoint-dir output/demo --checkpoint-suffix backbone.pth --save-json

prints the table of run_full_eval.py for each and writes, in <checkpoint-dir>/reports, <name>_metrics.csv (and <name>.json) for each and
summary.csv, summary.md and summary.png over all; a name is 600backbone, or student_600backbone for the run in the sub-folder student.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval import evaluate, report
from utils import distributed
from utils.errors import InputError, run


def main() -> None:
    arguments = parse_arguments()
    checkpoints = find_checkpoints(arguments.checkpoint_dir, arguments.checkpoint_suffix)
    folder = arguments.report_dir or arguments.checkpoint_dir / "reports"
    report.prepare_folder(folder, "--report-dir")
    evaluator = evaluate.Evaluator(arguments)
    jobs = [evaluator.plan(checkpoint) for checkpoint in checkpoints]
    evaluate_all(evaluator, jobs, arguments, folder)
    distributed.shutdown()


def find_checkpoints(folder: Path, suffix: str) -> list[Path]:
    """The files in the folder and its direct sub-folders (one a run) whose names end so, by run and step; those without a step come last."""
    found = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.name.endswith(suffix) and path.is_file()]
    if not found:
        raise InputError(f"--checkpoint-dir: no file *{suffix} in {folder.absolute()} or its direct sub-folders; other endings: --checkpoint-suffix")
    return sorted(found, key=lambda path: (path.parent != folder, path.parent.name, step_of(path) is None, step_of(path) or 0, path.name))


def step_of(checkpoint: Path) -> int | None:
    number = re.match(r"\d+", checkpoint.name)
    return int(number[0]) if number else None


def evaluate_all(evaluator: evaluate.Evaluator, jobs: list[evaluate.Job], arguments: argparse.Namespace, folder: Path) -> None:
    """Evaluate and report one checkpoint after another; one that cannot be evaluated does not stop the others.

    Errors: InputError at the end that names those.
    """
    rows, failures = [], []
    for job in jobs:
        name = name_of(job.checkpoint, arguments.checkpoint_dir)
        try:
            results = evaluator.evaluate_checkpoint(job)
        except InputError as error:
            failures.append(f"{name}: {error}")
            continue
        rows.append(report.Row(name, job.checkpoint.absolute().parent.name, step_of(job.checkpoint), report.flatten(results)))
        if distributed.is_main():
            print(f"{name} ({evaluator.describe(job)})\n{report.format_verification(results)}\n", flush=True)
            report.write_metrics(folder / f"{name}_metrics.csv", rows[-1].figures)
            if arguments.save_json:
                report.write_json(folder / f"{name}.json", results)
    if distributed.is_main() and rows:
        report.write_summary(folder, rows)
        print(f"{report.format_skipped(evaluator.skipped)}{len(rows)} of {len(jobs)} checkpoints evaluated: {folder / 'summary.md'}, summary.csv, summary.png")
    if failures:
        raise InputError(f"{len(failures)} of {len(jobs)} checkpoints could not be evaluated: " + "; ".join(failures))


def name_of(checkpoint: Path, folder: Path) -> str:
    """``600backbone`` for a file in the folder itself, ``<run>_600backbone`` for one in a sub-folder."""
    return checkpoint.stem if checkpoint.parent == folder else f"{checkpoint.parent.name}_{checkpoint.stem}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--checkpoint-dir", type=Path, required=True, metavar="DIR", help="a run's folder, or a folder of runs")
    parser.add_argument("--checkpoint-suffix", default="backbone.pth", metavar="TEXT", help="ends of the names of checkpoints (%(default)s)")
    parser.add_argument("--report-dir", type=Path, metavar="DIR", help="where the reports go (<checkpoint-dir>/reports)")
    parser.add_argument("--save-json", action="store_true", help="write <name>.json beside each <name>_metrics.csv")
    evaluate.add_arguments(parser)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run(main)
