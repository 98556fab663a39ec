"""What evaluation writes and prints: JSON, CSV, a Markdown table and a plot; all files by write-then-rename.

A "result" is the dict of ``Evaluator.evaluate_checkpoint``; flat, its keys are dotted: ``verification.lfw.Accuracy-Flip``.
"""

import csv
import io
import json
from pathlib import Path
from typing import NamedTuple

from utils.errors import InputError
from utils.recordio import replacing

HEADLINE = ".Accuracy-Flip"     # the figure of a set that summaries show


class Row(NamedTuple):
    """One evaluated checkpoint. step: None for one without a number, such as best_backbone.pth."""

    name: str
    run: str
    step: int | None
    figures: dict[str, float]


def flatten(results: dict) -> dict[str, float]:
    """Nested figures with dotted keys, sorted."""
    flat = {}
    for key, value in results.items():
        flat |= {f"{key}.{inner}": figure for inner, figure in flatten(value).items()} if isinstance(value, dict) else {key: value}
    return dict(sorted(flat.items()))


def format_verification(results: dict) -> str:
    """A table for the terminal: pair sets x accuracy and feature norm."""
    width = max(len("pair set"), *map(len, results["verification"]))
    lines = [f"{'pair set':{width}}  Accuracy-Flip ± Std (%)    XNorm"]
    for name, figures in results["verification"].items():
        lines.append(f"{name:{width}}  {100 * figures['Accuracy-Flip']:13.2f} ± {100 * figures['Accuracy-Std']:4.2f}    {figures['XNorm']:8.4g}")
    return "\n".join(lines)


def format_skipped(skipped: dict[Path, str]) -> str:
    """A line for each set that the configuration names and that was not found."""
    return "".join(f"skipped {name}: no {path}\n" for path, name in skipped.items())


def prepare_folder(path: Path, flag: str) -> None:
    """Make the folder that a flag names. Errors: InputError if it is none and cannot become one."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag}: {path.absolute()} is no folder and cannot become one: {error.strerror}") from error


def write_json(path: Path, results: dict) -> None:
    write(path, json.dumps(results, indent=2) + "\n")


def write_metrics(path: Path, figures: dict[str, float]) -> None:
    """``metric,value`` with dotted keys, sorted, 6 decimals."""
    write_table(path, [("metric", "value"), *((key, f"{value:.6f}") for key, value in sorted(figures.items()))])


def write_summary(folder: Path, rows: list[Row]) -> None:
    """``summary.csv`` (every figure), ``summary.md`` (accuracies, best in bold) and ``summary.png`` (accuracies against steps)."""
    columns = sorted({key for row in rows for key in row.figures})
    write_table(folder / "summary.csv", [("checkpoint", "run", "step", *columns), *(
        (row.name, row.run, "" if row.step is None else row.step, *(f"{row.figures[key]:.6f}" if key in row.figures else "" for key in columns)) for row in rows)])
    headlines = [key for key in columns if key.endswith(HEADLINE)]
    write(folder / "summary.md", markdown(rows, headlines))
    plot(folder / "summary.png", rows, headlines)


def markdown(rows: list[Row], keys: list[str]) -> str:
    """A table of checkpoints x sets in percent, the best of each column in bold."""
    best = {key: percent(max(rows, key=lambda row: row.figures.get(key, -1.0)), key) for key in keys}
    lines = ["Accuracy-Flip in %, the best of each column in bold.", "", "| " + " | ".join(["checkpoint", *map(set_name, keys)]) + " |", "|---" * (1 + len(keys)) + "|"]
    for row in rows:
        cells = [percent(row, key) for key in keys]
        cells = [f"**{cell}**" if cell == best[key] else cell for key, cell in zip(keys, cells)]
        lines.append("| " + " | ".join([row.name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def percent(row: Row, key: str) -> str:
    return f"{100 * row.figures[key]:.2f}" if key in row.figures else ""


def set_name(key: str) -> str:
    return key.split(".", 1)[1].removesuffix(HEADLINE)


def plot(path: Path, rows: list[Row], keys: list[str]) -> None:
    """A panel per set, a line per run; a checkpoint without a step is a dotted level."""
    from matplotlib.figure import Figure        # not pyplot: no display, no global state

    figure = Figure(figsize=(4.5 * len(keys), 3.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        for index, run in enumerate(dict.fromkeys(row.run for row in rows)):
            of_run = [row for row in rows if row.run == run and key in row.figures]
            points = [(row.step, 100 * row.figures[key]) for row in of_run if row.step is not None]
            axes.plot(*zip(*points), marker="o", markersize=3, color=f"C{index}", label=run) if points else None
            for row in of_run:
                if row.step is None:
                    axes.axhline(100 * row.figures[key], linestyle=":", color=f"C{index}", label=row.name)
        axes.set(title=set_name(key), xlabel="step", ylabel="Accuracy-Flip (%)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def write_table(path: Path, lines) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write(path, text.getvalue())


def write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
