"""Which way of distilling gives the best small network on a small set: methods x seeds.

    python bench/small_set.py rec=SET val_rec=FOLDER val_targets=lfw_dev \\
        --features SET/teacher_features.npz --output output/small_set
    python bench/small_set.py rec=SET val_rec=FOLDER val_targets=lfw_dev \\
        --features SET/teacher_features.npz --output output/small_set \\
        --epochs 8 --seeds 1 --methods standalone AdaDistill_ArcFace
    python bench/small_set.py --output output/small_set --table

trains one run after another, the first seed of every method first, each into
<output>/runs/<method>_<network>_<epochs>_epochs_seed<seed>. For each finished run it writes a row
into <output>/results.csv: its accuracies on the pair sets in %, measured at its end. The same
command again goes on where it was stopped or killed: with the runs that have no row yet, the first
from its last epoch. --table trains nothing. Either prints a table of the mean ± standard deviation
over the seeds, and which of the runs that were asked for have no row.

SET is a RecordIO set. --features: the teacher's features of it, as train/cache_teacher.py --from
reads them; they have 128 dimensions, or embedding_size=N says how many. Other key=value go to
every training, too.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from backbones import NAMES
from eval.report.files import table_line, write_table
from eval.report.seeds import mean_and_spread
from utils.command_line import command_parser
from utils.errors import InputError, run
from utils.files import prepare_folder, read_json, write_json
from utils.run.folder import RunFolder

COMMON = (
    "dataset=synthetic embedding_size=128 batch_size=64 lr=0.8 s=32 m=0.3 precision=bf16 "
    "compile=True num_workers=1 log_every=20 keep_states=1 val_eval_every_n_epoch=0"
).split()
# {epochs: milestones}
MILESTONES = {3: "[]", 8: "5,7"}
# {method: its run script and values}
METHODS = {
    "standalone": "standalone loss=ArcFace",
    "AMLDistill": "AMLDistill loss=ArcFace",
    "AdaDistill_ArcFace": "AdaDistill loss=ArcFace",
    "AdaDistill_CosFace": "AdaDistill loss=CosFace",
    "AdaDistill_AdaFace_geometry": "AdaDistill loss=AdaFace use_geom_margin=True",
    # what it may lack to keep up with ArcFace, see docs/results.md
    "AdaDistill_AdaFace": "AdaDistill loss=AdaFace",
    "AdaDistill_AdaFace_geometry_m0.2": "AdaDistill loss=AdaFace use_geom_margin=True m=0.2",
    "AdaDistill_AdaFace_geometry_k1": (
        "AdaDistill loss=AdaFace use_geom_margin=True geom_margin_k=1"
    ),
    "AdaDistill_AdaFace_geometry_features": (
        "AdaDistill loss=AdaFace use_geom_margin=True feature_weight=64"
    ),
    "AdaDistill_alpha0.9": "AdaDistill loss=ArcFace alpha=0.9",
    "features": "AdaDistill header_weight=0 feature_weight=64",
    # TH-KD
    "AMLDistill_features": "AMLDistill loss=ArcFace feature_weight=64",
    "AdaDistill_features": "AdaDistill loss=ArcFace feature_weight=64",
}
KEYS = ("method", "network", "epochs", "seed")


class Job(NamedTuple):
    """One training."""

    method: str
    network: str
    epochs: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}_{self.network}_{self.epochs}_epochs_seed{self.seed}"


def main() -> None:
    arguments = parse_arguments()
    output = arguments.output.absolute()
    jobs = [
        Job(method, network, arguments.epochs, seed)
        for seed in arguments.seeds
        for network in arguments.networks
        for method in arguments.methods
    ]
    if not arguments.table:
        prepare_folder(output, "--output")
        overrides = prepare(arguments, output)
        for job in jobs:
            if job not in read_rows(output):
                train(job, overrides, output)
                add_row(job, output)
    rows = read_rows(output)
    print(table(rows))
    missing = [job.name for job in jobs if job not in rows]
    print(f"\nmissing: {', '.join(missing) or 'none'}")


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--features", type=Path, metavar="FILE", help="of the teacher, an .npz")
    methods = ", ".join(METHODS)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=methods
    )
    parser.add_argument(
        "--networks", nargs="+", choices=NAMES, default=["mobilefacenet"], metavar="NAME"
    )
    parser.add_argument("--epochs", type=int, choices=MILESTONES, default=3)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N")
    parser.add_argument("--table", action="store_true", help="train nothing, print the table")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. rec=SET")
    arguments = parser.parse_intermixed_args()
    if not arguments.table and arguments.features is None:
        raise InputError("--features: name the .npz of the teacher's features, or --table")
    return arguments


# --- training


def prepare(arguments: argparse.Namespace, output: Path) -> list[str]:
    """Import the teacher's features, compute its class centres; returns the values of all runs.

    Raises InputError if the output was begun with other values.
    """
    values = [*COMMON, *arguments.overrides]
    settings = dict(values=values, features=str(arguments.features.absolute()))
    path = output / "settings.json"
    if path.exists():
        if read_json(path) != settings:
            raise InputError(
                f"--output: {output} was begun with other values, see {path}; "
                "give the same, or choose another folder"
            )
        return values
    cache = output / "teacher"
    for tool, *options in (
        ("cache_teacher.py", "--from", arguments.features, "--output", cache),
        ("class_centers.py", f"teacher_embeddings={cache}", f"output={output / 'centers.pth'}"),
    ):
        command = [sys.executable, ROOT / "train" / tool, *values, *options]
        if subprocess.run(command).returncode:
            raise InputError(f"train/{tool} failed: see above")
    write_json(path, settings)
    return values


def train(job: Job, values: list[str], output: Path) -> None:
    """Train to the end, from its last state if it was begun before.

    Raises InputError if it fails or is stopped.
    """
    script, *method = METHODS[job.method].split()
    folder = output / "runs" / job.name
    command = [ROOT / f"run_{script}.sh", *values, *method]
    command += [f"network={job.network}", f"seed={job.seed}", f"output={folder}"]
    command += [f"num_epoch={job.epochs}", f"milestones={MILESTONES[job.epochs]}"]
    if script != "standalone":
        command.append(f"teacher_embeddings={output / 'teacher'}")
    if script == "AMLDistill":
        command.append(f"pretrained_teacher_header_path={output / 'centers.pth'}")
    if RunFolder(folder).complete_steps():
        command.append("--resume")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"=== {job.name}", flush=True)
    # batch size and learning rate are meant for one process
    process = subprocess.Popen(command, env=os.environ | {"NPROC_PER_NODE": "1"})
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.terminate())
    process.wait()
    if accuracies(folder) is None:
        raise InputError(f"{job.name} has not finished; the same command again goes on with it")


def accuracies(folder: Path) -> dict[str, float] | None:
    """{pair set: accuracy in %} at the end of a run, None before."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return None
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    sets = [row["validation"] for row in rows if "validation" in row]
    if not sets:
        return None
    return {name: 100 * figures["Accuracy-Flip"] for name, figures in sets[-1].items()}


# --- the table


def read_rows(output: Path) -> dict[Job, dict[str, float]]:
    """{job: {pair set: accuracy in %}} of ``results.csv``."""
    path = output / "results.csv"
    if not path.exists():
        return {}
    rows = {}
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            method, network, epochs, seed = (line.pop(key) for key in KEYS)
            figures = {name: float(value) for name, value in line.items()}
            rows[Job(method, network, int(epochs), int(seed))] = figures
    return rows


def add_row(job: Job, output: Path) -> None:
    rows = read_rows(output) | {job: accuracies(output / "runs" / job.name)}
    lines = [(*KEYS, *rows[job])]
    for other, figures in rows.items():
        lines.append((*other, *(f"{value:.3f}" for value in figures.values())))
    write_table(output / "results.csv", lines)


def table(rows: dict[Job, dict[str, float]]) -> str:
    """Markdown, a row for each method: mean ± standard deviation over its seeds, in %."""
    of_method = {}
    for job, figures in rows.items():
        of_method.setdefault((job.epochs, job.network, job.method), []).append(figures)
    sets = list(next(iter(rows.values()), []))
    heads = ["epochs", "network", "method", "seeds", *sets]
    lines = [table_line(heads), "|---" * len(heads) + "|"]
    order = list(METHODS)
    for key in sorted(of_method, key=lambda key: (*key[:2], order.index(key[2]))):
        runs = of_method[key]
        cells = [show_mean([figures[name] for figures in runs]) for name in sets]
        lines.append(table_line([*map(str, key), str(len(runs)), *cells]))
    return "\n".join(lines)


def show_mean(values: list[float]) -> str:
    mean, spread = mean_and_spread(values)
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"


if __name__ == "__main__":
    run(main)
