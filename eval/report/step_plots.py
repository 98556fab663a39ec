"""summary.png and metrics.pdf: the figures of many checkpoints against the step, a line per run."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eval.report.tables import (
    KINDS,
    Row,
    is_count,
    is_percentage,
    kind_of,
    label_of,
    scaled,
    set_of,
)
from utils.files import replacing

# panels in a row of plots, on a page of metrics.pdf
COLUMNS, PANELS = 5, 20
STYLES = ("-", "--", "-.", ":")
# of the panels on a page, fixed: an automatic layout takes twice the time
PLACES = dict(left=0.04, right=0.99, top=0.9, bottom=0.09, hspace=0.5, wspace=0.25)


def plot_headlines(path: Path, rows: list[Row], keys: list[str]) -> None:
    """A panel per figure, a line per run; a checkpoint without a step is a dotted level."""
    height, width = -(-len(keys) // COLUMNS), min(len(keys), COLUMNS)
    with drawing() as Figure, replacing(path) as file:
        figure = Figure(figsize=(3.6 * max(width, 2), 3.2 * height + 0.6), layout="constrained")
        handles = {}
        for key, place in zip(keys, figure.add_gridspec(height, width), strict=False):
            handles |= draw(figure.add_subplot(place), key, label_of(key), rows)
        add_legend(figure, handles, loc="outside lower center", ncols=4)
        figure.savefig(file, format="png", dpi=120)


def plot_all(path: Path, rows: list[Row], keys: list[str]) -> None:
    """Every figure but the sizes of sets against the step: pages for the pair sets, for each IJB
    set and for TinyFace.
    """
    from matplotlib.backends.backend_pdf import PdfPages

    with drawing() as Figure, replacing(path) as file, PdfPages(file) as pages:
        for title, group in group_by_page(keys).items():
            for first in range(0, len(group), PANELS):
                figure = Figure(figsize=(15, 10.6))
                places = figure.add_gridspec(PANELS // COLUMNS, COLUMNS, **PLACES)
                handles = {}
                for key, place in zip(group[first : first + PANELS], places, strict=False):
                    axes = figure.add_subplot(place)
                    handles |= draw(axes, key, key.removeprefix(f"{title}."), rows)
                figure.suptitle(title, x=0.04, ha="left")
                add_legend(figure, handles, loc="lower center", ncols=6)
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


def add_legend(figure, handles: dict, **options) -> None:
    figure.legend(handles.values(), handles, fontsize="small", frameon=False, **options)


def group_by_page(keys: list[str]) -> dict[str, list[str]]:
    """{title: keys}, by kind, each IJB set for itself; numbers in keys rise as numbers."""
    groups = {}
    for key in sorted(keys, key=lambda key: (KINDS.index(kind_of(key)), numbers_as_numbers(key))):
        if is_count(key):
            continue
        title = set_of(key) if kind_of(key) == "ijb" else kind_of(key)
        groups.setdefault(title, []).append(key)
    return groups


def numbers_as_numbers(text: str) -> list[str | float]:
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", text)
    return [float(part) if place % 2 else part for place, part in enumerate(parts)]


def draw(axes, key: str, title: str, rows: list[Row]) -> dict:
    """A figure against the step, a line per run, a dotted level for a checkpoint without one.

    Returns {label: what was drawn}.
    """
    drawn = {}
    for index, run in enumerate(dict.fromkeys(row.run for row in rows)):
        color, style = f"C{index % 10}", STYLES[index // 10 % len(STYLES)]
        points, levels = [], {}
        for row in rows:
            value = scaled(key, row.figures.get(key, math.nan))
            if row.run != run or not math.isfinite(value):
                continue
            if row.step is None:
                levels[row.name] = value
            else:
                points.append((row.step, value))
        if points:
            steps, values = zip(*sorted(points), strict=True)
            (drawn[run],) = axes.plot(
                steps, values, color=color, linestyle=style, marker="o", markersize=3
            )
        for name, value in levels.items():
            drawn[name] = axes.axhline(value, color=color, linestyle=":")
    # a given height spares the search for one
    axes.set_title(f"{title} (%)" if is_percentage(key) else title, fontsize="small", y=1.02)
    axes.set_xlabel("step", fontsize="x-small")
    axes.tick_params(labelsize="x-small")
    axes.locator_params(nbins=5)
    axes.grid(alpha=0.3)
    return drawn
