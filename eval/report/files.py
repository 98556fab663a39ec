"""The files that evaluation writes: JSON and CSV of one checkpoint; CSV, a Markdown table and plots
of many. All by write-then-rename.

eval/report/tables.py says how figures are named and shown, eval/report/html_report.py writes the page of one checkpoint.
"""

import csv
import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

from eval.report.tables import (
    EXPLANATION,
    KINDS,
    MARK,
    find_metric,
    headlines,
    is_count,
    is_key,
    is_percentage,
    kind_of,
    label_of,
    scaled,
    set_of,
    show,
)
from utils.errors import InputError
from utils.files import replacing, write_text

# how to mend a report that is damaged
REMAKE = "; delete it to make it anew"
COLUMNS, PANELS = 5, 20  # panels in a row of plots, on a page of metrics.pdf
STYLES = ("-", "--", "-.", ":")


class Row(NamedTuple):
    """One evaluated checkpoint. step: None for one without a number, such as best_backbone.pth."""

    name: str
    run: str
    step: int | None
    figures: dict[str, float]


def format_skipped(skipped: dict[Path, str]) -> str:
    """A line for each set that the configuration names and that was not found."""
    return "".join(f"skipped {name}: no {path}\n" for path, name in skipped.items())


def prepare_folder(path: Path, flag: str) -> None:
    """Make the folder that a flag names.

    Raises InputError if it is none and cannot become one, or nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{flag}: {path.absolute()} is no folder and cannot become one: {error.strerror}"
        ) from error
    try:
        TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(
            f"{flag}: nothing can be written to {path.absolute()}: {error.strerror}"
        ) from error


def prepare_file(path: Path, flag: str) -> None:
    """Make the folder of the file that a flag names.

    Raises InputError as ``prepare_folder`` does, and if the path is a folder.
    """
    if path.is_dir():
        raise InputError(f"{flag}: {path.absolute()} is a folder; name a file")
    prepare_folder(path.absolute().parent, flag)


# --- one checkpoint


def write_metrics(path: Path, figures: dict[str, float]) -> None:
    """``metric,value`` with dotted keys, sorted, 6 decimals."""
    write_table(
        path,
        [("metric", "value"), *((key, f"{value:.6f}") for key, value in sorted(figures.items()))],
    )


def read_metrics(path: Path) -> dict[str, float]:
    """The figures that ``write_metrics`` wrote.

    Raises InputError naming the file and the line if it is damaged, or has no figures.
    """
    figures = {}
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.strip() == "metric,value":
                continue
            found = parse_metric(line)
            if number == 1 or found is None:
                raise InputError(
                    f"{path}: line {number} is not "
                    f"{'metric,value' if number == 1 else 'a metric and a number'}; delete the "
                    "file to make it anew"
                )
            figures[found[0]] = found[1]
    if not figures:
        raise InputError(f"{path}: no figures; delete the file to make it anew")
    return figures


def parse_metric(line: str) -> tuple[str, float] | None:
    try:
        key, value = next(csv.reader([line]), ())
        # a threshold above all scores is infinite
        return (key, float(value)) if is_key(key) and not math.isnan(float(value)) else None
    except (csv.Error, ValueError):
        return None


# --- many checkpoints


def write_summary(folder: Path, rows: list[Row], sort_by: str | None = None) -> None:
    """``summary.csv`` (every figure), ``summary.md`` (headlines, best in bold), ``summary.png``
    (headlines against steps), ``metrics.pdf`` (every figure against steps).

    sort_by: a figure, as ``tables.find_metric`` understands it; the tables then have the checkpoint
    with the largest first, those without it last. Raises InputError, before anything is written,
    if no figure or several are meant.
    """
    columns = sorted({key for row in rows for key in row.figures})
    chosen = find_metric(sort_by, columns) if sort_by else None
    ordered = sorted(rows, key=lambda row: -row.figures.get(chosen, -math.inf)) if chosen else rows
    write_table(
        folder / "summary.csv",
        [
            ("checkpoint", "run", "step", *columns),
            *(
                (
                    row.name,
                    row.run,
                    "" if row.step is None else row.step,
                    *(f"{row.figures[key]:.6f}" if key in row.figures else "" for key in columns),
                )
                for row in ordered
            ),
        ],
    )
    shown = list(headlines(columns)) or columns
    write_text(
        folder / "summary.md",
        markdown(ordered, shown if chosen in (None, *shown) else [*shown, chosen], chosen),
    )
    plot_headlines(folder / "summary.png", rows, shown)
    plot_all(folder / "metrics.pdf", rows, columns)


def markdown(rows: list[Row], keys: list[str], sorted_by: str | None = None) -> str:
    """A table of checkpoints x figures, rates in percent, the best of each column in bold."""
    best = {
        key: show(key, max(rows, key=lambda row: row.figures.get(key, -math.inf)).figures)
        for key in keys
    }
    lines = [
        "Rates in %, the best of each column in "
        f"bold{f'; sorted by {label_of(sorted_by)}' if sorted_by else ''}.",
        "",
        table_line(["checkpoint", *map(label_of, keys)]),
        "|---" * (1 + len(keys)) + "|",
    ]
    for row in rows:
        cells = [show(key, row.figures) for key in keys]
        lines.append(
            table_line(
                [
                    row.name,
                    *(
                        f"**{cell}**" if cell and cell == best[key] else cell
                        for key, cell in zip(keys, cells, strict=True)
                    ),
                ]
            )
        )
    lines += ["", EXPLANATION] if any(MARK in line for line in lines) else []
    return "\n".join(lines) + "\n"


def table_line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def plot_headlines(path: Path, rows: list[Row], keys: list[str]) -> None:
    """A panel per figure, a line per run; a checkpoint without a step is a dotted level."""
    with drawing() as Figure, replacing(path) as file:
        height, width = -(-len(keys) // COLUMNS), min(len(keys), COLUMNS)
        figure = Figure(figsize=(3.6 * max(width, 2), 3.2 * height + 0.6), layout="constrained")
        handles = {}
        for key, place in zip(keys, figure.add_gridspec(height, width), strict=False):
            handles |= draw(figure.add_subplot(place), key, label_of(key), rows)
        figure.legend(
            handles.values(),
            handles,
            loc="outside lower center",
            ncols=4,
            fontsize="small",
            frameon=False,
        )
        figure.savefig(file, format="png", dpi=120)


def plot_all(path: Path, rows: list[Row], keys: list[str]) -> None:
    """Every figure but the sizes of sets against the step: pages for the pair sets, for each IJB
    set and for TinyFace.
    """
    from matplotlib.backends.backend_pdf import PdfPages

    with drawing() as Figure, replacing(path) as file, PdfPages(file) as pages:
        for title, group in group_by_page(keys).items():
            for first in range(0, len(group), PANELS):
                figure, handles = Figure(figsize=(15, 10.6)), {}
                # fixed places: an automatic layout takes twice the time
                places = figure.add_gridspec(
                    PANELS // COLUMNS,
                    COLUMNS,
                    left=0.04,
                    right=0.99,
                    top=0.9,
                    bottom=0.09,
                    hspace=0.5,
                    wspace=0.25,
                )
                for key, place in zip(group[first : first + PANELS], places, strict=False):
                    handles |= draw(
                        figure.add_subplot(place), key, key.removeprefix(f"{title}."), rows
                    )
                figure.suptitle(title, x=0.04, ha="left")
                figure.legend(
                    handles.values(),
                    handles,
                    loc="lower center",
                    ncols=6,
                    fontsize="small",
                    frameon=False,
                )
                pages.savefig(figure)


@contextmanager
def drawing() -> Iterator[type]:
    """Matplotlib's Figure, not pyplot: no display, no global state.

    A $ in the name of a run is no formula.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):
        yield Figure


def group_by_page(keys: list[str]) -> dict[str, list[str]]:
    """{title: keys}, by kind, each IJB set for itself; numbers in keys rise as numbers."""
    groups = {}
    for key in sorted(keys, key=lambda key: (KINDS.index(kind_of(key)), numbers_as_numbers(key))):
        if not is_count(key):
            groups.setdefault(set_of(key) if kind_of(key) == "ijb" else kind_of(key), []).append(
                key
            )
    return groups


def numbers_as_numbers(text: str) -> list[str | float]:
    return [
        float(part) if place % 2 else part
        for place, part in enumerate(re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", text))
    ]


def draw(axes, key: str, title: str, rows: list[Row]) -> dict:
    """A figure against the step, a line per run, a dotted level for a checkpoint without one.

    Returns {label: what was drawn}.
    """
    drawn = {}
    for index, run in enumerate(dict.fromkeys(row.run for row in rows)):
        look = dict(color=f"C{index % 10}", linestyle=STYLES[index // 10 % len(STYLES)])
        of_run = [
            (row, scaled(key, row.figures[key]))
            for row in rows
            if row.run == run and math.isfinite(row.figures.get(key, math.nan))
        ]
        points = sorted((row.step, value) for row, value in of_run if row.step is not None)
        if points:
            (drawn[run],) = axes.plot(*zip(*points, strict=True), marker="o", markersize=3, **look)
        drawn |= {
            row.name: axes.axhline(value, color=look["color"], linestyle=":")
            for row, value in of_run
            if row.step is None
        }
    # a given height spares the search for one
    axes.set_title(f"{title} (%)" if is_percentage(key) else title, fontsize="small", y=1.02)
    axes.set_xlabel("step", fontsize="x-small")
    axes.tick_params(labelsize="x-small")
    axes.locator_params(nbins=5)
    axes.grid(alpha=0.3)
    return drawn


def write_table(path: Path, lines) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_text(path, text.getvalue())
