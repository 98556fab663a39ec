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

from eval.report.comparison_plots import GUESSING, add_legend, drawing, styles_of
from eval.report.tables import cut_middle
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
    """Panels: loss against step, how the student follows the teacher (where a run has one),
    accuracies with their deviations; one legend of the runs below.
    """
    has_teacher = any("cos_st" in row for rows in curves.values() for row in rows)
    styles = styles_of([*curves, *accuracies])
    with drawing() as Figure, replacing(path) as file:
        panels = 3 if has_teacher else 2
        figure = Figure(figsize=(5.2 * panels, 4.8), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        losses, *follows, bars = figure.subplots(1, panels)
        handles = draw_losses(losses, curves, styles)
        for axes in follows:
            draw_followers(axes, curves, styles)
        handles |= draw_accuracies(bars, accuracies, styles)
        for axes in figure.axes:
            axes.grid(alpha=0.3)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        add_legend(figure, handles)
        figure.savefig(file, format="png", dpi=110)


def draw_losses(axes, curves: dict, styles: dict) -> dict:
    """Returns {run: its line}."""
    from matplotlib.ticker import LogLocator

    lines = {}
    for name, rows in curves.items():
        color, style = styles[name]
        steps, losses = columns_of(rows, "loss")
        (lines[name],) = axes.plot(steps, losses, color=color, linestyle=style)
    axes.set_title("Training loss")
    axes.set(xlabel="training step", ylabel="loss (logarithmic)", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    # 2, 5, 10 instead of powers of ten
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    return lines


def draw_followers(axes, curves: dict, styles: dict) -> None:
    """What an AdaDistill run logs: cos_st and alpha."""
    meanings = (
        ("cos_st", "-", "solid: cos_st, cosine of the embeddings of student and teacher"),
        ("alpha", ":", "dotted: alpha, share of the old class centre that stays"),
    )
    for name, rows in curves.items():
        for key, style, _ in meanings:
            axes.plot(*columns_of(rows, key), style, color=styles[name][0])
    explanation = "\n".join(meaning for *_, meaning in meanings)
    axes.set_title(f"The student follows the teacher\n{explanation}")
    axes.set(xlabel="training step", ylabel="cos_st, alpha")


def columns_of(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the rows that have the key."""
    rows = [row for row in rows if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


def draw_accuracies(axes, accuracies: dict, styles: dict) -> dict:
    """Bars for each set, a run beside the other; returns {run: its bars}."""
    sets = all_sets(accuracies)
    width = 0.85 / len(accuracies)
    drawn = {}
    for index, (name, figures) in enumerate(accuracies.items()):
        places = [sets.index(of_set) + width * (index + 0.5) for of_set in figures]
        means, deviations = zip(*figures.values(), strict=True)
        drawn[name] = axes.bar(
            places, means, width, yerr=deviations, color=styles[name][0], capsize=2
        )
    lowest = min(mean for figures in accuracies.values() for mean, _ in figures.values())
    axes.set_ylim(min(GUESSING, lowest - 1), 101)
    axes.set_xticks(
        [place + 0.425 for place in range(len(sets))],
        # as many letters as fit side by side
        [cut_middle(name, max(6, 48 // len(sets))) for name in sets],
    )
    axes.set_title(
        "Accuracy on pairs of people whom no run was trained on\n"
        f"lines: ± standard deviation of the folds; {GUESSING} % is guessing"
    )
    axes.set(xlabel="pair set", ylabel="accuracy (%)")
    return drawn


def print_paths(folder: Path) -> None:
    print("\nWritten:")
    for path in sorted(
        path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file()
    ):
        print(f"  {path}")


if __name__ == "__main__":
    run(main)
