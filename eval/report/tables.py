"""Results as tables: which figure stands where, in which unit, with how many decimals. The
terminal, summary.md and report.html show the same.

A "result" is the dict of ``Evaluator.evaluate_checkpoint``; flat, its keys are dotted:
``verification.lfw.Accuracy-Flip``.
"""

import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import NamedTuple

from eval.roc import resolves
from utils.errors import InputError
from utils.files import printable

MARK = "†"
EXPLANATION = (
    f"{MARK} finer than the data can resolve: fewer than one false accept is expected "
    "there among the impostor pairs (1:N: the probes without a mate), "
    "so the figure is that of the nearest point"
)

KINDS = ("verification", "ijb", "tinyface")
FRACTIONS = re.compile(
    r"verification\..+\.(Accuracy-(Flip|Std)|eer|fnmr_at_fmr_[^.]+(\.\d+)?|fn?mr_at_common_threshold)"
    r"|ijb\..+\.1N_.+\.(top\d+|tpir_at_fpir_.+)"
)
PERCENTAGES = re.compile(
    r"ijb\..+_(tpr_at_fpr_.+|fnmr_at_fmr_.+|eer)|ijb\..+\.fn?mr_at_common_threshold|tinyface\..+\.rank-\d+"
)
COUNTS = re.compile(r".+\.(genuine_pairs|impostor_pairs|mated|non_mated|probes)")
# behind a figure's key: the limits of its interval
ENDS = ("low", "high")
LIMITS = tuple(f"-95.{end}" for end in ENDS)

# the figures that papers compare, what the heads of columns call them, and two lines above a plot
HEADLINES = (
    (r"verification\.(.+)\.Accuracy-Flip", r"\1", (r"\1", "accuracy (%)")),
    (
        r"ijb\.(.+)\.Norm:True_Det:True_tpr_at_fpr_0\.0001",
        r"\1 1e-4",
        (r"\1", "TAR (%) at FAR 1e-4"),
    ),
    (r"ijb\.(.+)\.Norm:True_Det:True_tpr_at_fpr_1e-05", r"\1 1e-5", (r"\1", "TAR (%) at FAR 1e-5")),
    (r"ijb\.(.+)\.1N_(.+)\.top1", r"\1 \2 rank-1", (r"\1, gallery \2", "rank-1 rate (%)")),
    (r"tinyface\.(.+)\.rank-1", r"\1 rank-1", (r"\1", "rank-1 rate (%)")),
)


class Row(NamedTuple):
    """One evaluated checkpoint. step: None for one without a number, such as best_backbone.pth."""

    name: str
    run: str
    step: int | None
    figures: dict[str, float]


class Table(NamedTuple):
    """title, remark: for the page; corner: the head of the first column; rows: {name: cells};
    minor: thresholds, which the terminal leaves out.
    """

    title: str
    corner: str
    columns: list[str]
    rows: dict[str, list[str]]
    remark: str = ""
    minor: bool = False

    def is_marked(self) -> bool:
        return any(MARK in cell for cells in self.rows.values() for cell in cells)


# --- all figures of one checkpoint


def format_results(results: dict) -> str:
    """The tables for the terminal, and the meaning of the mark where one stands."""
    text = "\n\n".join(format_table(table) for table in tabulate(results) if not table.minor)
    return f"{text}\n{EXPLANATION}" if MARK in text else text


def format_table(table: Table) -> str:
    lines = [(table.corner, table.columns), *table.rows.items()]
    # a place for the mark, so that decimals stand below each other
    if table.is_marked():
        lines = [
            (name, [cell if cell.endswith(MARK) else f"{cell} " for cell in cells])
            for name, cells in lines
        ]
    name_width = max(len(name) for name, _ in lines)
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in lines), strict=True)]
    text = []
    for name, cells in lines:
        aligned = [f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
        text.append(f"{name:{name_width}}{''.join(aligned)}".rstrip())
    return "\n".join(text)


def tabulate(results: dict) -> list[Table]:
    """All tables of a result; a figure whose false accept rate the data cannot resolve ends in
    MARK.
    """
    tables = []
    if results["verification"]:
        tables += pair_tables(results["verification"])
    for name, figures in results["ijb"].items():
        tables += ijb_tables(name, figures)
    if results["tinyface"]:
        tables.append(tinyface_table(results["tinyface"]))
    return tables


def pair_tables(sets: dict) -> list[Table]:
    rows, errors, equal = {}, {}, {}
    for name, figures in sets.items():
        accuracy = f"{100 * figures['Accuracy-Flip']:.2f} ± {100 * figures['Accuracy-Std']:4.2f}"
        rows[name] = [
            accuracy + limits(figures, "Accuracy-Flip", 100),
            f"{figures['XNorm']:.4g}",
        ]
        if "eer" in figures:
            errors[name] = rates(figures, "fnmr_at_fmr_", 100, figures["impostor_pairs"])
            equal[name] = cell(figures, "eer", 100)
    tables = [Table("Pair sets", "pair set", ["Accuracy-Flip ± Std (%)", "XNorm"], rows)]
    if errors:
        tables.append(error_table("Pair sets", "pair set", errors, equal))
    return tables


def error_table(
    title: str, corner: str, errors: dict[str, dict], equal: dict[str, str], **options
) -> Table:
    """``errors``: {row: {FMR: cell of its FNMR}}; ``equal``: {row: cell of its EER}."""
    columns, rows = grid(errors)
    return Table(
        f"{title}: EER, and FNMR at FMR, in %",
        f"{corner} EER, FNMR (%) at FMR",
        ["EER", *columns],
        {name: [equal[name], *cells] for name, cells in rows.items()},
        **options,
    )


def ijb_tables(name: str, figures: dict) -> list[Table]:
    """1:1 as weighting x FPR, then, if there are galleries, 1:N as gallery x rank and FPIR."""
    # a result of eval.ijb alone has no counts: nothing is marked
    impostors = figures.get("impostor_pairs")
    size = ""
    if impostors is not None:
        size = f"{figures['genuine_pairs']:,.0f} genuine and {impostors:,.0f} impostor pairs"
    tpr, thresholds, errors, equal = {}, {}, {}, {}
    for variant in dict.fromkeys(
        key.partition("_tpr_at_fpr_")[0] for key in figures if "_tpr_at_fpr_" in key
    ):
        tpr[variant] = rates(figures, f"{variant}_tpr_at_fpr_", 1, impostors)
        thresholds[variant] = rates(figures, f"{variant}_thresh_at_fpr_", 1, impostors, decimals=4)
        if f"{variant}_eer" in figures:
            errors[variant] = rates(figures, f"{variant}_fnmr_at_fmr_", 1, impostors)
            equal[variant] = cell(figures, f"{variant}_eer")
    galleries = {
        key.removeprefix("1N_"): inner for key, inner in figures.items() if key.startswith("1N_")
    }
    return [
        Table(
            f"{name}: 1:1 verification, TPR in % at FPR",
            f"{name} TPR (%) at FPR",
            *grid(tpr),
            remark=size,
        ),
        Table(
            f"{name}: thresholds at FPR", f"{name} threshold at FPR", *grid(thresholds), minor=True
        ),
        *([error_table(f"{name}: 1:1", name, errors, equal, minor=True)] if errors else []),
        *(identification_tables(name, galleries) if galleries else []),
    ]


def identification_tables(name: str, galleries: dict) -> list[Table]:
    ranks, tpir, thresholds = {}, {}, {}
    for gallery, figures in galleries.items():
        non_mated = figures["non_mated"]
        ranks[gallery] = rates(figures, "top", 100)
        tpir[gallery] = rates(figures, "tpir_at_fpir_", 100, non_mated)
        thresholds[gallery] = rates(figures, "threshold_at_fpir_", 1, non_mated, decimals=4)
    rank_columns, rank_rows = grid(ranks, "rank-{:.0f}".format)
    rate_columns, rate_rows = grid(tpir, lambda far: f"TPIR@{short(far)}")
    sizes = "; ".join(
        f"{gallery}: {figures['mated']:,.0f} probes with and "
        f"{figures['non_mated']:,.0f} without a mate"
        for gallery, figures in galleries.items()
    )
    return [
        Table(
            f"{name}: 1:N identification, rank-k rate and TPIR at FPIR in %",
            f"{name} 1:N (%)",
            rank_columns + rate_columns,
            {gallery: rank_rows[gallery] + rate_rows[gallery] for gallery in galleries},
            remark=sizes,
        ),
        Table(
            f"{name}: thresholds at FPIR",
            f"{name} threshold at FPIR",
            *grid(thresholds),
            minor=True,
        ),
    ]


def tinyface_table(sets: dict) -> Table:
    rows = {name: rates(figures, "rank-") for name, figures in sets.items()}
    cells = grid(rows, "rank-{:.0f}".format)
    return Table("TinyFace: identification rate in %", "TinyFace (%)", *cells)


def rates(
    figures: dict, prefix: str, factor: float = 1, impostors: float | None = None, decimals: int = 2
) -> dict[float, str]:
    """{number: cell} of the figures whose keys are the prefix and a number; marked where
    ``impostors`` cannot resolve the number as a rate.
    """
    cells = {}
    for key in figures:
        if key.startswith(prefix) and not key.endswith("-95"):
            number = float(key.removeprefix(prefix))
            cells[number] = cell(figures, key, factor, decimals) + mark(number, impostors)
    return cells


def cell(figures: dict, key: str, factor: float = 1, decimals: int = 2) -> str:
    """A figure times ``factor``, and its interval if there is one."""
    return f"{factor * figures[key]:.{decimals}f}" + limits(figures, key, factor, decimals)


def limits(figures: dict, key: str, factor: float = 1, decimals: int = 2) -> str:
    """`` [low, high]`` of the interval beside a figure, "" if there is none."""
    if f"{key}-95" not in figures:
        return ""
    low, high = (f"{factor * limit:.{decimals}f}" for limit in figures[f"{key}-95"])
    return f" [{low}, {high}]"


def mark(rate: float, impostors: float | None) -> str:
    return MARK if impostors is not None and not resolves(rate, int(impostors)) else ""


def short(rate: float) -> str:
    """1e-4 for 0.0001, as papers write it."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if int(exponent) else f"{rate:g}"


def grid(
    rows: dict[str, dict[float, str]], head: Callable[[float], str] = short
) -> tuple[list[str], dict[str, list[str]]]:
    """Columns for all numbers that occur, ascending, and the cells of each row, empty where it
    lacks one. head: of a column.
    """
    numbers = sorted({number for cells in rows.values() for number in cells})
    cells_of_rows = {
        name: [cells.get(number, "") for number in numbers] for name, cells in rows.items()
    }
    return list(map(head, numbers)), cells_of_rows


# --- single figures of many checkpoints, by their dotted keys


def flatten(results: dict) -> dict[str, float]:
    """Nested figures with dotted keys, sorted; an interval becomes ``k-95.low`` and
    ``k-95.high``.
    """
    flat = {}
    for key, value in results.items():
        # the name of a set is that of a file
        key = printable(key)
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": figure for inner, figure in flatten(value).items()}
        elif isinstance(value, list):
            flat |= {f"{key}.{end}": limit for end, limit in zip(ENDS, value, strict=True)}
        else:
            flat[key] = value
    return dict(sorted(flat.items()))


def headlines(keys) -> dict[str, str]:
    """{key: label} of the figures that summaries show, by kind and set."""
    labelled = [
        (KINDS.index(kind_of(key)), match[1], number, key, match.expand(label))
        for key in keys
        for number, (pattern, label, _) in enumerate(HEADLINES)
        if (match := re.fullmatch(pattern, key))
    ]
    return {key: label for *_, key, label in sorted(labelled)}


def is_key(text: str) -> bool:
    return kind_of(text) in KINDS and text.count(".") >= 2


def kind_of(key: str) -> str:
    return key.split(".", 1)[0]


def set_of(key: str) -> str:
    """kind.set of a dotted key; the name of a set and the rate at the end can hold dots
    themselves.
    """
    key = key.removesuffix(LIMITS[0]).removesuffix(LIMITS[1])
    return re.fullmatch(r"(.+?\..+?)\.(1N_.+|[^.]+_at_f(pr|mr)_.+|[^.]+)", key)[1]


def is_limit(key: str) -> bool:
    """Of an interval."""
    return key.endswith(LIMITS)


def label_of(key: str) -> str:
    return headlines([key]).get(key) or key.split(".", 1)[1]


def plot_title(key: str) -> tuple[str, str]:
    """The two lines above a plot: the set, the figure and its unit."""
    for pattern, _, (group, figure) in HEADLINES:
        if match := re.fullmatch(pattern, key):
            return match.expand(group), figure
    group = set_of(key)
    unit = " (%)" if is_percentage(key) else ""
    return group.split(".", 1)[1], key.removeprefix(f"{group}.") + unit


def cut_middle(name: str, most: int = 34) -> str:
    """A long name without its middle, for names of runs differ at both ends."""
    if len(name) <= most:
        return name
    behind = most // 2
    return f"{name[: most - behind - 1]}…{name[-behind:]}"


def is_accuracy(key: str) -> bool:
    """Of a pair set, where guessing gives 50 %."""
    return kind_of(key) == "verification" and key.endswith(".Accuracy-Flip")


def is_count(key: str) -> bool:
    """The size of a set, which no checkpoint changes."""
    return bool(COUNTS.fullmatch(key))


def is_percentage(key: str) -> bool:
    return bool(FRACTIONS.fullmatch(key) or PERCENTAGES.fullmatch(key))


def scaled(key: str, value: float) -> float:
    """Rates in percent, whichever way the result holds them; all else as it is."""
    return 100 * value if FRACTIONS.fullmatch(key) else value


def show(key: str, figures: dict[str, float]) -> str:
    """One figure of a checkpoint as a cell: rates in percent with two decimals, marked if need be;
    "" if the checkpoint lacks it.
    """
    if key not in figures:
        return ""
    if is_count(key):
        return f"{figures[key]:,.0f}"
    form = "{:.2f}" if is_percentage(key) else "{:.4g}"
    return form.format(scaled(key, figures[key])) + mark_of(key, figures)


def show_limits(key: str, figures: dict[str, float]) -> str:
    """`` [low, high]`` of a figure's interval, "" if there is none."""
    nested = {key: figures.get(key), f"{key}-95": [figures.get(key + limit) for limit in LIMITS]}
    if None in nested[f"{key}-95"]:
        return ""
    factor = 100 if FRACTIONS.fullmatch(key) else 1
    return limits(nested, key, factor, 2 if is_percentage(key) else 4)


def mark_of(key: str, figures: dict[str, float]) -> str:
    match = re.fullmatch(r"(.+\.)[^.]+_at_f(?:pi?r|mr)_(.+)", key)
    if match is None:
        return ""
    count = "non_mated" if "_at_fpir_" in key else "impostor_pairs"
    return mark(float(match[2]), figures.get(match[1] + count))


def find_metric(name: str, keys) -> str:
    """The key that a person means: the key itself, the label of a headline (lfw, IJBC 1e-4), a set
    with one headline, or the end of one key (lfw.XNorm).

    Raises InputError that lists the nearest keys if there is none, and the candidates if there are
    several.
    """
    labels = headlines(keys)
    if name in keys:
        return name
    meant = (
        [key for key, label in labels.items() if label == name]
        or [key for key in keys if key.endswith(name) and key[-len(name) - 1] in "._:"]
        or [key for key in labels if key.split(".", 1)[1].startswith(f"{name}.")]
    )
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise InputError(f"--sort-by {name!r} is ambiguous: {listing(meant)}")
    near = nearest_keys(name, keys)
    advice = f"the nearest: {listing(near)}" if near else f"there are: {listing(list(keys))}"
    raise InputError(f"--sort-by {name!r}: no such figure; {advice}")


def nearest_keys(name: str, keys) -> list[str]:
    """The keys that are, or whose parts or labels are, spelled much like a name."""
    key_of = {}
    for key in keys:
        for spelling in (key, *key.split("."), label_of(key)):
            key_of[spelling.lower()] = key
    matches = get_close_matches(name.lower(), key_of, 5, 0.4)
    return list(dict.fromkeys(key_of[match] for match in matches))


def listing(keys: list[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
