"""Results as tables: which figure stands where, in which unit, with how many decimals. The
terminal, summary.md and report.html show the same.

A "result" is the dict of ``Evaluator.evaluate_checkpoint``.
"""

from collections.abc import Callable
from typing import NamedTuple

from eval.roc import resolves

MARK = "†"
EXPLANATION = (
    f"{MARK} finer than the data can resolve: fewer than one false accept is expected "
    "there among the impostor pairs (1:N: the probes without a mate), "
    "so the figure is that of a rate nearby"
)


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


def cut_middle(name: str, most: int = 34) -> str:
    """A long name without its middle, for names of runs differ at both ends."""
    if len(name) <= most:
        return name
    behind = most // 2
    return f"{name[: most - behind - 1]}…{name[-behind:]}"
