"""summary.png, differences.png and metrics.pdf: the figures of many checkpoints, as lines against
the step where a run has several steps, else as bars; their differences as a forest plot.
"""

import math
import re
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from eval.bootstrap import Difference
from eval.report.figure_keys import (
    KINDS,
    LIMITS,
    Row,
    is_accuracy,
    is_count,
    is_limit,
    is_percentage,
    kind_of,
    plot_title,
    scaled,
    set_of,
)
from eval.report.tables import cut_middle
from utils.files import replacing

# panels in a row of plots, on a page of metrics.pdf
COLUMNS, PANELS = 4, 20
# inches: width of a panel, and of the names beside bars; height of lines, of a bar, of title and
# axis between panels, of what stands above all of them, and of the last axis
WIDTH, NAMES, HEIGHT, BAR, AROUND, HEADER, ABOVE_LEGEND = 3.1, 2.4, 1.9, 0.24, 0.95, 1.15, 0.55
STYLES = ("-", "--", "-.", ":")
# letters above a panel: the longest of IJB's figures
MOST_LETTERS = 41
# accuracy in % of a guess at pairs, half of which are genuine
GUESSING = 50
LINES = (
    "Figures against the training step, a line for each run; dotted: a checkpoint without a step."
)
BARS = (
    "A bar for each checkpoint with its value at the right, – if it was not measured. "
    f"Accuracies begin at {GUESSING} %, which is guessing."
)
INTERVALS = " Thin lines: 95 % intervals."
FOREST = (
    "How far a checkpoint lies above it, with the 95 % interval of the difference; rates in "
    "percentage points. Filled: the interval excludes 0. Hollow: the difference may be chance."
)

Differences = dict[str, dict[str, Difference]]


def plot_headlines(path: Path, rows: list[Row], keys: list[str]) -> None:
    """A panel for each figure on one picture."""
    save_picture(path, keys, rows, "Checkpoints compared")


def plot_differences(
    path: Path, rows: list[Row], keys: list[str], differences: Differences
) -> None:
    """A forest plot for each figure on one picture; ``differences``: {row: {figure: its difference
    to that of the row that is not there}}.
    """
    title = f"Differences to {reference_of(rows, differences)}"
    save_picture(path, keys, rows, title, differences)


def save_picture(path: Path, *page) -> None:
    with drawing() as Figure, replacing(path) as file:
        figure = plot_page(Figure, *page)
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
        figure.savefig(file, format="png", dpi=130)


def plot_all(
    path: Path, rows: list[Row], keys: list[str], differences: Differences | None = None
) -> None:
    """Every figure but the sizes of sets: pages for the pair sets, for each IJB set and for
    TinyFace, then, if there are any, pages of the differences.
    """
    from matplotlib.backends.backend_pdf import PdfPages

    pages = [(part, rows, title) for title, part in split_into_pages(keys)]
    if differences:
        compared = {key for figures in differences.values() for key in figures}
        heading = f"differences to {reference_of(rows, differences)}"
        pages += [
            (part, rows, f"{title}: {heading}", differences)
            for title, part in split_into_pages(compared)
        ]
    with drawing() as Figure, replacing(path) as file, PdfPages(file) as pdf:
        for page in pages:
            pdf.savefig(plot_page(Figure, *page))


def reference_of(rows: list[Row], differences: Differences) -> str:
    """The checkpoint that the others are compared with."""
    return next(row.name for row in rows if row.name not in differences)


def split_into_pages(keys: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (title, keys) of every page."""
    for title, group in group_by_page(keys).items():
        for first in range(0, len(group), PANELS):
            yield title, group[first : first + PANELS]


@contextmanager
def drawing() -> Iterator[type]:
    """Matplotlib's Figure, not pyplot: no display, no global state.

    A $ in the name of a run is no formula.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "text.parse_math": False,
        "font.size": 9,
        "axes.titlesize": "medium",
        "axes.titlelocation": "left",
    }
    with rc_context(style):
        yield Figure


def group_by_page(keys: Iterable[str]) -> dict[str, list[str]]:
    """{title: keys}, by kind, each IJB set for itself; numbers in keys rise as numbers."""
    groups = {}
    for key in sorted(keys, key=lambda key: (KINDS.index(kind_of(key)), numbers_as_numbers(key))):
        if is_count(key) or is_limit(key):
            continue
        title = set_of(key) if kind_of(key) == "ijb" else kind_of(key)
        groups.setdefault(title, []).append(key)
    return groups


def numbers_as_numbers(text: str) -> list[str | float]:
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", text)
    return [float(part) if place % 2 else part for place, part in enumerate(parts)]


def plot_page(
    Figure: type,
    keys: list[str],
    rows: list[Row],
    title: str,
    differences: Differences | None = None,
):
    """A figure with a panel for each key, and a legend below where there are lines."""
    lines = differences is None and has_lines(rows)
    text, draw = BARS, draw_bars
    if lines:
        text, draw = LINES, draw_lines
    elif differences is not None:
        rows = [row for row in rows if row.name in differences]
        text, draw = FOREST, partial(draw_forest, differences=differences)
    if differences is None and any(math.isfinite(low) for low, _ in all_limits(keys, rows)):
        text += INTERVALS
    columns, lines_of_panels = min(len(keys), COLUMNS), -(-len(keys) // COLUMNS)
    names = 0.6 if lines else NAMES
    width = WIDTH * max(columns, 2) + names
    figure = Figure(figsize=(width, 1))
    handles = {}
    places = figure.add_gridspec(lines_of_panels, columns)
    for index, key in enumerate(keys):
        axes = figure.add_subplot(places[index])
        handles |= draw(axes, key, rows)
        # names of checkpoints stand at the left alone
        axes.tick_params(labelsize="small", labelleft=lines or index % COLUMNS == 0)
        heading = "\n".join(cut_middle(line, MOST_LETTERS) for line in plot_title(key))
        # a given height spares the search for one
        axes.set_title(heading, y=1.02)
    text = textwrap.wrap(text, int(13 * width))
    figure.suptitle("\n".join([title, *text]), x=0.01, ha="left", fontsize="medium")
    below = ABOVE_LEGEND + add_legend(figure, handles)
    panel = HEIGHT if lines else BAR * len(rows)
    height = HEADER + (panel + AROUND) * lines_of_panels - AROUND + below
    figure.set_figheight(height)
    # fixed: an automatic layout of metrics.pdf would take twice the time
    figure.subplots_adjust(
        left=names / width,
        right=1 - 0.2 / width,
        top=1 - HEADER / height,
        bottom=below / height,
        hspace=AROUND / panel,
        wspace=0.25,
    )
    return figure


def has_lines(rows: list[Row]) -> bool:
    """Whether a run has several steps: single points without a line say nothing."""
    first_steps = {}
    for row in rows:
        if row.step is not None and first_steps.setdefault(row.run, row.step) != row.step:
            return True
    return False


def draw_lines(axes, key: str, rows: list[Row]) -> dict:
    """A figure against the step, a line per run, a dotted level for a checkpoint without one.

    Returns {label: what was drawn}.
    """
    drawn = {}
    for run, (color, style) in styles_of(row.run for row in rows).items():
        points, levels = [], {}
        for row in rows:
            value = value_of(key, row)
            if row.run != run or not math.isfinite(value):
                continue
            if row.step is None:
                levels[row.name] = value
            else:
                points.append((row.step, value))
        if points:
            steps, values = zip(*sorted(points), strict=True)
            # a single point is a large ring, which hides none below it
            point = dict(markersize=3) if len(points) > 1 else dict(markersize=7, fillstyle="none")
            (drawn[run],) = axes.plot(
                steps, values, color=color, linestyle=style, marker="o", **point
            )
            for row in rows:
                if row.run == run and row.step is not None:
                    axes.vlines(row.step, *limits_of(key, row), color=color, linewidth=0.8)
        for name, value in levels.items():
            drawn[name] = axes.axhline(value, color=color, linestyle=":")
    axes.set_xlabel("training step", fontsize="small")
    axes.locator_params(nbins=5)
    axes.grid(alpha=0.3)
    return drawn


def draw_bars(axes, key: str, rows: list[Row]) -> dict:
    """A figure as a bar for each checkpoint, the first on top; accuracies of pairs begin at 50 %,
    which is guessing.
    """
    start = GUESSING if is_accuracy(key) else 0
    ends, texts = [start], []
    colors = styles_of(row.run for row in rows)
    for place, row in enumerate(rows):
        value = value_of(key, row)
        texts.append("–")
        if math.isfinite(value):
            axes.barh(place, value - start, 0.75, left=start, color=colors[row.run][0])
            axes.hlines(place, *limits_of(key, row), color="black", linewidth=1)
            texts[-1] = f"{value:.2f}" if is_percentage(key) else f"{value:.4g}"
            ends += [value, *filter(math.isfinite, limits_of(key, row))]
    low, high, ticks = min(ends), max(ends), None
    if is_percentage(key):
        high = 100
        ticks = [start, (start + high) / 2, high]
    set_rows(axes, rows, texts, low, high, ticks)
    return {}


def draw_forest(axes, key: str, rows: list[Row], differences: Differences) -> dict:
    """The difference of each checkpoint and its interval, around a line at 0."""
    ends, texts = [0.0], []
    axes.axvline(0, color="#555555", linewidth=0.8)
    for place, row in enumerate(rows):
        difference = differences[row.name].get(key)
        if difference is None:
            texts.append("–")
            continue
        value, low, high = (scaled(key, number) for number in difference)
        face = "C0" if difference.excludes_zero else "white"
        if math.isfinite(low) and math.isfinite(high):
            axes.hlines(place, low, high, color="C0", linewidth=1.2)
        axes.plot(value, place, marker="o", color="C0", markerfacecolor=face, markersize=6)
        texts.append(f"{value:+.2f}" if is_percentage(key) else f"{value:+.4g}")
        # a threshold can have no limit
        ends += filter(math.isfinite, (value, low, high))
    room = 0.05 * (max(ends) - min(ends) or 1)
    set_rows(axes, rows, texts, min(ends) - room, max(ends) + room)
    return {}


def set_rows(
    axes, rows: list[Row], texts: list[str], low: float, high: float, ticks: list | None = None
) -> None:
    """A line for each checkpoint between ``low`` and ``high``, its name at the left and a text at
    the right, in a column of its own.
    """
    for place, text in enumerate(texts):
        column = dict(transform=axes.get_yaxis_transform(), ha="right", va="center")
        axes.text(0.99, place, text, fontsize="small", **column)
    axes.set_xlim(low, high + 0.4 * ((high - low) or 1))
    if ticks is None:
        axes.locator_params(axis="x", nbins=4)
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    axes.set_xticks(ticks)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), names_of(rows))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def value_of(key: str, row: Row) -> float:
    return scaled(key, row.figures.get(key, math.nan))


def limits_of(key: str, row: Row) -> tuple[float, float]:
    """Of the figure's interval, NaN if it has none."""
    low, high = (scaled(key, row.figures.get(key + end, math.nan)) for end in LIMITS)
    return low, high


def all_limits(keys: list[str], rows: list[Row]) -> Iterator[tuple[float, float]]:
    return (limits_of(key, row) for key in keys for row in rows)


def styles_of(runs) -> dict[str, tuple[str, str]]:
    """{run: (color, line style)}."""
    return {
        run: (f"C{index % 10}", STYLES[index // 10 % len(STYLES)])
        for index, run in enumerate(dict.fromkeys(runs))
    }


def names_of(rows: list[Row]) -> list[str]:
    """What tells the checkpoints apart: their runs, if each has one checkpoint."""
    runs = {row.run for row in rows}
    return [cut_middle(row.run if len(runs) == len(rows) else row.name) for row in rows]


def add_legend(figure, handles: dict) -> float:
    """Names below the panels, in as many columns as fit side by side; returns their height in
    inches.
    """
    if not handles:
        return 0
    labels = [cut_middle(label) for label in handles]
    # inches: a letter at this size, and the line before it
    column = 0.075 * max(map(len, labels)) + 0.6
    columns = max(1, min(len(labels), int(figure.get_figwidth() / column)))
    figure.legend(
        handles.values(),
        labels,
        loc="outside lower center",
        ncols=columns,
        fontsize="small",
        frameon=False,
    )
    return 0.1 + 0.16 * -(-len(labels) // columns)
