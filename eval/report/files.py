"""The files that evaluation writes about one checkpoint and about many, by write-then-rename. How
figures are named and shown: eval/report/figure_keys.py.
"""

import csv
import math
import zipfile
from pathlib import Path

import numpy as np

from eval.bootstrap import Difference
from eval.report.comparison_plots import (
    plot_all,
    plot_differences,
    plot_headlines,
    reference_of,
)
from eval.report.figure_keys import (
    LIMITS,
    Row,
    find_metric,
    headlines,
    is_key,
    is_limit,
    is_percentage,
    label_of,
    scaled,
    show,
    show_limits,
)
from eval.report.tables import EXPLANATION, MARK
from utils.errors import InputError
from utils.files import csv_text, printable, replacing, write_text

# how to mend a report that is damaged
REMAKE = "; delete it to make it anew"
# of a difference whose interval excludes 0
SIGNIFICANT = "*"


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


def write_samples(path: Path, samples: dict[tuple[str, str], dict[str, np.ndarray]]) -> None:
    """{(kind, set): {figure: (draws,)}} by dotted keys, as ``write_metrics`` names figures."""
    flat = {
        f"{kind}.{printable(name)}.{key}": values
        for (kind, name), of_set in samples.items()
        for key, values in of_set.items()
    }
    with replacing(path) as file:
        np.savez(file, **flat)


def read_samples(path: Path) -> dict[str, np.ndarray]:
    """What ``write_samples`` wrote. Raises InputError if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return dict(content)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged ({error}){REMAKE}") from error


# --- many checkpoints


def write_summary(
    folder: Path,
    rows: list[Row],
    sort_by: str | None = None,
    differences: dict[str, dict[str, Difference]] | None = None,
) -> None:
    """``summary.csv`` (every figure), ``summary.md`` (headlines, best in bold), ``summary.png``
    (headlines, against steps where there are several), ``metrics.pdf`` (every figure so), and with
    ``differences`` ``differences.png``.

    sort_by: a figure, as ``find_metric`` understands it; the tables then have the checkpoint with
    the largest first, those without it last. differences: {row: {figure: its difference}} to one of
    the rows. Raises InputError, before anything is written, if no figure or several are meant.
    """
    columns = sorted({key for row in rows for key in row.figures})
    sort_key = find_metric(sort_by, columns) if sort_by else None
    ordered = rows
    if sort_key:
        ordered = sorted(rows, key=lambda row: -row.figures.get(sort_key, -math.inf))
    compared = sorted({key for figures in (differences or {}).values() for key in figures})
    heads = [f"difference.{key}{end}" for key in compared for end in ("", *LIMITS, ".mark")]
    lines = [("checkpoint", "run", "step", *columns, *heads)]
    for row in ordered:
        step = "" if row.step is None else row.step
        cells = [f"{row.figures[key]:.6f}" if key in row.figures else "" for key in columns]
        for key in compared:
            cells += difference_cells((differences or {}).get(row.name, {}).get(key))
        lines.append((row.name, row.run, step, *cells))
    write_table(folder / "summary.csv", lines)
    shown = list(headlines(columns)) or [key for key in columns if not is_limit(key)]
    # also the figure that the table is sorted by
    in_table = shown if sort_key in (None, *shown) else [*shown, sort_key]
    text = markdown(ordered, in_table, sort_key)
    if differences:
        text += "\n" + markdown_differences(ordered, compared, differences)
    write_text(folder / "summary.md", text)
    plot_headlines(folder / "summary.png", rows, shown)
    plot_all(folder / "metrics.pdf", rows, columns, differences)
    if differences:
        in_picture = list(headlines(compared)) or compared
        plot_differences(folder / "differences.png", rows, in_picture, differences)


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
            cell = f"**{cell}**" if cell and cell == best[key] else cell
            cells.append(cell + show_limits(key, row.figures))
        lines.append(table_line(cells))
    if any(MARK in line for line in lines):
        lines += ["", EXPLANATION]
    return "\n".join(lines) + "\n"


def difference_cells(difference: Difference | None) -> list[str]:
    """Of summary.csv: the difference, the limits of its interval, a mark if it excludes 0."""
    if difference is None:
        return ["", "", "", ""]
    mark = SIGNIFICANT if difference.excludes_zero else ""
    return [*(f"{number:.6f}" for number in difference), mark]


def markdown_differences(
    rows: list[Row], keys: list[str], differences: dict[str, dict[str, Difference]]
) -> str:
    """A table of figures x checkpoints."""
    columns = [row for row in rows if row.name in differences]
    lines = [
        f"Differences to {reference_of(rows, differences)} with 95 % intervals from the same "
        f"draws of people, rates in percentage points; {SIGNIFICANT}: the interval excludes 0.",
        "",
        table_line(["figure", *(row.name for row in columns)]),
        "|---" * (1 + len(columns)) + "|",
    ]
    for key in keys:
        cells = [show_difference(key, differences[row.name].get(key)) for row in columns]
        lines.append(table_line([label_of(key), *cells]))
    return "\n".join(lines) + "\n"


def show_difference(key: str, difference: Difference | None) -> str:
    if difference is None:
        return ""
    form = "{:+.2f}" if is_percentage(key) else "{:+.4g}"
    value, low, high = (form.format(scaled(key, number)) for number in difference)
    return f"{value} [{low}, {high}]" + (f" {SIGNIFICANT}" if difference.excludes_zero else "")


def table_line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_table(path: Path, lines) -> None:
    write_text(path, csv_text(lines))
