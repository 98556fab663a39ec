"""Figures by group of people as tables; what results hold about them: eval/groups.py."""

import math
import re

from eval.report.figure_keys import (
    LIMITS,
    flatten,
    headlines,
    is_limit,
    plot_title,
    scaled,
    show,
    show_limits,
)
from eval.report.tables import Table, cut_middle
from utils.files import printable

# of these and the headlines a table is shown at once, of the others behind a click
SHOWN = re.compile(r".+\.(genuine_pairs|impostor_pairs|probes|eer|fn?mr_at_common_threshold)")
# of the name of a group at the head of a column
MOST_LETTERS = 20


def tabulate_groups(results: dict) -> list[Table]:
    """Two tables for each set: the figures that matter most, and all of them."""
    tables = []
    for kind, sets in results.get("groups", {}).items():
        for name, comparison in sets.items():
            figures = figures_of_groups(kind, name, comparison)
            keys = list(dict.fromkeys(key for of_group in figures.values() for key in of_group))
            keys = [key for key in keys if not is_limit(key)]
            first = [key for key in keys if is_shown(key)]
            about = (f"{kind}.{printable(name)}", figures, comparison["worst"])
            title = f"{name} by group"
            tables.append(table_of(title, first, *about, remark=describe_ratio(comparison)))
            tables.append(table_of(f"{title}: every figure", keys, *about, minor=True))
    return tables


def figures_of_groups(kind: str, name: str, comparison: dict) -> dict[str, dict[str, float]]:
    """{group: {dotted key: figure}}."""
    return {
        group: flatten({kind: {name: figures}}) for group, figures in comparison["by_group"].items()
    }


def is_shown(key: str) -> bool:
    return bool(headlines([key]) or SHOWN.fullmatch(key))


def name_of(key: str) -> str:
    """EER (%) for verification.lfw.eer."""
    figure = plot_title(key)[1].replace("_", " ")
    return re.sub(r"\b(eer|fn?mr|[tf]pi?r)\b", lambda match: match[0].upper(), figure)


def table_of(
    title: str, keys: list[str], prefix: str, figures: dict, worst: dict, **options
) -> Table:
    """A line for each figure, a column for each group and one that names the worst."""
    rows = {}
    for key in keys:
        cells = [show(key, of_group) + show_limits(key, of_group) for of_group in figures.values()]
        of_worst = cut_middle(worst.get(key.removeprefix(f"{prefix}."), ""), MOST_LETTERS)
        rows[name_of(key)] = [*cells, of_worst]
    columns = [cut_middle(group, MOST_LETTERS) for group in figures]
    return Table(title, title, [*columns, "worst"], rows, **options)


def describe_ratio(comparison: dict) -> str:
    """The common threshold and how much the FMRs of the groups differ there; "" without pairs."""
    if "common_threshold" not in comparison:
        return ""
    ratio = comparison["fmr_ratio"]
    text = ratio if isinstance(ratio, str) else f"{ratio:.3g}"
    threshold = comparison["common_threshold"]
    return f"common threshold {threshold:.4f}; largest to smallest FMR there: {text}"


def list_panels(
    kind: str, name: str, comparison: dict
) -> dict[str, tuple[dict[str, tuple[float, float, float]], str]]:
    """{figure: ({group: (value, low, high)}, worst group)} of the rates that a plot shows."""
    figures = figures_of_groups(kind, name, comparison)
    prefix = f"{kind}.{printable(name)}."
    panels = {}
    for figure, worst in comparison["worst"].items():
        key = prefix + figure
        if not is_shown(key):
            continue
        ends = ("", *LIMITS)
        values = {
            group: tuple(scaled(key, of_group.get(key + end, math.nan)) for end in ends)
            for group, of_group in figures.items()
        }
        panels[name_of(key)] = (values, worst)
    return panels
