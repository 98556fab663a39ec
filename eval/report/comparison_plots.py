"""summary.png and metrics.pdf: the figures of many checkpoints, as lines against the step where a
run has several steps, else as bars.
"""

import math
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eval.report.tables import (
    KINDS,
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
from utils.files import replacing

# panels in a row of plots, on a page of metrics.pdf
COLUMNS, PANELS = 4, 20
# inches: width of a panel, and of the names beside bars; height of lines, of a bar, of title and
# axis between panels, of what stands above all of them, and of the last axis
WIDTH, NAMES, HEIGHT, BAR, AROUND, HEADER, ABOVE_LEGEND = 3.1, 2.4, 1.9, 0.24, 0.95, 1.15, 0.55
STYLES = ("-", "--", "-.", ":")
# letters of a name that a picture shows
MOST_LETTERS = 34
# accuracy in % of a guess at pairs, half of which are genuine
GUESSING = 50
LINES = (
    "Figures against the training step, a line for each run; dotted: a checkpoint without a step."
)
BARS = (
    "A bar for each checkpoint with its value at the right, – if it was not measured. "
    f"Accuracies begin at {GUESSING} %, which is guessing."
)


def plot_headlines(path: Path, rows: list[Row], keys: list[str]) -> None:
    """A panel for each figure on one picture."""
    with drawing() as Figure, replacing(path) as file:
        figure = plot_page(Figure, keys, rows, "Checkpoints compared")
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
        figure.savefig(file, format="png", dpi=130)


def plot_all(path: Path, rows: list[Row], keys: list[str]) -> None:
    """Every figure but the sizes of sets: pages for the pair sets, for each IJB set and for
    TinyFace.
    """
    from matplotlib.backends.backend_pdf import PdfPages

    with drawing() as Figure, replacing(path) as file, PdfPages(file) as pages:
        for title, group in group_by_page(keys).items():
            for first in range(0, len(group), PANELS):
                pages.savefig(plot_page(Figure, group[first : first + PANELS], rows, title))


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


def group_by_page(keys: list[str]) -> dict[str, list[str]]:
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


def plot_page(Figure: type, keys: list[str], rows: list[Row], title: str):
    """A figure with a panel for each key, and a legend below where there are lines."""
    lines = has_lines(rows)
    columns, lines_of_panels = min(len(keys), COLUMNS), -(-len(keys) // COLUMNS)
    names = 0.6 if lines else NAMES
    width = WIDTH * max(columns, 2) + names
    figure = Figure(figsize=(width, 1))
    handles = {}
    places = figure.add_gridspec(lines_of_panels, columns)
    for index, key in enumerate(keys):
        axes = figure.add_subplot(places[index])
        if lines:
            handles |= draw_lines(axes, key, rows)
        else:
            draw_bars(axes, key, rows, named=index % COLUMNS == 0)
        heading = "\n".join(map(cut_middle, plot_title(key)))
        # a given height spares the search for one
        axes.set_title(heading, y=1.02)
        axes.tick_params(labelsize="small")
    text = textwrap.wrap(LINES if lines else BARS, int(13 * width))
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
        for name, value in levels.items():
            drawn[name] = axes.axhline(value, color=color, linestyle=":")
    axes.set_xlabel("training step", fontsize="small")
    axes.locator_params(nbins=5)
    axes.grid(alpha=0.3)
    return drawn


def draw_bars(axes, key: str, rows: list[Row], named: bool) -> None:
    """A figure as a bar for each checkpoint, the first on top; accuracies of pairs begin at 50 %,
    which is guessing.

    named: whether the names of the checkpoints stand at the left.
    """
    start = GUESSING if is_accuracy(key) else 0
    ends = [start]
    colors = styles_of(row.run for row in rows)
    for place, row in enumerate(rows):
        value = value_of(key, row)
        text = "–"
        if math.isfinite(value):
            axes.barh(place, value - start, 0.75, left=start, color=colors[row.run][0])
            ends.append(value)
            text = f"{value:.2f}" if is_percentage(key) else f"{value:.4g}"
        # a column of its own at the right, which no bar reaches
        axes.text(
            0.99,
            place,
            text,
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize="small",
        )
    low, high = min(ends), max(ends)
    if is_percentage(key):
        high = 100
        axes.set_xticks([start, (start + high) / 2, high])
    else:
        axes.locator_params(axis="x", nbins=4)
        axes.set_xticks([tick for tick in axes.get_xticks() if low <= tick <= high])
    axes.set_xlim(low, high + 0.35 * ((high - low) or 1))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), names_of(rows) if named else [""] * len(rows))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def value_of(key: str, row: Row) -> float:
    return scaled(key, row.figures.get(key, math.nan))


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


def cut_middle(name: str, most: int = MOST_LETTERS) -> str:
    """A long name without its middle, for names of runs differ at both ends."""
    if len(name) <= most:
        return name
    behind = most // 2
    return f"{name[: most - behind - 1]}…{name[-behind:]}"


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
