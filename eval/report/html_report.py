"""report.html: everything about one evaluated checkpoint on one page that needs no other file, no
network and no script. template.html is the page, what fills it is gathered here.
"""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eval.quality import RejectCurves
from eval.report import figures
from eval.report.group_tables import list_panels, tabulate_groups
from eval.report.tables import EXPLANATION, MARK, tabulate
from eval.roc import Roc, Separation
from utils.files import write_text
from utils.images import resize_and_crop

# hardest pairs of a kind that a set shows
MOST_PAIRS = 8
THUMBNAIL = (112, 112)
# of the thumbnails' JPEG
QUALITY = 82

# images (uint8 RGB) side by side and their caption
Strip = tuple[Sequence[np.ndarray], str]


# how to read a plot, below it
CAPTIONS = {
    "ROC": "Genuine pairs that are accepted against impostor pairs that are. Higher is better; the "
    "dots are the operating points of the table.",
    "DET": "The share of genuine pairs rejected (FNMR) against that of impostor pairs accepted "
    "(FMR), both on normal-deviate axes. Lower is better; scores with normal distributions give a "
    "straight line. A curve meets the dotted line at its equal error rate.",
    "histograms": "Scores of the two kinds of pair, logarithmic. The less they overlap the better.",
    "rejects": "FNMR of the pairs that are left when the faces with the smallest feature norms "
    "are rejected, at the threshold that gives all pairs the FMR. A falling curve: the norm tells "
    "a good picture from a bad one. The dotted level: rejected at random.",
    "groups": "A dot for each group of people, with its 95 % interval if that was asked for; the "
    "worst group in red. FMR and FNMR are those at one threshold for all groups.",
    "CMC": "Searches whose mate is among the k best. Higher is better.",
    "TPIR": "Searches that find their mate above the threshold, against those of people who are "
    "not in the gallery and find somebody. Higher is better.",
}


class Plot(NamedTuple):
    """description, caption: what it shows, and how to read it."""

    description: str
    caption: str
    svg: str


class PairExhibit(NamedTuple):
    """What a set of pairs shows: its curves, the scores of its first variant, and how to get the
    pictures of a pair by its index.
    """

    set_name: str
    rocs: dict[str, Roc]
    separation: Separation
    images: Callable[[int], tuple[np.ndarray, np.ndarray]]  # uint8 RGB (H, W, 3)
    captions: Callable[[int], str]
    score_name: str
    scores_of: Callable[[int], float]
    # {FAR: {"cosine-95": interval, "tar-95": interval}} of thresholds.json
    intervals: dict[float, dict] = {}
    rejects: RejectCurves | None = None

    def plots(self) -> list[Plot]:
        first = next(iter(self.rocs.values()), None)
        plots = []
        if self.rocs:
            plots.append(Plot("ROC", CAPTIONS["ROC"], figures.draw_rocs(self.rocs)))
            plots.append(Plot("DET", CAPTIONS["DET"], figures.draw_dets(self.rocs)))
        histograms = figures.draw_separation(self.separation, first, self.score_name)
        plots.append(Plot("score histograms", CAPTIONS["histograms"], histograms))
        if self.rejects and self.rejects.fnmr:
            curves = figures.draw_rejects(self.rejects)
            plots.append(Plot("error versus reject", CAPTIONS["rejects"], curves))
        return plots

    def strips(self) -> dict[str, list[Strip]]:
        """{title: the hardest pairs of a kind}."""
        return {
            "Hardest false accepts: different people with the highest scores": self.strips_of(
                self.separation.false_accepts
            ),
            "Hardest false rejects: the same person with the lowest scores": self.strips_of(
                self.separation.false_rejects
            ),
        }

    def strips_of(self, pairs: np.ndarray) -> list[Strip]:
        return [
            (self.images(pair), f"{self.scores_of(pair):.4f} · {self.captions(pair)}")
            for pair in map(int, pairs[:MOST_PAIRS])
        ]


class RankExhibit(NamedTuple):
    """What a search in a gallery shows.

    tpir: {curve: (fpir, tpir)}, fractions; misses: (images, caption) of probes whose mate came
    late, e.g. probe, the wrong first, the mate.
    """

    set_name: str
    cmc: dict[str, np.ndarray]
    tpir: dict[str, tuple[np.ndarray, np.ndarray]]
    misses: Sequence[Strip] = ()

    def plots(self) -> list[Plot]:
        plots = []
        if self.cmc:
            plots.append(Plot("CMC", CAPTIONS["CMC"], figures.draw_cmc(self.cmc)))
        if self.tpir:
            curves = figures.draw_tpir(self.tpir)
            plots.append(Plot("TPIR against FPIR", CAPTIONS["TPIR"], curves))
        return plots

    def strips(self) -> dict[str, Sequence[Strip]]:
        return {"Hardest searches: the mate came last": self.misses[:MOST_PAIRS]}


class GroupExhibit(NamedTuple):
    """What a set shows of its groups.

    panels: {figure: ({group: (value, low, high)}, worst group)}; low and high are NaN without
    intervals.
    """

    set_name: str
    panels: dict[str, tuple[dict[str, tuple[float, float, float]], str]]

    def plots(self) -> list[Plot]:
        return [Plot("groups", CAPTIONS["groups"], figures.draw_groups(self.panels))]

    def strips(self) -> dict[str, Sequence[Strip]]:
        return {}


Exhibit = PairExhibit | RankExhibit | GroupExhibit


class SetSection(NamedTuple):
    """The section of a set: its plots, and (title, strips) of its pictures."""

    name: str
    plots: list[Plot]
    galleries: list[tuple[str, Sequence[Strip]]]


def write_page(
    path: str | Path,
    title: str,
    results: dict,
    exhibits: Sequence[Exhibit],
    settings: dict,
    notes: Sequence[str] = (),
) -> None:
    """Write the page of one checkpoint, by write-then-rename.

    title: the checkpoint; further lines of it (network, how it was run) stand below. results: as
    ``Evaluator.evaluate_checkpoint`` returns them. settings: {name: value}, where a value that is a
    dict becomes a table of its own. notes: what a reader must know, e.g. skipped sets.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["split_cell"] = split_cell
    environment.filters["thumbnail"] = encode_thumbnail
    # an SVG as an image, not inline: the identifiers inside several of them cannot meet
    environment.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    tables = tabulate(results) + tabulate_groups(results)
    exhibits = [*exhibits, *list_group_exhibits(results)]
    heading, *subtitle = title.splitlines()
    page = environment.get_template("template.html").render(
        heading=heading,
        subtitle=subtitle,
        tables=tables,
        mark=MARK,
        is_marked=any(table.is_marked() for table in tables),
        explanation=EXPLANATION,
        notes=notes,
        sections=list_sections(exhibits),
        settings=group_settings(settings),
    )
    write_text(path, page)


def list_group_exhibits(results: dict) -> list[GroupExhibit]:
    exhibits = []
    for kind, sets in results.get("groups", {}).items():
        for name, comparison in sets.items():
            panels = list_panels(kind, name, comparison)
            if panels:
                exhibits.append(GroupExhibit(name, panels))
    return exhibits


def list_sections(exhibits: Sequence[Exhibit]) -> list[SetSection]:
    """A section for each set, in the order of its first exhibit."""
    sections = {exhibit.set_name: SetSection(exhibit.set_name, [], []) for exhibit in exhibits}
    for exhibit in exhibits:
        section = sections[exhibit.set_name]
        section.plots.extend(exhibit.plots())
        section.galleries.extend(exhibit.strips().items())
    return list(sections.values())


def split_cell(cell: str) -> tuple[str, bool, str]:
    """(figure, whether it is marked, its interval or "") of a table's cell."""
    value, bracket, limits = cell.replace(MARK, "").partition(" [")
    return value, MARK in cell, bracket.strip() + limits


def encode_thumbnail(image: np.ndarray) -> str:
    """A small JPEG of (H, W, 3) uint8 RGB, in base64."""
    small = resize_and_crop(np.ascontiguousarray(image), THUMBNAIL)
    bgr = cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
    _, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return base64.b64encode(jpeg).decode()


def group_settings(settings: dict) -> dict[str, list[tuple[str, str]]]:
    """A table of (key, text) for the plain values, then one for each group of them."""
    plain = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    groups = {key: value for key, value in settings.items() if isinstance(value, dict)}
    if plain:
        groups = {"Run": plain} | groups
    return {
        name: [(key, text_of(value)) for key, value in spread(group)]
        for name, group in groups.items()
    }


def spread(group: dict, prefix: str = "") -> list[tuple[str, object]]:
    """(dotted key, value) of everything in it, in its order."""
    items = []
    for key, value in group.items():
        if isinstance(value, dict):
            items += spread(value, f"{prefix}{key}.")
        else:
            items.append((f"{prefix}{key}", value))
    return items


def text_of(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
