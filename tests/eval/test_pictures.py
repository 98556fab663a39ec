"""summary.png, metrics.pdf and curves.png: no text stands on another or on a bar's panel, and bars
where lines would be single points.
"""

from itertools import combinations

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.text import Text

from eval import plot_curves
from eval.bootstrap import Difference
from eval.report import comparison_plots, figure_keys
from eval.report.figure_keys import Row

LONG = "a_run_with_a_very_long_name_that_somebody_chose_to_tell_its_25_settings_apart_m0.35"
RUNS = ("teacher", "AdaDistill_ArcFace", LONG, "AMLDistill", "x", "standalone", "a$b", "c|d")
LONG_SET = "a_very_long_pair_set_name_from_somebody_else"


def row_of(run: str, step: int | None, without: str = "none") -> Row:
    random = np.random.default_rng(len(run) + (step or 0))
    figures = {
        f"verification.{name}.Accuracy-Flip": float(random.uniform(0.4, 1))
        for name in ("lfw", "cfp_fp", LONG_SET)
    } | {
        "ijb.IJBC.Norm:True_Det:True_tpr_at_fpr_0.0001": 93.5,
        "ijb.IJBC.1N_G1.top1": 1.0,
        "ijb.IJBC.Norm:False_Det:True_fnmr_at_fmr_0.0001": 7.5,
        "ijb.IJBC.Norm:False_Det:True_fnmr_at_fmr_0.001": 5.5,
        "tinyface.tinyface.rank-1": 0.0,
        "verification.lfw.XNorm": 22.5,
    }
    figures = {key: value for key, value in figures.items() if without not in key}
    return Row(f"{run}_{step}backbone", run, step, figures)


@pytest.fixture
def saved(monkeypatch) -> list:
    """The figures that were saved."""
    figures = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure, *arguments, **options):
        save(figure, *arguments, **options)
        figures.append(figure)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures


def texts_of(figure) -> list[Text]:
    """All that are drawn; an axis also keeps labels of ticks outside its view."""
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    return [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text() and text not in hidden
    ]


def check_layout(figure) -> None:
    figure.draw_without_rendering()
    boxes = {text: text.get_window_extent() for text in texts_of(figure)}
    for (one, box), (other, other_box) in combinations(boxes.items(), 2):
        # less a pixel of rounding on each side
        apart = not box.padded(-1).overlaps(other_box.padded(-1))
        assert apart, f"{one.get_text()!r} stands on {other.get_text()!r}"
    for text, box in boxes.items():
        inside = figure.bbox.padded(1)
        corners = box.corners()
        assert all(inside.contains(*corner) for corner in corners), f"{text.get_text()!r} is cut"
    for legend in figure.legends:
        for axes in figure.axes:
            assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert not any(axes.get_legend() for axes in figure.axes)


CASES = {
    "one": [row_of("teacher", 400)],
    "two": [row_of("teacher", 400), row_of(LONG, 100)],
    "eight": [row_of(run, 100, "lfw" if run == "x" else "none") for run in RUNS],
    "published": [row_of("weights", None), row_of("weights", None)._replace(name="other")],
    "steps": [row_of(run, step) for run in RUNS for step in (100, 200, 300)],
    "mixed": [row_of("teacher", 1), row_of("teacher", 200), row_of("x", 7), row_of("x", None)],
}


@pytest.mark.parametrize("case", CASES)
def test_summary_is_clear(saved, tmp_path, case):
    rows = CASES[case]
    keys = sorted({key for row in rows for key in row.figures})
    comparison_plots.plot_headlines(
        tmp_path / "summary.png", rows, list(figure_keys.headlines(keys))
    )
    comparison_plots.plot_all(tmp_path / "metrics.pdf", rows, keys)
    picture, *pages = saved
    assert len(picture.axes) == 6 and sum(len(page.axes) for page in pages) == 9
    for figure in saved:
        check_layout(figure)
        for axes in figure.axes:
            if case in ("steps", "mixed"):
                assert axes.lines and not axes.patches
            else:
                assert not axes.lines and len(axes.patches) + missing(axes) == len(rows)


def missing(axes) -> int:
    return sum(text.get_text() == "–" for text in axes.texts)


def test_bars_have_names_and_values(saved, tmp_path):
    rows = CASES["eight"]
    key = "verification.lfw.Accuracy-Flip"
    comparison_plots.plot_headlines(tmp_path / "summary.png", rows, [key])
    (axes,) = saved[0].axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == "teacher" and names[2].startswith("a_run") and names[2].endswith("m0.35")
    values = [text.get_text() for text in axes.texts]
    expected = [f"{100 * row.figures[key]:.2f}" if key in row.figures else "–" for row in rows]
    assert values == expected
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert [f"{end:.2f}" for end in ends] == [value for value in expected if value != "–"]
    assert {bar.get_x() for bar in axes.patches} == {50}


def history(steps: int, *keys: str) -> list[dict]:
    values = np.linspace(0.1, 0.9, steps)
    return [
        {"step": step, "loss": 16 - step / 50} | dict.fromkeys(keys, value)
        for step, value in enumerate(values)
    ]


@pytest.mark.parametrize("runs", [1, 2, 8])
@pytest.mark.parametrize("sets", [["lfw"], ["frontal", "lowres", LONG_SET, "a", "b", "agedb_30"]])
def test_curves_are_clear(saved, tmp_path, runs, sets):
    names = RUNS[:runs]
    curves = {name: history(9, *(["cos_st", "alpha"] if "Ada" in name else [])) for name in names}
    accuracies = {name: dict.fromkeys(sets, (90.0, 3.0)) for name in names}
    if runs > 1:
        accuracies[names[1]] = {sets[0]: (45.0, 2.0)}
    plot_curves.draw(curves, accuracies, tmp_path / "curves.png")
    (figure,) = saved
    check_layout(figure)
    *_, bars = figure.axes
    assert len(figure.axes) == (3 if runs > 1 else 2)
    assert len(bars.patches) == sum(map(len, accuracies.values()))
    assert bars.get_ylim()[0] <= (44 if runs > 1 else 50)
    (legend,) = figure.legends
    assert len(legend.get_texts()) == runs


def test_intervals_are_lines(saved, tmp_path):
    """Of bars and of lines against the step; the text says what they are."""
    key = "verification.lfw.Accuracy-Flip"
    limits = {f"{key}-95.low": 0.42, f"{key}-95.high": 0.47}
    for step in (1, 1, 2):
        row = Row("1backbone", "run", 1, {key: 0.45} | limits)
        rows = [row, row._replace(step=step), row._replace(figures={key: 0.5})]
        comparison_plots.plot_headlines(tmp_path / "summary.png", rows, [key])
        figure = saved[-1]
        (axes,) = figure.axes
        ends = [segment for lines in axes.collections for segment in lines.get_segments()]
        along = 1 if step == 2 else 0
        drawn = {tuple(np.round(segment[:, along], 6)) for segment in ends if len(segment)}
        assert (42, 47) in drawn
        assert "Thin lines: 95 % intervals." in figure.get_suptitle()
        check_layout(figure)


def test_forest_plot(saved, tmp_path):
    """Filled where the interval excludes 0, a dash where nothing was compared."""
    rows = [row_of(run, 100) for run in ("teacher", "x", LONG, "AMLDistill")]
    key, other = "verification.lfw.Accuracy-Flip", "tinyface.tinyface.rank-1"
    values = [Difference(0.02, 0.01, 0.03), Difference(-0.01, -0.02, 0.005), None]
    differences = {
        row.name: {key: value, other: Difference(1.0, -np.inf, 2.0)} if value else {}
        for row, value in zip(rows[1:], values, strict=True)
    }
    comparison_plots.plot_differences(tmp_path / "differences.png", rows, [key, other], differences)
    comparison_plots.plot_all(tmp_path / "metrics.pdf", rows, [key], differences)
    picture, *pages = saved
    assert picture.get_suptitle().startswith("Differences to teacher_100backbone")
    assert len(pages) == 1 + 2 and pages[1].get_suptitle().startswith("verification: differences")
    for figure in saved:
        check_layout(figure)
    axes = picture.axes[0]
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [float(point.get_xdata()[0]) for point in points] == [2.0, -1.0]
    assert [point.get_markerfacecolor() == "white" for point in points] == [False, True]
    assert [text.get_text() for text in axes.texts] == ["+2.00", "-1.00", "–"]
    assert len(axes.get_yticks()) == 3
