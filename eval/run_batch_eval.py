"""Evaluate all checkpoints of a run, or of every run in a folder, and compare them.

    python eval/run_batch_eval.py --checkpoint-dir output/demo --save-json
    # one GPU for each checkpoint
    torchrun --nproc_per_node 4 eval/run_batch_eval.py --checkpoint-dir output/demo \\
        --share-checkpoints

prints the table of run_full_eval.py for each and writes, in <checkpoint-dir>/reports,
<name>_metrics.csv (and .json) for each and summary.csv, summary.md, summary.png and
metrics.pdf (every metric against the step) over all; a name is 600backbone, or student_600backbone
for the run in the sub-folder student. Runs whose config.json differ in seed and output only are
seeds of one method: seeds.md and seeds.csv have one row for them, the mean ± standard deviation.
deploy/export_onnx.py: 600backbone.onnx, 600backbone.int8.onnx. A checkpoint whose report is there,
newer than the file and made with the same settings (settings/<name>.json) is not evaluated again.

    python eval/run_batch_eval.py --checkpoint-dir output --intervals 1000 \\
        --against standalone_600backbone

adds, for every other checkpoint and figure, the difference to that one with its 95 % interval, and
a mark where it excludes 0, and draws them in differences.png (docs/uncertainty.md).
"""

import argparse
import re
import sys
from difflib import get_close_matches
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval import evaluate
from eval.bootstrap import Difference, subtract
from eval.report import figure_keys, files, seeds, tables
from eval.uncertainty import Uncertainty
from utils import distributed
from utils.command_line import command_parser
from utils.errors import InputError, run
from utils.files import prepare_folder, printable, read_json, write_json
from utils.weights.load import run_beside


def main() -> None:
    arguments = parse_arguments()
    checkpoints = find_checkpoints(arguments.checkpoint_dir, arguments.checkpoint_suffix)
    folder = arguments.report_dir or arguments.checkpoint_dir / "reports"
    check_against(arguments, checkpoints)
    prepare_folder(folder, "--report-dir")
    evaluator = evaluate.Evaluator(arguments)
    reports = Reports(folder, arguments, evaluator)
    jobs = plan(evaluator, checkpoints, reports)
    if arguments.share_checkpoints:
        group = distributed.patient_group()
        jobs_of_rank = jobs[distributed.rank() :: distributed.world_size()]
        with distributed.alone():
            evaluate_all(evaluator, jobs_of_rank, reports)
        reports.merge(distributed.all_gather_object((reports.rows, reports.failures), group))
    else:
        evaluate_all(evaluator, jobs, reports)
    reports.close(checkpoints)
    distributed.shutdown()


def find_checkpoints(folder: Path, suffix: str) -> list[Path]:
    """The files in the folder and its direct sub-folders (one a run) whose names end so, by run and
    step; those without a step come last.
    """
    checkpoints = [
        path
        for path in (*folder.glob("*"), *folder.glob("*/*"))
        if path.name.endswith(suffix) and path.is_file()
    ]
    if not checkpoints:
        raise InputError(
            f"--checkpoint-dir: no file *{suffix} in {folder.absolute()} or its "
            "direct sub-folders; other endings: --checkpoint-suffix"
        )

    def by_run_and_step(path: Path) -> tuple:
        step = step_of(path)
        return path.parent != folder, path.parent.name, step is None, step or 0, path.name

    return sorted(checkpoints, key=by_run_and_step)


def check_against(arguments: argparse.Namespace, checkpoints: list[Path]) -> None:
    """Raises InputError unless --against is one of the checkpoints' names, and there are draws."""
    if arguments.against is None:
        return
    names = [name_of(checkpoint, arguments.checkpoint_dir) for checkpoint in checkpoints]
    if arguments.against not in names:
        near = get_close_matches(arguments.against, names, 5, 0) or names[:5]
        raise InputError(
            f"--against {arguments.against!r}: no such checkpoint in {arguments.checkpoint_dir}; "
            f"the nearest names: {', '.join(near)}"
        )
    if not arguments.intervals:
        raise InputError("--against needs the draws of --intervals N, for example --intervals 1000")


def step_of(checkpoint: Path) -> int | None:
    number = re.match(r"\d+", checkpoint.name)
    return int(number[0]) if number else None


def plan(
    evaluator: evaluate.Evaluator, checkpoints: list[Path], reports: "Reports"
) -> list[evaluate.Job]:
    """The evaluations to do: a checkpoint with a report is skipped, one whose configuration or sets
    are unusable is a failure of its own.

    Raises InputError if the same reason keeps all of them from being evaluated.
    """
    jobs, errors = [], {}
    for checkpoint in checkpoints:
        try:
            job = evaluator.plan(checkpoint)
        except InputError as error:
            errors[checkpoint] = error
            continue
        if not distributed.main_computes(partial(reports.add_earlier, job)):
            jobs.append(job)
    if len(errors) == len(checkpoints) and len(set(map(str, errors.values()))) == 1:
        raise errors[checkpoints[0]]
    for checkpoint, error in errors.items():
        reports.add_failure(checkpoint, str(error))
    return jobs


def evaluate_all(
    evaluator: evaluate.Evaluator, jobs: list[evaluate.Job], reports: "Reports"
) -> None:
    """Evaluate and report one checkpoint after another; one that cannot be evaluated does not stop
    the others.
    """
    for job in jobs:
        uncertainty = evaluator.uncertainty()
        try:
            results = evaluator.evaluate_checkpoint(job, None, uncertainty)
        except InputError as error:
            reports.add_failure(job.checkpoint, str(error))
            continue
        reports.add(job, results, uncertainty)


class Reports:
    """What is written about each checkpoint and about all, by the first rank, or by each about its
    own where checkpoints are shared out.
    """

    def __init__(self, folder: Path, arguments: argparse.Namespace, evaluator: evaluate.Evaluator):
        self.folder = folder
        self.arguments = arguments
        self.evaluator = evaluator
        self.rows = {}
        self.failures = {}

    def add(self, job: evaluate.Job, results: dict, uncertainty: Uncertainty) -> None:
        of_sets = {kind: results[kind] for kind in figure_keys.KINDS}
        name = self.add_row(job.checkpoint, figure_keys.flatten(of_sets))
        # a name that means nothing: said at the first checkpoint, not after the last
        if self.arguments.sort_by:
            figure_keys.find_metric(
                self.arguments.sort_by, sorted(self.rows[job.checkpoint].figures)
            )
        if distributed.is_main():
            description = self.evaluator.describe(job)
            print(f"{name} ({description})\n{tables.format_results(results)}")
            print("\n".join([*uncertainty.notes, ""]), flush=True)
            self.settings_of(name).parent.mkdir(exist_ok=True)
            files.write_metrics(self.metrics_of(name), self.rows[job.checkpoint].figures)
            if self.arguments.save_json:
                write_json(self.figures_of(name), results)
            if uncertainty.samples:
                files.write_samples(self.samples_of(name), uncertainty.samples)
            write_json(self.settings_of(name), self.evaluator.settings(job))

    def add_earlier(self, job: evaluate.Job) -> bool:
        """Take the figures of an earlier report if it is newer than the checkpoint and was made
        with the same settings.
        """
        name = name_of(job.checkpoint, self.arguments.checkpoint_dir)
        report = [self.metrics_of(name), self.settings_of(name)]
        if self.arguments.save_json:
            report.append(self.figures_of(name))
        if self.evaluator.draws:
            report.append(self.samples_of(name))
        if self.arguments.force or not all(is_newer(path, job.checkpoint) for path in report):
            return False
        try:
            settings = read_json(self.settings_of(name), advice=files.REMAKE)
            figures = files.read_metrics(self.metrics_of(name))
        except InputError as error:
            print(f"{name}: evaluated again, for its report is damaged: {error}")
            return False
        if settings != self.evaluator.settings(job):
            return False
        self.add_row(job.checkpoint, figures)
        print(f"{name}: the report is newer than the checkpoint; --force makes it again")
        return True

    def merge(self, of_ranks: list[tuple[dict, dict]]) -> None:
        """Take the rows and failures of all ranks."""
        for rows, failures in of_ranks:
            self.rows |= rows
            self.failures |= failures

    def add_row(self, checkpoint: Path, figures: dict) -> str:
        name = name_of(checkpoint, self.arguments.checkpoint_dir)
        run_name = printable(checkpoint.absolute().parent.name)
        self.rows[checkpoint] = figure_keys.Row(
            printable(name), run_name, step_of(checkpoint), figures
        )
        return name

    def add_failure(self, checkpoint: Path, error: str) -> None:
        self.failures[checkpoint] = f"{name_of(checkpoint, self.arguments.checkpoint_dir)}: {error}"

    def metrics_of(self, name: str) -> Path:
        return self.folder / f"{name}_metrics.csv"

    def figures_of(self, name: str) -> Path:
        return self.folder / f"{name}_metrics.json"

    def samples_of(self, name: str) -> Path:
        """What every draw gave for every figure."""
        return self.folder / "settings" / f"{name}.npz"

    def settings_of(self, name: str) -> Path:
        return self.folder / "settings" / f"{name}.json"

    def close(self, checkpoints: list[Path]) -> None:
        """Write the comparison of all.

        Raises InputError that names the checkpoints that could not be evaluated.
        """
        rows = {path: self.rows[path] for path in checkpoints if path in self.rows}
        distributed.main_computes(lambda: self.compare(rows, len(checkpoints)))
        if self.failures:  # after the comparison is written: this ends the other ranks
            raise InputError(
                f"{len(self.failures)} of {len(checkpoints)} checkpoints could not be "
                "evaluated: " + "; ".join(self.failures.values())
            )

    def compare(self, by_checkpoint: dict[Path, figure_keys.Row], checkpoints: int) -> None:
        rows = list(by_checkpoint.values())
        if not rows:
            return
        files.write_summary(self.folder, rows, self.arguments.sort_by, self.differences())
        methods = seeds.group_by_method(rows, list(map(configuration_of, by_checkpoint)))
        written = ["summary.csv", "summary.png", "metrics.pdf"]
        if self.arguments.against:
            written.append("differences.png")
        if seeds.write_seeds(self.folder, methods):
            written += seeds.FILES
        skipped = files.format_skipped(self.evaluator.skipped)
        print(
            f"{skipped}{len(rows)} of {checkpoints} checkpoints evaluated: "
            f"{self.folder / 'summary.md'}, {', '.join(written)}",
            flush=True,
        )

    def differences(self) -> dict[str, dict[str, Difference]] | None:
        """{name of a row: {figure: its difference to --against}}, None without --against."""
        against = self.arguments.against
        if against is None:
            return None
        rows = {
            name_of(path, self.arguments.checkpoint_dir): row for path, row in self.rows.items()
        }
        if against not in rows:
            return {}
        samples = {name: files.read_samples(self.samples_of(name)) for name in rows}
        return {
            row.name: subtract(row.figures, samples[name], rows[against].figures, samples[against])
            for name, row in rows.items()
            if name != against
        }


def configuration_of(checkpoint: Path) -> dict:
    """What the run of a checkpoint wrote beside it; empty if it is no run's."""
    beside = run_beside(checkpoint)
    return read_json(beside) if beside else {}


def is_newer(path: Path, checkpoint: Path) -> bool:
    return path.is_file() and path.stat().st_mtime_ns >= checkpoint.stat().st_mtime_ns


def name_of(checkpoint: Path, folder: Path) -> str:
    """``600backbone`` for a file in the folder itself, ``<run>_600backbone`` for one in a
    sub-folder; ONNX models keep their ending beside the checkpoint they were made from.
    """
    name = checkpoint.name if checkpoint.suffix == ".onnx" else checkpoint.stem
    return name if checkpoint.parent == folder else f"{checkpoint.parent.name}_{name}"


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--checkpoint-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="a run's folder, or a folder of runs",
    )
    parser.add_argument(
        "--checkpoint-suffix",
        default="backbone.pth",
        metavar="TEXT",
        help="ends of the names of checkpoints (%(default)s); .onnx for ONNX models",
    )
    parser.add_argument(
        "--report-dir",
        type=Path,
        metavar="DIR",
        help="where the reports go (<checkpoint-dir>/reports)",
    )
    parser.add_argument(
        "--save-json",
        action="store_true",
        help="write <name>_metrics.json beside each <name>_metrics.csv",
    )
    parser.add_argument(
        "--sort-by",
        metavar="METRIC",
        help="order of the summaries, best first: a metric's name or the end of one, e.g. "
        "lfw.Accuracy-Flip, rank-1",
    )
    parser.add_argument(
        "--against",
        metavar="NAME",
        help="compare all others with this checkpoint, named as its report is; needs --intervals",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="evaluate also the checkpoints whose report is there and newer",
    )
    parser.add_argument(
        "--share-checkpoints",
        action="store_true",
        help="under torchrun: every process (GPU) evaluates checkpoints of its own",
    )
    evaluate.add_arguments(parser)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run(main)
