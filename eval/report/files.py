"""The files that evaluation writes about one checkpoint and about many, by write-then-rename. How
figures are named and shown: eval/report/tables.py.
"""

import csv
import io
import math
from pathlib import Path

from eval.report.comparison_plots import plot_all, plot_headlines
from eval.report.tables import (
    EXPLANATION,
    MARK,
    Row,
    find_metric,
    headlines,
    is_key,
    label_of,
    show,
)
from utils.errors import InputError
from utils.files import write_text

# how to mend a report that is damaged
REMAKE = "; delete it to make it anew"


def format_skipped(skipped: dict[Path, str]) -> str:
    """A line for each set that the configuration names and that was not found."""
    return "".join(f"skipped {name}: no {path}\n" for path, name in skipped.items())


# --- one checkpoint


def write_metrics(path: Path, figures: dict[str, float]) -> None:
    """``metric,value`` with dotted keys, sorted, 6 decimals."""
    lines = [(key, f"{value:.6f}") for key, value in sorted(figures.items())]
    write_table(path, [("metric", "value"), *lines])


def read_metrics(path: Path) -> dict[str, float]:
    """The figures that ``write_metrics`` wrote.

    Raises InputError naming the file and the line if it is damaged, or has no figures.
    """
    figures = {}
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            expected = "metric,value" if number == 1 else "a metric and a number"
            if number == 1 and line.strip() == expected:
                continue
            metric = parse_metric(line)
            if number == 1 or metric is None:
                raise InputError(
                    f"{path}: line {number} is not {expected}; delete the file to make it anew"
                )
            key, value = metric
            figures[key] = value
    if not figures:
        raise InputError(f"{path}: no figures; delete the file to make it anew")
    return figures


def parse_metric(line: str) -> tuple[str, float] | None:
    """(key, value) of a line, None if it is anything else; a threshold above all scores is
    infinite.
    """
    try:
        key, text = next(csv.reader([line]), ())
        value = float(text)
    except (csv.Error, ValueError):
        return None
    if not is_key(key) or math.isnan(value):
        return None
    return key, value


# --- many checkpoints


def write_summary(folder: Path, rows: list[Row], sort_by: str | None = None) -> None:
    """``summary.csv`` (every figure), ``summary.md`` (headlines, best in bold), ``summary.png``
    (headlines against steps), ``metrics.pdf`` (every figure against steps).

    sort_by: a figure, as ``tables.find_metric`` understands it; the tables then have the checkpoint
    with the largest first, those without it last. Raises InputError, before anything is written,
    if no figure or several are meant.
    """
    columns = sorted({key for row in rows for key in row.figures})
    sort_key = find_metric(sort_by, columns) if sort_by else None
    ordered = rows
    if sort_key:
        ordered = sorted(rows, key=lambda row: -row.figures.get(sort_key, -math.inf))
    lines = [("checkpoint", "run", "step", *columns)]
    for row in ordered:
        step = "" if row.step is None else row.step
        cells = [f"{row.figures[key]:.6f}" if key in row.figures else "" for key in columns]
        lines.append((row.name, row.run, step, *cells))
    write_table(folder / "summary.csv", lines)
    shown = list(headlines(columns)) or columns
    # also the figure that the table is sorted by
    in_table = shown if sort_key in (None, *shown) else [*shown, sort_key]
    write_text(folder / "summary.md", markdown(ordered, in_table, sort_key))
    plot_headlines(folder / "summary.png", rows, shown)
    plot_all(folder / "metrics.pdf", rows, columns)


def markdown(rows: list[Row], keys: list[str], sorted_by: str | None = None) -> str:
    """A table of checkpoints x figures, rates in percent, the best of each column in bold."""
    best = {
        key: show(key, max(rows, key=lambda row: row.figures.get(key, -math.inf)).figures)
        for key in keys
    }
    order = f"; sorted by {label_of(sorted_by)}" if sorted_by else ""
    lines = [
        f"Rates in %, the best of each column in bold{order}.",
        "",
        table_line(["checkpoint", *map(label_of, keys)]),
        "|---" * (1 + len(keys)) + "|",
    ]
    for row in rows:
        cells = [row.name]
        for key in keys:
            cell = show(key, row.figures)
            cells.append(f"**{cell}**" if cell and cell == best[key] else cell)
        lines.append(table_line(cells))
    if any(MARK in line for line in lines):
        lines += ["", EXPLANATION]
    return "\n".join(lines) + "\n"


def table_line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_table(path: Path, lines) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_text(path, text.getvalue())
