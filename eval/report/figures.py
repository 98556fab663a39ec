"""The drawings of a report page: ROC, score histograms, CMC, TPIR against FPIR. Each returns SVG
text of a few kilobytes, however long the curves are.
"""

import io
import math
from collections.abc import Callable
from itertools import cycle
from statistics import NormalDist

import numpy as np

from eval.quality import RejectCurves
from eval.report.tables import cut_middle, short
from eval.roc import FPRS, Roc, Separation, resolves, threshold_at, tpr_at

GENUINE, IMPOSTOR = "#2166ac", "#d6604d"  # can be told apart by the colour-blind
COLORS = ("#2166ac", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#666666")
POINTS = 300  # of a curve: one or two a pixel of its axis
DOT = dict(linestyle="", marker="o", markersize=4.5, clip_on=False, zorder=3)
# inches; small, so that the text is still read on a telephone, where the width is 370 pixels
SIZE = (4.7, 3.8)
# of the axes of a DET curve
DET_FMRS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.05, 0.2, 0.5)
DET_FNMRS = (1e-4, 1e-3, 1e-2, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99)
# normal deviate of a share between 0 and 1
probit = np.vectorize(NormalDist().inv_cdf, otypes=[float])


def draw_rocs(rocs: dict[str, Roc]) -> str:
    """TPR against FPR (logarithmic) from the first operating point; the six are dots, hollow where
    the pairs do not resolve them.

    What a curve reaches without any false accept stands at the left edge.
    """

    def plot(axes):
        rates = np.geomspace(FPRS[0], 1, POINTS)
        for color, (name, roc) in zip(cycle(COLORS), rocs.items()):
            axes.plot(
                rates,
                100 * step_values(rates, roc.fpr, roc.tpr),
                color=color,
                linewidth=1.4,
                label=name,
            )
            for rate, tpr in zip(FPRS, 100 * tpr_at(roc)[0], strict=True):
                axes.plot(
                    rate,
                    tpr,
                    color=color,
                    markerfacecolor=color if resolves(rate, roc.impostor) else "white",
                    **DOT,
                )
        if not all(resolves(FPRS[0], roc.impostor) for roc in rocs.values()):
            axes.plot(
                [],
                [],
                color="#555555",
                markerfacecolor="white",
                label="finer than the pairs resolve",
                in_layout=False,
                **DOT,
            )
        set_rate_axes(axes, FPRS[0], "false positive rate", "true positive rate (%)")

    return svg(plot, "ROC")


def draw_dets(rocs: dict[str, Roc]) -> str:
    """FNMR against FMR, both as normal deviates; the operating points are dots, as in the ROC.

    Of an error that no pair makes there is no normal deviate: the curve ends before it.
    """
    low_fmr = max(FPRS[0], decade_below(min(1 / roc.impostor for roc in rocs.values())))
    low_fnmr = max(DET_FNMRS[0], decade_below(min(1 / roc.genuine for roc in rocs.values())))

    def plot(axes):
        deviates = np.linspace(*probit([low_fmr, DET_FMRS[-1]]), POINTS)
        rates = np.array([NormalDist().cdf(deviate) for deviate in deviates])
        highest = DET_FMRS[-1]
        for color, (name, roc) in zip(cycle(COLORS), rocs.items()):
            fnmr = 1 - step_values(rates, roc.fpr, roc.tpr)
            drawn = (fnmr > 0) & (fnmr < 1)
            axes.plot(deviates[drawn], probit(fnmr[drawn]), color=color, linewidth=1.4, label=name)
            highest = max(highest, fnmr[drawn].max(initial=0))
            for rate in FPRS:
                error = 1 - threshold_at(roc, rate)[1]
                if rate >= low_fmr and 0 < error < 1:
                    face = color if resolves(rate, roc.impostor) else "white"
                    axes.plot(probit(rate), probit(error), color=color, markerfacecolor=face, **DOT)
        if not any(len(line.get_xdata()) for line in axes.lines):
            axes.text(
                0.5,
                0.5,
                "every genuine pair scores above every impostor pair",
                transform=axes.transAxes,
                ha="center",
            )
        diagonal = probit([low_fnmr, DET_FMRS[-1]])
        axes.plot(diagonal, diagonal, color="#555555", linewidth=0.8, linestyle=":")
        top = next((tick for tick in DET_FNMRS if tick >= highest), 0.999)
        axes.set(
            xlim=probit([low_fmr, DET_FMRS[-1]]),
            ylim=probit([low_fnmr, top]),
            xlabel="false match rate (FMR, %)",
            ylabel="false non-match rate (FNMR, %)",
        )
        set_deviate_ticks(axes.xaxis, [rate for rate in DET_FMRS if rate >= low_fmr])
        set_deviate_ticks(axes.yaxis, [rate for rate in DET_FNMRS if low_fnmr <= rate <= top])

    return svg(plot, "DET")


def set_deviate_ticks(axis, rates: list[float]) -> None:
    """Percentages where their normal deviates are."""
    axis.set_ticks(probit(rates), [f"{100 * rate:g}" for rate in rates])


def draw_rejects(curves: RejectCurves) -> str:
    """FNMR against the share of the samples that are rejected for their quality, and the level at
    which rejecting at random would keep it.
    """

    def plot(axes):
        for color, (fmr, fnmr) in zip(cycle(COLORS), curves.fnmr.items()):
            axes.axhline(100 * fnmr[0], color=color, linewidth=0.9, linestyle=":")
            axes.plot(
                100 * curves.shares,
                100 * fnmr,
                color=color,
                linewidth=1.4,
                label=f"at FMR {short(fmr)}",
            )
        axes.set(
            xlim=(0, 100 * curves.shares[-1]),
            xlabel=f"{curves.samples} rejected, smallest feature norms first (%)",
            ylabel="FNMR of the pairs left (%)",
        )
        axes.set_ylim(bottom=0)

    return svg(plot, "Error versus reject")


def draw_separation(separation: Separation, roc: Roc | None, score_name: str) -> str:
    """Share of the genuine and of the impostor pairs by score; above, the thresholds of the
    operating points.

    Logarithmic, as there are far more impostors and their tail matters.
    """

    def plot(axes):
        edges, genuine, impostor = merge_bins(separation)
        floor = 0.5 / max(genuine.sum(), impostor.sum())
        for counts, name, color in (
            (impostor, "impostor", IMPOSTOR),
            (genuine, "genuine", GENUINE),
        ):
            share = np.maximum(counts / counts.sum(), floor)
            axes.stairs(share, edges, baseline=floor, fill=True, color=color, alpha=0.3)
            axes.stairs(
                share,
                edges,
                baseline=floor,
                color=color,
                linewidth=1.2,
                label=f"{name} ({counts.sum():,} pairs)",
            )
        axes.set(
            yscale="log",
            xlabel=score_name,
            ylabel="share of the pairs in a bin (%)",
            xlim=(edges[0], edges[-1]),
        )
        axes.set_ylim(bottom=floor)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.6g}")
        axes.yaxis.minorticks_off()
        if roc is not None:
            mark_thresholds(axes, roc)

    return svg(plot, "Scores")


def merge_bins(separation: Separation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges, genuine and impostor counts with wider bins where there are few pairs, whose histogram
    would be a comb.
    """
    fewest = min(separation.genuine.sum(), separation.impostor.sum())
    starts = np.arange(
        0, len(separation.genuine), 4 if fewest < 1000 else 2 if fewest < 5000 else 1
    )
    return (
        np.append(separation.edges[starts], separation.edges[-1]),
        np.add.reduceat(separation.genuine, starts),
        np.add.reduceat(separation.impostor, starts),
    )


def mark_thresholds(axes, roc: Roc) -> None:
    """Lines where the FPR is 1e-4 and so on, labelled above the axes; those that would stand on
    each other are left out, the pairs' finest first.
    """
    low, high = axes.get_xlim()
    chosen = {}
    for rate, threshold in zip(FPRS, tpr_at(roc)[1], strict=True):
        if (
            resolves(rate, roc.impostor)
            and low < threshold < high
            and all(abs(threshold - other) > 0.06 * (high - low) for other in chosen.values())
        ):
            chosen[rate] = threshold
    for threshold in chosen.values():
        axes.axvline(threshold, color="#555555", linewidth=0.8, linestyle=":")
    above = axes.secondary_xaxis("top")
    above.set_xticks(list(chosen.values()), [short(rate) for rate in chosen], fontsize=8)
    above.set_xlabel("threshold at FPR" if chosen else "", fontsize=8)
    above.spines["top"].set_visible(False)


def draw_cmc(curves: dict[str, np.ndarray]) -> str:
    """Share of the mated probes whose mate is among the k best, against k."""

    def plot(axes):
        longest = max(map(len, curves.values()))
        for color, (name, rates) in zip(cycle(COLORS), curves.items()):
            ranks = np.arange(1, len(rates) + 1)
            marked = [rank - 1 for rank in (1, 5, 10, 20, 50, 100) if rank <= len(rates)]
            axes.plot(
                ranks,
                100 * np.asarray(rates),
                color=color,
                linewidth=1.4,
                marker="o",
                markersize=4,
                markevery=marked,
                label=name,
            )
        axes.set(
            xlabel="rank",
            ylabel="identification rate (%)",
            ylim=rate_limits(axes),
            xscale="log" if longest > 20 else "linear",
        )
        axes.set_xticks(
            [rank for rank in (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000) if rank <= longest]
        )
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.minorticks_off()

    return svg(plot, "CMC")


def draw_tpir(curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """TPIR against FPIR (logarithmic) of the 1:N search with probes that have no mate."""

    def plot(axes):
        shown = {name: thin(*map(np.asarray, curve)) for name, curve in curves.items()}
        left = decade_below(min(fpir[0] for fpir, _ in shown.values()))
        for color, (name, (fpir, tpir)) in zip(cycle(COLORS), shown.items()):
            axes.plot(fpir, 100 * tpir, color=color, linewidth=1.4, label=name)
        set_rate_axes(
            axes,
            left,
            "false positive identification rate (FPIR)",
            "true positive identification rate (%)",
        )

    return svg(plot, "TPIR at FPIR")


def draw_groups(panels: dict[str, tuple[dict[str, tuple[float, float, float]], str]]) -> str:
    """A panel for each figure: a dot for each group with its interval, the worst in red.

    panels: {figure: ({group: (value, low, high)}, worst group)}.
    """

    def plot(*all_axes):
        for axes, (figure, (values, worst)) in zip(all_axes, panels.items(), strict=True):
            for place, (group, (value, low, high)) in enumerate(values.items()):
                color = IMPOSTOR if group == worst else GENUINE
                axes.hlines(place, low, high, color=color, linewidth=1.2)
                axes.plot(value, place, marker="o", markersize=5, color=color)
            axes.set_yticks(range(len(values)), [cut_middle(group, 20) for group in values])
            axes.set_ylim(len(values) - 0.5, -0.5)
            axes.set_title(figure, loc="left", fontsize=9)

    lines = sum(len(values) + 3 for values, _ in panels.values())
    return svg(plot, "Groups", len(panels), (SIZE[0], 0.5 + 0.19 * lines))


def svg(plot: Callable, title: str, panels: int = 1, size: tuple[float, float] = SIZE) -> str:
    """Let ``plot(axes, ...)``, of so many panels below each other, draw and return the SVG.

    Its text stays text, in the reader's fonts; the legend stands below, where it covers nothing.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    # a $ in a name is no formula
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False, "font.size": 9}
    ):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10)
        all_axes = figure.subplots(panels, squeeze=False)[:, 0]
        for axes in all_axes:
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        plot(*all_axes)
        if any(axes.get_legend_handles_labels()[0] for axes in all_axes):
            figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
        return buffer.getvalue()


def set_rate_axes(axes, left: float, x: str, y: str) -> None:
    axes.set(xscale="log", xlim=(left, 1), xlabel=x, ylabel=y, ylim=rate_limits(axes))
    axes.set_xticks([10.0**exponent for exponent in range(round(math.log10(left)), 1)])
    axes.xaxis.set_major_formatter(lambda rate, _: short(rate))
    axes.xaxis.minorticks_off()


def rate_limits(axes) -> tuple[float, float]:
    """From the ten below the lowest rate to a little above 100 %."""
    lowest = min(np.min(line.get_ydata(), initial=90) for line in axes.lines)
    bottom = 10 * math.floor(lowest / 10)
    return bottom - 0.02 * (100 - bottom), 100 + 0.02 * (100 - bottom)


def step_values(at: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The last y whose x (ascending) is not beyond: a rate that is reached without more false
    accepts.
    """
    return np.asarray(y)[np.searchsorted(x, at, side="right") - 1]


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points of a curve, evenly along a logarithmic axis; those at x = 0 have no
    place on it.
    """
    order = np.lexsort((y, x))[np.count_nonzero(x <= 0) :]
    x, y = x[order], y[order]
    kept = np.unique(
        np.searchsorted(x, np.geomspace(x[0], x[-1], POINTS) * (1 + 1e-12), side="right") - 1
    )
    return x[kept], y[kept]


def decade_below(rate: float) -> float:
    """0.01 for 0.01 and 0.03; at most 0.1, so that an axis up to 1 has a length."""
    return min(0.1, 10.0 ** math.floor(math.log10(rate) + 1e-9))
