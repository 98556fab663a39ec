"""Reports: the page of one checkpoint, the tables, the comparison of many, each read back with a
parser of its own.
"""

import base64
import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import NormalDist
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure

from eval import plot_curves
from eval.groups import compare_groups
from eval.quality import RejectCurves
from eval.report import comparison_plots, figure_keys, figures, files, seeds, tables
from eval.report.figure_keys import Row
from eval.report.html_report import CAPTIONS, MOST_PAIRS, PairExhibit, RankExhibit, write_page
from eval.roc import FPRS, Roc, Separation, cmc, roc_curve, separate, threshold_at
from utils.errors import InputError
from utils.files import read_json, write_json

VARIANTS = ("Norm:True_Det:True", "Norm:True_Det:False", "Norm:False_Det:True")
FARS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
HOSTILE = "<script>alert('$x^{')</script>&amp;\"'|"
VOID = {"meta", "img", "br", "link", "hr", "input"}


def ijb_figures(impostors=5000, non_mated=400, seed=0) -> dict:
    random = np.random.default_rng(seed)
    actual = {"genuine_pairs": 1234, "impostor_pairs": impostors}
    for variant in VARIANTS:
        actual |= {
            f"{variant}_tpr_at_fpr_{fpr}": value
            for fpr, value in zip(FPRS, np.sort(random.uniform(20, 100, 6)), strict=True)
        }
        actual |= {
            f"{variant}_thresh_at_fpr_{fpr}": value
            for fpr, value in zip(FPRS, -np.sort(-random.uniform(0, 1, 6)), strict=True)
        }
    for gallery in ("1N_G1", "1N_G2"):
        top1, top5, top10, *tpir = np.sort(random.uniform(0, 1, 8))
        actual[gallery] = {
            "top1": top1,
            "top5": top5,
            "top10": top10,
            "mated": 300,
            "non_mated": non_mated,
        }
        actual[gallery] |= {
            f"tpir_at_fpir_{far:g}": value for far, value in zip(FARS, tpir, strict=True)
        } | {f"threshold_at_fpir_{far:g}": 0.9 - far / 2 for far in FARS}
    return actual


def all_results() -> dict:
    return {
        "verification": {
            "lfw": {"Accuracy-Flip": 0.99583, "Accuracy-Std": 0.00324, "XNorm": 22.3712},
            "cfp.fp": {"Accuracy-Flip": 0.895, "Accuracy-Std": 0.1, "XNorm": 7.5},
        },
        "ijb": {"IJBC": ijb_figures()},
        "tinyface": {"tinyface_pad_0.1": {"rank-1": 63.204, "rank-5": 68.0, "rank-20": 100.0}},
    }


def face(index: int) -> np.ndarray:
    coarse = np.random.default_rng(index).integers(0, 256, (6, 6, 3), np.uint8)
    return cv2.resize(coarse, (112, 112), interpolation=cv2.INTER_CUBIC)


def pair_exhibit(
    name="lfw", genuine=300, impostor=700, variants=("cosine",), shift=2.0
) -> PairExhibit:
    random = np.random.default_rng(genuine)
    label = np.arange(genuine + impostor) < genuine
    scores = {
        variant: (random.standard_normal(len(label)) + shift * label).astype(np.float32)
        for variant in variants
    }
    first = scores[variants[0]]
    return PairExhibit(
        name,
        {variant: roc_curve(values, label) for variant, values in scores.items()},
        separate(first, label),
        lambda pair: (face(2 * pair), face(2 * pair + 1)),
        lambda pair: f"pair {pair}",
        "cosine similarity",
        lambda pair: float(first[pair]),
    )


def rank_exhibit(name="tinyface_pad_0.1", **more) -> RankExhibit:
    return RankExhibit(
        name, {"TinyFace": cmc(np.random.default_rng(0).geometric(0.4, 500), 50)}, {}, **more
    )


def read_table(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


# --- a page, read back


class Page(HTMLParser):
    """Checks that tags balance while it reads; keeps elements, the text of each kind of tag, images
    and tables {corner: {(row, column): cell}}.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.open = []
        self.elements = []
        self.texts = {}
        self.tables = {}
        self.row = []
        self.size = path.stat().st_size
        self.feed(path.read_text("utf-8"))
        self.close()
        assert self.open == [], "tags are left open"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")
        if tag in ("th", "td"):
            self.row.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "tr" and "thead" in self.open:
            self.head = self.row
            self.tables[self.head[0]] = {}
        elif tag == "tr" and self.open.count("table") and len(self.row) == len(self.head):
            self.tables[self.head[0]] |= {
                (self.row[0], column): cell
                for column, cell in zip(self.head[1:], self.row[1:], strict=False)
            }
        if tag in ("tr", "table"):
            self.row = []
            self.head = self.head if tag == "tr" else []

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data
        if "tr" in self.open and self.open[-1] in ("th", "td", "sup"):
            self.row[-1] += data

    def images(self, kind: str) -> list[bytes]:
        sources = [attributes["src"] for tag, attributes in self.elements if tag == "img"]
        assert all(re.match(r"data:image/(jpeg|svg\+xml);base64,", source) for source in sources)
        return [
            base64.b64decode(source.split(",", 1)[1], validate=True)
            for source in sources
            if source.startswith(f"data:image/{kind}")
        ]

    def svg_texts(self) -> list[set[str]]:
        return [
            {element.text for element in ElementTree.fromstring(image).iter() if element.text}
            for image in self.images("svg")
        ]


def page_of(
    tmp_path,
    results=None,
    exhibits=(),
    settings=None,
    notes=(),
    title="600backbone.pth\nmobilefacenet, fp32",
) -> Page:
    write_page(
        tmp_path / "report.html", title, results or all_results(), exhibits, settings or {}, notes
    )
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    return Page(tmp_path / "report.html")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    misses = [([face(1), face(2), face(3)], "rank 70, probe 5.jpg")]
    tpir = {
        name: (np.geomspace(1e-3, 1, 20), np.linspace(level, 1, 20))
        for name, level in (("G1", 0.4), ("G2", 0.3))
    }
    rejects = RejectCurves("images", np.linspace(0, 0.5, 51), {1e-2: np.linspace(0.3, 0, 51)})
    exhibits = [
        pair_exhibit()._replace(rejects=rejects),
        pair_exhibit("IJBC", 1234, 5000, VARIANTS),
        RankExhibit("IJBC", {"G1": np.ones(10), "G2": np.linspace(0.3, 1, 10)}, tpir),
        rank_exhibit(misses=misses),
    ]
    return page_of(
        tmp_path_factory.mktemp("page"),
        exhibits=exhibits,
        notes=["skipped agedb_30: no /data/agedb_30.bin"],
        settings={
            "precision": "fp32",
            "val_targets": ["lfw", "cfp_fp"],
            "config.json": {"network": "mobilefacenet", "m": None, "sets": {"lfw": {"flip": True}}},
        },
    )


def test_page_needs_nothing_else(page):
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        assert not any(name.startswith("on") for name in attributes)
        assert re.match("data:|#|$", attributes.get("src") or attributes.get("href") or "")
    assert (
        "default-src 'none'" in str(page.elements)
        and "url(" not in page.texts["style"][0]
        and "@import" not in page.texts["style"][0]
    )
    for image in page.images("svg"):
        references = [
            value
            for element in ElementTree.fromstring(image).iter()
            for name, value in element.items()
            if name.endswith("href")
        ]
        assert all(reference.startswith("#") for reference in references)


def test_page_has_every_figure(page):
    results, actual = all_results(), page.tables
    for name, expectation in results["verification"].items():
        accuracy, deviation = (100 * expectation[f"Accuracy-{part}"] for part in ("Flip", "Std"))
        assert actual["pair set"][name, "Accuracy-Flip ± Std (%)"] == (
            f"{accuracy:.2f} ± {deviation:4.2f}"
        )
        assert float(actual["pair set"][name, "XNorm"]) == pytest.approx(
            expectation["XNorm"], rel=5e-4
        )
    ijb, compared = results["ijb"]["IJBC"], 0
    for variant in VARIANTS:
        for fpr, column in zip(FPRS, ("1e-6", "1e-5", "1e-4", "1e-3", "1e-2", "1e-1"), strict=True):
            mark = "†" if fpr < 1 / 5000 else ""
            assert (
                actual["IJBC TPR (%) at FPR"][variant, column]
                == f"{ijb[f'{variant}_tpr_at_fpr_{fpr}']:.2f}{mark}"
            )
            assert (
                actual["IJBC threshold at FPR"][variant, column]
                == f"{ijb[f'{variant}_thresh_at_fpr_{fpr}']:.4f}{mark}"
            )
            compared += 2
    for gallery in ("G1", "G2"):
        expectation = ijb[f"1N_{gallery}"]
        for rank in (1, 5, 10):
            assert (
                actual["IJBC 1:N (%)"][gallery, f"rank-{rank}"]
                == f"{100 * expectation[f'top{rank}']:.2f}"
            )
        for far, column in zip(FARS, ("1e-4", "1e-3", "1e-2", "1e-1", "1"), strict=True):
            mark = "†" if far < 1 / 400 else ""
            assert (
                actual["IJBC 1:N (%)"][gallery, f"TPIR@{column}"]
                == f"{100 * expectation[f'tpir_at_fpir_{far:g}']:.2f}{mark}"
            )
            assert actual["IJBC threshold at FPIR"][gallery, column] == f"{0.9 - far / 2:.4f}{mark}"
    assert actual["TinyFace (%)"] == {
        ("tinyface_pad_0.1", "rank-1"): "63.20",
        ("tinyface_pad_0.1", "rank-5"): "68.00",
        ("tinyface_pad_0.1", "rank-20"): "100.00",
    }
    assert len(actual) == 6 and compared == 36
    text = page.texts["body"][0]
    for part in (
        "600backbone.pth",
        "mobilefacenet, fp32",
        "1,234 genuine and 5,000 impostor pairs",
        "G1: 300 probes with and 400 without a mate",
        tables.EXPLANATION,
        "skipped agedb_30: no /data/agedb_30.bin",
        "lfw, cfp_fp",
        "None",
        "sets.lfw.flipTrue",
    ):
        assert part in text


def test_pictures_are_the_hardest_pairs(page):
    pictures = [
        cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        for image in page.images("jpeg")
    ]
    exhibits = [pair_exhibit(), pair_exhibit("IJBC", 1234, 5000, VARIANTS)]
    pairs = [
        (exhibit, pair)
        for exhibit in exhibits
        for side in (exhibit.separation.false_accepts, exhibit.separation.false_rejects)
        for pair in side[:MOST_PAIRS]
    ]
    expected = [image for exhibit, pair in pairs for image in exhibit.images(pair)] + [
        face(1),
        face(2),
        face(3),
    ]
    assert len(pictures) == len(expected) == 2 * 2 * 2 * MOST_PAIRS + 3
    for picture, image in zip(pictures, expected, strict=True):
        assert np.abs(picture.astype(int) - image).mean() < 6, (
            "RGB, apart from the loss of the JPEG"
        )
    captions = [text for text in page.texts["figcaption"] if text not in CAPTIONS.values()]
    assert captions == [
        f"{exhibit.scores_of(pair):.4f} · pair {pair}" for exhibit, pair in pairs
    ] + ["rank 70, probe 5.jpg"]


def test_plots_are_labelled(page):
    lfw, ijb, tiny_cmc = page.svg_texts()[:4], page.svg_texts()[4:9], page.svg_texts()[9]
    (lfw_roc, lfw_det, lfw_scores, lfw_rejects), (ijb_roc, ijb_det, *ijb_others) = lfw, ijb
    ijb_scores, ijb_cmc, ijb_tpir = ijb_others
    assert {"false match rate (FMR, %)", "0.1", "50", "cosine"} <= lfw_det
    assert {*VARIANTS, "0.01"} <= ijb_det
    assert {"images rejected, smallest feature norms first (%)", "at FMR 1e-2"} <= lfw_rejects
    assert {
        "false positive rate",
        "1e-6",
        "1e-1",
        "1",
        "cosine",
        "finer than the pairs resolve",
    } <= lfw_roc
    assert {*VARIANTS, "1e-6", "1e-4"} <= ijb_roc
    assert {
        "cosine similarity",
        "genuine (300 pairs)",
        "impostor (700 pairs)",
        "threshold at FPR",
        "1e-2",
    } <= lfw_scores
    assert {"impostor (5,000 pairs)"} <= ijb_scores and "1e-4" not in ijb_scores
    assert {"rank", "G1", "G2", "5", "10"} <= ijb_cmc and {"TinyFace", "50"} <= tiny_cmc
    assert {"false positive identification rate (FPIR)", "1e-3", "1"} <= ijb_tpir


def test_det_has_normal_deviate_axes(monkeypatch):
    """Scores of two normal distributions give the line probit(FNMR) = -probit(FMR) - d; its dots
    and the equal error rate lie where the ROC has them.
    """
    axes = Figure().subplots()
    monkeypatch.setattr(figures, "svg", lambda plot, title: plot(axes))
    normal, shift, pairs = NormalDist(), 2.0, 100_000
    quantiles = np.array([normal.inv_cdf((i + 0.5) / pairs) for i in range(pairs)])
    roc = roc_curve(np.append(quantiles, quantiles + shift), np.arange(2 * pairs) >= pairs)
    figures.draw_dets({"all": roc})
    curve, *dots, diagonal = axes.lines
    x, y = curve.get_xdata(), curve.get_ydata()
    # of either error a step of 1e-5 is 0.003 of a deviate wide at 1e-3, and narrower above it
    above = x >= normal.inv_cdf(1e-3)
    np.testing.assert_allclose(y[above], -x[above] - shift, atol=0.01)
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    ticks = [normal.inv_cdf(float(label.get_text()) / 100) for label in axes.get_xticklabels()]
    np.testing.assert_allclose(axes.get_xticks(), ticks)
    points = {round(normal.cdf(dot.get_xdata()[0]), 9): dot.get_ydata()[0] for dot in dots}
    for rate in (1e-3, 1e-2, 1e-1):
        assert normal.cdf(points[rate]) == pytest.approx(1 - threshold_at(roc, rate)[1])


@pytest.mark.parametrize("impostors, hollow", [(700, 4), (20_000, 2), (2_000_000, 0)])
def test_every_operating_point_is_in_sight(monkeypatch, impostors, hollow):
    """However few the pairs: six dots within the axes, those that the pairs do not resolve hollow;
    the curve starts at the left edge.
    """
    axes = Figure().subplots()
    monkeypatch.setattr(figures, "svg", lambda plot, title: plot(axes))
    label = np.arange(impostors + 50) < 50
    roc = roc_curve(np.random.default_rng(0).standard_normal(len(label)) + 3 * label, label)
    figures.draw_rocs({"all": roc})
    curve, *dots = axes.lines[:7]
    assert axes.get_xlim() == (1e-6, 1) and [dot.get_xdata()[0] for dot in dots] == list(FPRS)
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [
        index < hollow for index in range(6)
    ]
    assert all(axes.get_ylim()[0] <= dot.get_ydata()[0] <= axes.get_ylim()[1] for dot in dots)
    assert (
        curve.get_xdata()[0] == pytest.approx(1e-6)
        and curve.get_ydata()[0] == 100 * roc.tpr[roc.fpr <= 1e-6].max()
    )
    assert ("finer than the pairs resolve" in [line.get_label() for line in axes.lines]) == (
        hollow > 0
    )


def test_groups_on_the_page(tmp_path):
    """A table and a plot: values, intervals, the worst, the ratio; a group with too few pairs."""
    common = ("fmr_at_common_threshold", "fnmr_at_common_threshold")
    by_group = {
        "A": {"genuine_pairs": 90, "impostor_pairs": 80, "Accuracy-Flip": 0.91, "XNorm": 20.0}
        | {"Accuracy-Flip-95": [0.9, 0.93]}
        | dict(zip(common, (0.004, 0.02), strict=True)),
        HOSTILE: {"genuine_pairs": 70, "impostor_pairs": 60, "Accuracy-Flip": 0.88, "XNorm": 19.0}
        | dict(zip(common, (0.001, 0.05), strict=True)),
        "few": {"genuine_pairs": 3, "impostor_pairs": 0},
    }
    results = all_results() | {
        "groups": {"verification": {"lfw": compare_groups(by_group, 0.3123)}}
    }
    page = page_of(tmp_path, results)
    table = page.tables["lfw by group"]
    name = tables.cut_middle(HOSTILE, 20)
    assert table["accuracy (%)", "A"] == "91.00"
    assert "[90.00, 93.00]" in page.texts["small"]
    assert table["accuracy (%)", "worst"] == table["FNMR at common threshold (%)", "worst"] == name
    assert table["FMR at common threshold (%)", "worst"] == "A"
    assert table["impostor pairs", "few"] == "0" and table["accuracy (%)", "few"] == ""
    assert ("XNorm", "A") not in table and page.tables["lfw by group: every figure"]["XNorm", "A"]
    assert "largest to smallest FMR there: 4" in page.texts["body"][0]
    (plot,) = page.svg_texts()
    assert {"A", name, "few", "accuracy (%)", "FMR at common threshold (%)"} <= plot


def test_hostile_names_are_text(tmp_path):
    results = {
        "verification": {HOSTILE: {"Accuracy-Flip": 0.5, "Accuracy-Std": 0.0, "XNorm": 1.0}},
        "ijb": {HOSTILE: ijb_figures()},
        "tinyface": {HOSTILE: {"rank-1": 1.0}},
    }
    exhibits = [
        pair_exhibit(HOSTILE)._replace(
            rocs={HOSTILE: roc_curve(np.arange(4.0), [0, 1, 0, 1])},
            captions=lambda pair: HOSTILE,
            score_name=HOSTILE,
        ),
        RankExhibit(
            HOSTILE, {HOSTILE: np.ones(3)}, {HOSTILE: (np.array([0.1, 1.0]), np.array([0.5, 1.0]))}
        ),
    ]
    page = page_of(
        tmp_path,
        results,
        exhibits,
        {HOSTILE: HOSTILE, "group": {HOSTILE: [HOSTILE, 1]}},
        [HOSTILE],
        title=f"{HOSTILE}\n$body {HOSTILE}",
    )
    assert not any(tag == "script" for tag, _ in page.elements)
    assert page.texts["title"] == page.texts["h1"] == [HOSTILE]
    assert (
        page.texts["body"][0].count(HOSTILE) > 30
        and (HOSTILE, "rank-1") in page.tables["TinyFace (%)"]
    )
    assert all(HOSTILE in texts for texts in page.svg_texts())


@pytest.mark.parametrize("kind", ["verification", "ijb", "tinyface", None])
def test_page_of_some_kinds(tmp_path, kind):
    results = {name: figures if name == kind else {} for name, figures in all_results().items()}
    page = page_of(tmp_path, results)
    assert len(page.tables) == {"verification": 1, "ijb": 4, "tinyface": 1, None: 0}[kind]
    assert page.images("svg") == page.images("jpeg") == [] and ("†" in page.texts["body"][0]) == (
        kind == "ijb"
    )


def test_empty_and_extreme_exhibits(tmp_path):
    nothing = np.array([], np.int64)
    plain = pair_exhibit()
    exhibits = [
        plain._replace(
            rocs={},
            separation=plain.separation._replace(false_accepts=nothing, false_rejects=nothing),
        ),
        RankExhibit("empty", {}, {}),
        pair_exhibit("tiny", genuine=1, impostor=1),
        pair_exhibit("perfect", shift=1000.0),
        pair_exhibit("equal", shift=0.0)._replace(
            separation=separate(np.ones(4, np.float32), [0, 1, 0, 1]),
            rocs={"all": roc_curve(np.ones(4), [0, 1, 0, 1])},
        ),
        RankExhibit(
            "one rank",
            {"G1": np.array([0.5])},
            {"G1": (np.array([0.0, 1.0]), np.array([0.0, 1.0]))},
        ),
    ]
    page = page_of(tmp_path, exhibits=exhibits)
    assert len(page.images("svg")) == 1 + 0 + 3 + 3 + 3 + 2
    assert "every genuine pair scores above every impostor pair" in page.svg_texts()[5]


def test_page_stays_small(tmp_path):
    """A curve of a million points is thinned; a dozen such sets would stay under 3 MB."""
    steps = np.arange(1_000_001) / 1_000_000
    roc = Roc(steps, steps**0.2, 1 - steps, 1_000_000, 15_638_932)
    exhibits = [pair_exhibit("IJBC", 2000, 3000)._replace(rocs=dict.fromkeys(VARIANTS, roc))]
    page = page_of(tmp_path, exhibits=exhibits)
    assert "1e-6" in page.svg_texts()[0] and len(page.images("svg")[0]) < 60_000
    assert 12 * page.size < 3_000_000


def test_curves_against_loops():
    random = np.random.default_rng(3)
    roc = roc_curve(random.standard_normal(500) + np.arange(500) % 2, np.arange(500) % 2)
    rates = np.geomspace(1e-3, 1, 50)
    expected = [
        max(tpr for fpr, tpr in zip(roc.fpr, roc.tpr, strict=True) if fpr <= rate) for rate in rates
    ]
    np.testing.assert_array_equal(figures.step_values(rates, roc.fpr, roc.tpr), expected)
    x = np.append(0.0, np.sort(random.uniform(1e-4, 1, 5000)))
    kept, values = figures.thin(x, 2 * x)
    assert (
        len(kept) <= figures.POINTS
        and kept[0] == x[1]
        and kept[-1] == x[-1]
        and set(kept) <= set(x)
    )
    np.testing.assert_array_equal(values, 2 * kept)
    few = np.array([1.0, 0.1, 0.01])
    np.testing.assert_array_equal(figures.thin(few, few)[0], few[::-1])
    bins = Separation(np.linspace(0, 1, 101), np.arange(100), np.full(100, 2), None, None)
    edges, genuine, impostor = figures.merge_bins(bins)
    assert (
        len(edges) == 26
        and genuine.sum() == 4950
        and impostor.tolist() == [8] * 25
        and genuine[0] == 0 + 1 + 2 + 3
    )


# --- tables


def test_terminal_table():
    text = tables.format_results(all_results())
    lines = text.splitlines()
    assert lines[0].split() == [
        "pair",
        "set",
        "Accuracy-Flip",
        "±",
        "Std",
        "(%)",
        "XNorm",
    ] and lines[1].split() == ["lfw", "99.58", "±", "0.32", "22.37"]
    header, row = (
        next(line for line in lines if line.startswith(start))
        for start in ("IJBC TPR", "Norm:True_Det:True")
    )
    assert header.split()[-6:] == ["1e-6", "1e-5", "1e-4", "1e-3", "1e-2", "1e-1"]
    assert row.split()[1:] == [
        f"{value:.2f}{'†' if index < 3 else ''}"
        for index, value in enumerate(list(ijb_figures().values())[2:8])
    ]
    assert header.index("1e-3") + 3 == row.index(row.split()[4]) + 4, "columns end below each other"
    assert "threshold" not in text and text.count(tables.EXPLANATION) == 1
    assert tables.EXPLANATION not in tables.format_results(
        {"verification": {}, "ijb": {"IJBC": ijb_figures(10**7, 10**5)}, "tinyface": {}}
    )
    assert tables.format_results({"verification": {}, "ijb": {}, "tinyface": {}}) == ""


def test_figures_without_counts_are_not_marked():
    plain = {key: value for key, value in ijb_figures().items() if "_at_fpr_" in key}
    assert "†" not in tables.format_results(
        {"verification": {}, "ijb": {"IJBC": plain}, "tinyface": {}}
    )


@pytest.mark.parametrize(
    "rate, text", [(1e-6, "1e-6"), (0.0001, "1e-4"), (0.1, "1e-1"), (1.0, "1"), (0.00025, "2.5e-4")]
)
def test_short_rates(rate, text):
    assert tables.short(rate) == text


@pytest.mark.parametrize(
    "key, group",
    [
        ("verification.cfp.fp.Accuracy-Flip", "verification.cfp.fp"),
        ("ijb.IJB.C.Norm:True_Det:True_tpr_at_fpr_0.0001", "ijb.IJB.C"),
        ("ijb.IJBC.1N_G1.tpir_at_fpir_0.01", "ijb.IJBC"),
        ("ijb.IJBC.impostor_pairs", "ijb.IJBC"),
        ("tinyface.pad_0.1.rank-20", "tinyface.pad_0.1"),
    ],
)
def test_set_of_a_key(key, group):
    assert figure_keys.set_of(key) == group


# --- metrics of one checkpoint


def test_metrics_come_back(tmp_path):
    flat = figure_keys.flatten(all_results()) | {
        "ijb.IJBC.Norm:True_Det:True_thresh_at_fpr_1e-06": np.inf,
        'verification.odd, "name".XNorm': 1.5,
    }
    files.write_metrics(tmp_path / "x_metrics.csv", flat)
    header, *lines = read_table(tmp_path / "x_metrics.csv")
    assert header == ["metric", "value"] and lines == sorted(
        [key, f"{value:.6f}"] for key, value in flat.items()
    )
    back = files.read_metrics(tmp_path / "x_metrics.csv")
    assert back == pytest.approx(flat, abs=5e-7) and list(back) == sorted(flat)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no figures"),
        ("metric,value\n", "no figures"),
        ("key,number\n", "line 1 is not metric,value"),
        ("metric,value\ntinyface.x.rank-1,1.0\nverification.lfw.Acc", "line 3"),
        ("metric,value\ntinyface.x.rank-1,\n", "line 2"),
        ("metric,value\ntinyface.x.rank-1,nan\n", "line 2"),
        ("metric,value\nother.x.rank-1,1\n", "line 2"),
        ("metric,value\nrank-1,1\n", "line 2"),
        ("metric,value\n\0\0\0", "line 2"),
        ("\x89PNG", "line 1"),
        ("metric,value\n\n", "line 2"),
    ],
)
def test_damaged_metrics_name_the_line(tmp_path, content, message):
    path = tmp_path / "x_metrics.csv"
    path.write_text(content, "latin-1")
    with pytest.raises(InputError, match=f"x_metrics.csv: .*{message}"):
        files.read_metrics(path)


def test_json_is_strict(tmp_path):
    write_json(tmp_path / "x.json", {"ijb": {"IJBC": {"a": np.inf, "b": 0.1}}})
    text = (tmp_path / "x.json").read_text()
    assert (
        json.loads(text, parse_constant=lambda word: pytest.fail(word))
        == read_json(tmp_path / "x.json", advice=files.REMAKE)
        == {"ijb": {"IJBC": {"a": None, "b": 0.1}}}
    )
    for content in ("{", "[1]", "\xff"):
        (tmp_path / "x.json").write_text(content, "latin-1")
        with pytest.raises(InputError, match="x.json"):
            read_json(tmp_path / "x.json", advice=files.REMAKE)


# --- comparison of many


def rows_of(*accuracies, key="verification.lfw.Accuracy-Flip") -> list[Row]:
    return [
        Row(f"run_{step}backbone", "run", step, {} if accuracy is None else {key: accuracy})
        for step, accuracy in enumerate(accuracies)
    ]


def markdown_rows(text: str) -> list[list[str]]:
    return [
        re.split(r"(?<!\\) *\| ?", line)[1:-1] for line in text.splitlines() if line.startswith("|")
    ]


def test_markdown_compares_numbers_not_words():
    text = files.markdown(rows_of(0.9, 1.0, None, 0.89996), ["verification.lfw.Accuracy-Flip"])
    assert text.splitlines()[2:] == [
        "| checkpoint | lfw |",
        "|---|---|",
        "| run_0backbone | 90.00 |",
        "| run_1backbone | **100.00** |",
        "| run_2backbone |  |",
        "| run_3backbone | 90.00 |",
    ]


def test_summary_of_everything(tmp_path):
    rows = [
        Row(
            f"{run}_{step or 'best_'}backbone",
            run,
            step,
            figure_keys.flatten(all_results() | {"ijb": {"IJBC": ijb_figures(seed=seed)}}),
        )
        for seed, (run, step) in enumerate([("a$b", 10), ("a$b", 2), ("a$b", None), ("c|d", 5)])
    ]
    del rows[1].figures["verification.lfw.Accuracy-Flip"]
    files.write_summary(tmp_path, rows)
    names, *values = read_table(tmp_path / "summary.csv")
    table = [dict(zip(names, line, strict=True)) for line in values]
    assert [row["checkpoint"] for row in table] == [row.name for row in rows] and [
        row["step"] for row in table
    ] == ["10", "2", "", "5"]
    for line, row in zip(table, rows, strict=True):
        assert {key: value for key, value in line.items() if "." in key and value} == {
            key: f"{value:.6f}" for key, value in row.figures.items()
        }

    text = (tmp_path / "summary.md").read_text()
    header, _, *lines = markdown_rows(text)
    assert header == [
        "checkpoint",
        "cfp.fp",
        "lfw",
        "IJBC 1e-4",
        "IJBC 1e-5",
        "IJBC G1 rank-1",
        "IJBC G2 rank-1",
        "tinyface_pad_0.1 rank-1",
    ]
    assert [line[0] for line in lines] == [
        "a$b_10backbone",
        "a$b_2backbone",
        "a$b_best_backbone",
        r"c\|d_5backbone",
    ] and lines[1][2] == ""
    key = "ijb.IJBC.Norm:True_Det:True_tpr_at_fpr_0.0001"
    best = max(row.figures[key] for row in rows)
    assert [line[3] for line in lines] == [
        f"**{value:.2f}†**" if value == best else f"{value:.2f}†"
        for value in (row.figures[key] for row in rows)
    ]
    assert {line[7] for line in lines} == {"**63.20**"} and lines[0][5].strip(
        "*"
    ) == f"{100 * rows[0].figures['ijb.IJBC.1N_G1.top1']:.2f}"
    assert text.count(tables.EXPLANATION) == 1

    height, width, _ = cv2.imread(str(tmp_path / "summary.png")).shape
    assert width > height > 300
    # 6 figures of pair sets, 36 + 2 x 13 of the IJB set in twenties, 3 of TinyFace
    assert len(re.findall(rb"/Type /Page\b", (tmp_path / "metrics.pdf").read_bytes())) == 1 + 4 + 1
    assert {path.name for path in tmp_path.iterdir()} == {
        "summary.csv",
        "summary.md",
        "summary.png",
        "metrics.pdf",
    }


def test_pages_of_the_plots():
    groups = comparison_plots.group_by_page(list(figure_keys.flatten(all_results())))
    assert {title: len(keys) for title, keys in groups.items()} == {
        "verification": 6,
        "ijb.IJBC": 62,
        "tinyface": 3,
    }
    assert [key[-7:] for key in groups["tinyface"]] == [".rank-1", ".rank-5", "rank-20"]
    assert [
        key for key in groups["ijb.IJBC"] if key.startswith("ijb.IJBC.Norm:True_Det:True_tpr")
    ] == [f"ijb.IJBC.Norm:True_Det:True_tpr_at_fpr_{fpr}" for fpr in FPRS]


def test_drawing_leaves_out_what_is_not_finite(tmp_path):
    rows = rows_of(0.5, np.inf, None) + [
        Row("best_backbone", "run", None, {"verification.lfw.Accuracy-Flip": np.inf})
    ]
    with comparison_plots.drawing() as Figure:
        drawn = comparison_plots.draw_lines(
            Figure().subplots(), "verification.lfw.Accuracy-Flip", rows
        )
    assert {label: line.get_xydata().tolist() for label, line in drawn.items()} == {
        "run": [[0, 50]]
    }


@pytest.mark.parametrize("sort_by", ["lfw", "verification.lfw.Accuracy-Flip", "lfw.Accuracy-Flip"])
def test_summary_sorted(tmp_path, sort_by):
    rows = rows_of(0.3, None, 0.9, 0.5, None)
    for row in rows:
        row.figures["tinyface.x.rank-1"] = 10.0
    files.write_summary(tmp_path, rows, sort_by)
    expectation = [f"run_{step}backbone" for step in (2, 3, 0, 1, 4)]
    assert [line[0] for line in read_table(tmp_path / "summary.csv")] == [
        "checkpoint",
        *expectation,
    ]
    text = (tmp_path / "summary.md").read_text()
    assert [line[0] for line in markdown_rows(text)[2:]] == expectation and "sorted by lfw" in text
    assert [row.step for row in rows] == [0, 1, 2, 3, 4]


def test_sorted_by_what_no_headline_shows(tmp_path):
    rows = [
        Row(
            f"{step}backbone",
            "run",
            step,
            {"verification.lfw.Accuracy-Flip": 0.5, "verification.lfw.XNorm": norm},
        )
        for step, norm in enumerate((3.0, 22.123))
    ]
    files.write_summary(tmp_path, rows, "XNorm")
    assert markdown_rows((tmp_path / "summary.md").read_text())[0::2] == [
        ["checkpoint", "lfw", "lfw.XNorm"],
        ["1backbone", "**50.00**", "**22.12**"],
    ]


KEYS = sorted(figure_keys.flatten(all_results()))


@pytest.mark.parametrize(
    "name, key",
    [
        ("lfw", "verification.lfw.Accuracy-Flip"),
        ("cfp.fp", "verification.cfp.fp.Accuracy-Flip"),
        ("lfw.XNorm", "verification.lfw.XNorm"),
        ("rank-1", "tinyface.tinyface_pad_0.1.rank-1"),
        ("tinyface_pad_0.1", "tinyface.tinyface_pad_0.1.rank-1"),
        ("IJBC 1e-4", "ijb.IJBC.Norm:True_Det:True_tpr_at_fpr_0.0001"),
        ("IJBC G2 rank-1", "ijb.IJBC.1N_G2.top1"),
        ("Norm:False_Det:True_tpr_at_fpr_0.01", "ijb.IJBC.Norm:False_Det:True_tpr_at_fpr_0.01"),
        ("1N_G1.tpir_at_fpir_0.01", "ijb.IJBC.1N_G1.tpir_at_fpir_0.01"),
    ],
)
def test_names_of_metrics(name, key):
    assert figure_keys.find_metric(name, KEYS) == key


@pytest.mark.parametrize(
    "name, message",
    [
        ("XNorm", "'XNorm' is ambiguous: verification.cfp.fp.XNorm, verification.lfw.XNorm$"),
        (
            "IJBC",
            r"ambiguous: "
            r".*0\.0001, .*1e-05, .*top1, .*top1$",
        ),
        (
            "tpr_at_fpr_0.0001",
            "ambiguous: .*Norm:False_Det:True.*Norm:True_Det:False.*Norm:True_Det:True",
        ),
        ("top1", "ambiguous"),
        ("lwf", r"no such figure; the nearest: .*verification\.lfw"),
        ("Lfw", "nearest: verification.lfw"),
        (
            "rank-2",
            r"the "
            r"nearest: .*rank-20",
        ),
        ("zzzzzzzz", r"there are: .* and \d+ more$"),
        ("", "there are"),
    ],
)
def test_other_names_of_metrics(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        figure_keys.find_metric(name, KEYS)


def test_unknown_sort_writes_nothing(tmp_path):
    with pytest.raises(InputError, match="--sort-by 'agedb'"):
        files.write_summary(tmp_path, rows_of(0.5), "agedb")
    assert not any(tmp_path.iterdir())


# --- plot_curves: reads summary.csv


def test_curves_take_the_last_step_of_any_order(tmp_path):
    def accuracy(run, step, **sets):
        figures = {
            f"verification.{name}.Accuracy-{part}": value
            for name, value in sets.items()
            for part in ("Flip", "Std")
        }
        return Row(f"{run}{step}", run, step, figures)

    rows = [
        accuracy("a", 10, lfw=0.7),
        accuracy("a", 2, lfw=0.8),
        accuracy("a", None, lfw=0.9),
        accuracy("b", None, lfw=0.6, cfp=0.95),
        Row("c1", "c", 1, {"tinyface.x.rank-1": 5.0}),
    ]
    files.write_summary(tmp_path, rows, "lfw")
    actual = plot_curves.read_accuracies(tmp_path / "summary.csv")
    assert {
        run: {name: round(mean) for name, (mean, _) in sets.items()} for run, sets in actual.items()
    } == {"b": {"cfp": 95, "lfw": 60}, "a": {"lfw": 70}}
    table = [line.split() for line in plot_curves.format_table(actual).splitlines()]
    assert table[0] == ["accuracy", "in", "%", "cfp", "lfw"] and table[2] == [
        "a",
        "70.00",
        "±",
        "70.00",
    ]
    plot_curves.draw({"a": [{"step": 1, "loss": 2.0}]}, actual, tmp_path / "curves.png")
    assert cv2.imread(str(tmp_path / "curves.png")) is not None
    files.write_summary(tmp_path, rows[-1:])
    with pytest.raises(InputError, match="summary.csv has no accuracy on a pair set"):
        plot_curves.read_accuracies(tmp_path / "summary.csv")


def test_seeds_of_a_method_are_one_row(tmp_path):
    """The same configuration but for seed and output; the rest stands alone."""
    key, other = "verification.lfw.Accuracy-Flip", "verification.lfw.XNorm"
    ada = dict(method="AdaDistill", loss="ArcFace", m=None)
    runs = {
        # run: (configuration, accuracy)
        "ada_seed1": (ada | dict(seed=1, output="a", global_step=0), 0.5),
        "ada_seed12": (ada | dict(seed=12, output="b", global_step=3), 0.9),
        "ada_seed3": (ada | dict(seed=3, output="c", global_step=0), 0.7),
        "aml": (ada | dict(method="AMLDistill", seed=1, output="d"), 0.6),
        "cos": (ada | dict(loss="CosFace", seed=2, output="e"), 0.4),
        "copy": (ada | dict(loss="CosFace", seed=2, output="f"), 0.4),
        "released": ({}, 0.8),
        "published": ({}, 0.3),
    }
    rows = []
    for name, (_, accuracy) in runs.items():
        figures = {key: accuracy, f"{key}-95.low": 0.1, f"{key}-95.high": 0.9, other: 20.0}
        rows.append(Row(f"{name}_5backbone", name, 5, figures))
    del rows[1].figures[other]
    configurations = [configuration for configuration, _ in runs.values()]
    # another step is another row
    rows.append(Row("aml_9backbone", "aml", 9, {key: 0.65, other: 20.0}))
    configurations.append(runs["aml"][0])
    methods = seeds.group_by_method(rows, configurations)
    assert seeds.write_seeds(tmp_path, methods)
    head, _, *lines = markdown_rows((tmp_path / "seeds.md").read_text())
    assert head == ["runs", "checkpoint", "seeds", "lfw"]
    # deviations -20, 20, 0: sqrt(800 / 2)
    assert lines == [
        ["ada_seed*", "5backbone", "1, 12, 3", "70.00 ± 20.00"],
        ["aml", "5backbone", "1", "60.00"],
        ["cos", "5backbone", "2", "40.00"],
        ["copy", "5backbone", "2", "40.00"],
        ["released", "5backbone", "", "80.00"],
        ["published", "5backbone", "", "30.00"],
        ["aml", "9backbone", "1", "65.00"],
    ]
    head, first, second, *_ = read_table(tmp_path / "seeds.csv")
    assert head == ["runs", "checkpoint", "seeds", key, f"{key}-spread", other, f"{other}-spread"]
    # a figure that one seed lacks has no mean
    assert first[3:] == ["0.700000", "0.200000", "", ""]
    assert second[3:] == ["0.600000", "", "20.000000", ""]

    assert not seeds.write_seeds(tmp_path, methods[1:])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "first, second, names",
    [
        ("features32_1 features32_2", "features64_1 features64_2", "features32_* features64_*"),
        ("ada_m0.3-1 ada_m0.3-2", "ada_m0.5-1 ada_m0.5-2", "ada_m0.3-* ada_m0.5-*"),
        ("seed1_alone seed2_alone", "seed1_ada seed2_ada", "seed*_alone seed*_ada"),
        # one pattern would be that of both
        ("run1 run3", "run2 run4", "run1,run3 run2,run4"),
        ("1 2", "", "1,2"),
    ],
)
def test_the_name_of_several_runs_is_that_of_no_others(first, second, names):
    rows, configurations = [], []
    for margin, runs in enumerate((first.split(), second.split())):
        for seed, run in enumerate(runs):
            rows.append(Row(f"{run}_5backbone", run, 5, {}))
            configurations.append(dict(method="AdaDistill", m=margin, seed=seed))
    methods = seeds.group_by_method(rows, configurations)
    assert [method.runs for method in methods] == [
        name.replace(",", ", ") for name in names.split()
    ]


def test_runs_whose_method_is_not_known_are_no_seeds_of_one():
    rows = [Row(f"{run}_5backbone", run, 5, {}) for run in ("a1", "a2")]
    methods = seeds.group_by_method(rows, [dict(seed=1), dict(seed=2)])
    assert [method.runs for method in methods] == ["a1", "a2"]


def test_the_mark_of_a_mean(tmp_path):
    """Two seeds on an IJB set too small for a false accept rate of 1e-4."""
    rows = []
    for seed in (1, 2):
        results = all_results() | {"ijb": {"IJBC": ijb_figures(seed=seed)}}
        rows.append(Row(f"{seed}_5backbone", str(seed), 5, figure_keys.flatten(results)))
    key = "ijb.IJBC.Norm:True_Det:True_tpr_at_fpr_0.0001"
    low, high = sorted(row.figures[key] for row in rows)
    method = dict(method="AdaDistill")
    methods = seeds.group_by_method(rows, [method | dict(seed=1), method | dict(seed=2)])
    seeds.write_seeds(tmp_path, methods)
    head, _, line = markdown_rows((tmp_path / "seeds.md").read_text())
    spread = (high - low) / 2**0.5
    assert line[head.index("IJBC 1e-4")] == f"{(low + high) / 2:.2f}† ± {spread:.2f}"
