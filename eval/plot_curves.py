"""Show several runs side by side: a table of their accuracies and one picture of their training
curves.

    python eval/plot_curves.py output/demo --metrics output/demo/reports/summary.csv \\
        --picture output/demo/curves.png

reads metrics.jsonl of every run in the folder and the summary.csv of run_batch_eval.py; prints runs
x pair sets (accuracy ± standard deviation of the folds, in %) and the paths of everything the runs
wrote.
"""

import csv
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.command_line import command_parser
from utils.errors import InputError, run
from utils.files import printable, replacing


def main() -> None:
    parser = command_parser(__doc__, allow_abbrev=True)
    parser.add_argument("folder", type=Path, help="a folder of runs")
    parser.add_argument(
        "--metrics",
        type=Path,
        required=True,
        metavar="CSV",
        help="summary.csv of run_batch_eval.py",
    )
    parser.add_argument("--picture", type=Path, required=True, metavar="PNG")
    arguments = parser.parse_args()
    curves = read_curves(arguments.folder)
    accuracies = read_accuracies(arguments.metrics)
    draw(curves, accuracies, arguments.picture)
    print(format_table(accuracies))
    print_paths(arguments.folder)


def read_curves(folder: Path) -> dict[str, list[dict]]:
    """{run: rows of its metrics.jsonl that hold a loss}."""
    files = sorted(folder.glob("*/metrics.jsonl"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise InputError(f"no run with a metrics.jsonl in {folder.absolute()}")
    curves = {}
    for file in files:
        rows = map(json.loads, file.read_text().splitlines())
        curves[printable(file.parent.name)] = [row for row in rows if "loss" in row]
    return curves


def read_accuracies(path: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """{run: {set: (accuracy, standard deviation)}} in percent, of each run's last step (a
    checkpoint without a step counts where there is no other); the best run first.

    Raises InputError if there is no such file, or no accuracy on a pair set in it.
    """
    if not path.is_file():
        raise InputError(f"no {path.absolute()}; make it with eval/run_batch_eval.py")
    with open(path, newline="", encoding="utf-8") as file:
        # the table may be sorted by a figure
        rows = sorted(csv.DictReader(file), key=lambda row: int(row["step"] or -1))
    accuracies = {}
    for row in rows:
        sets = [
            key.removeprefix("verification.").removesuffix(".Accuracy-Flip")
            for key in row
            if key.endswith(".Accuracy-Flip") and row[key]
        ]
        if sets:
            accuracies[row["run"]] = {
                name: tuple(
                    100 * float(row[f"verification.{name}.Accuracy-{part}"])
                    for part in ("Flip", "Std")
                )
                for name in sets
            }
    if not accuracies:
        raise InputError(
            f"{path.absolute()} has no accuracy on a pair set; evaluate on some with "
            "--val-data and --val-targets"
        )
    return dict(
        sorted(
            accuracies.items(), key=lambda item: -sum(accuracy for accuracy, _ in item[1].values())
        )
    )


def format_table(accuracies: dict) -> str:
    sets = all_sets(accuracies)
    width = max(len("accuracy in %"), *map(len, accuracies))
    lines = [f"{'accuracy in %':{width}}" + "".join(f"{name:>16}" for name in sets)]
    for run_name, figures in accuracies.items():
        cells = "".join(
            f"{'{:.2f} ± {:.2f}'.format(*figures[name]) if name in figures else '':>16}"
            for name in sets
        )
        lines.append(f"{run_name:{width}}{cells}")
    return "\n".join(lines)


def all_sets(accuracies: dict) -> list[str]:
    return list(dict.fromkeys(name for figures in accuracies.values() for name in figures))


def draw(curves: dict, accuracies: dict, path: Path) -> None:
    """Three panels: loss against step, how the student follows the teacher, accuracies with their
    deviations.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    colors = {name: f"C{index}" for index, name in enumerate(curves)}
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    losses, follows, bars = figure.subplots(1, 3)
    for name, rows in curves.items():
        steps = [row["step"] for row in rows]
        losses.plot(steps, [row["loss"] for row in rows], color=colors[name], label=name)
        for key, style in (("cos_st", "-"), ("alpha", ":")):
            if rows and key in rows[0]:
                follows.plot(
                    steps,
                    [row[key] for row in rows],
                    style,
                    color=colors[name],
                    label=f"{name}: {key}",
                )
    losses.set(title="Training loss", xlabel="step", yscale="log")
    follows.set(title="cosine student-teacher and weight alpha of the old centre", xlabel="step")
    sets = all_sets(accuracies)
    for index, (name, figures) in enumerate(accuracies.items()):
        places = [sets.index(of_set) + 0.8 * (index + 0.5) / len(accuracies) for of_set in figures]
        means, deviations = zip(*figures.values(), strict=True)
        bars.bar(
            places,
            means,
            0.8 / len(accuracies),
            yerr=deviations,
            color=colors.get(name, "grey"),
            label=name,
            capsize=2,
        )
    bars.set_xticks([place + 0.4 for place in range(len(sets))], sets)
    bars.set(title="Accuracy on unseen people (%), deviation of the folds", ylim=(50, 100))
    for axes in (losses, follows, bars):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="x-small")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)


def print_paths(folder: Path) -> None:
    print("\nWritten:")
    for path in sorted(
        path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file()
    ):
        print(f"  {path}")


if __name__ == "__main__":
    run(main)
