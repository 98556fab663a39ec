"""report.html: everything about one evaluated checkpoint on one page that needs no other file, no
network and no script.
"""

import base64
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

import cv2
import numpy as np

from eval.report import figures
from eval.report.tables import EXPLANATION, MARK, Table, tabulate
from eval.roc import Roc, Separation
from utils.files import replacing
from utils.images import resize_and_crop

MOST_PAIRS = 8  # hardest pairs of a kind that a set shows
THUMBNAIL = (112, 112)
QUALITY = 82  # of the thumbnails' JPEG


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


class RankExhibit(NamedTuple):
    """What a search in a gallery shows.

    tpir: {curve: (fpir, tpir)}, fractions; misses: (images, caption) of probes whose mate came
    late, e.g. probe, the wrong first, the mate.
    """

    set_name: str
    cmc: dict[str, np.ndarray]
    tpir: dict[str, tuple[np.ndarray, np.ndarray]]
    misses: Sequence[tuple[Sequence[np.ndarray], str]] = ()


def write_page(
    path: str | Path,
    title: str,
    results: dict,
    exhibits: Sequence[PairExhibit | RankExhibit],
    settings: dict,
    notes: Sequence[str] = (),
) -> None:
    """Write the page of one checkpoint, by write-then-rename.

    title: the checkpoint; further lines of it (network, how it was run) stand below. results: as
    ``Evaluator.evaluate_checkpoint`` returns them. settings: {name: value}, where a value that is a
    dict becomes a table of its own. notes: what a reader must know, e.g. skipped sets.
    """
    tables = tabulate(results)
    sets = {
        name: [exhibit for exhibit in exhibits if exhibit.set_name == name]
        for name in dict.fromkeys(exhibit.set_name for exhibit in exhibits)
    }
    marked = any(
        MARK in cell for table in tables for cells in table.rows.values() for cell in cells
    )
    heading, *below = title.splitlines()
    body = [
        f"<header><h1>{escape(heading)}</h1>{''.join(f'<p>{escape(line)}</p>' for line in below)}{show_links(sets)}</header>",
        "<main>",
        "<section><h2>Results</h2>",
        *map(show_table, tables),
        f"<p class='note'>{escape(EXPLANATION)}.</p>" if marked else "",
        "</section>",
        show_notes(notes),
        *(
            f"<section id='set-{number}'><h2>{escape(name)}</h2>{show_exhibits(of_set)}</section>"
            for number, (name, of_set) in enumerate(sets.items())
        ),
        show_settings(settings),
        "</main>",
    ]
    with replacing(str(path)) as file:
        page = PAGE.substitute(title=escape(heading), body="\n".join(filter(None, body)))
        # the name of a file or folder may be no UTF-8
        file.write(page.encode("utf-8", "backslashreplace"))


def show_links(sets) -> str:
    links = "".join(
        f"<a href='#set-{number}'>{escape(name)}</a>" for number, name in enumerate(sets)
    )
    return f"<nav>{links}<a href='#settings'>Configuration</a></nav>"


def show_table(table: Table) -> str:
    head = "".join(
        f"<th scope='col'>{escape(cell)}</th>" for cell in [table.corner, *table.columns]
    )
    rows = "".join(
        "<tr><th "
        f"scope='row'>{escape(name)}</th>{''.join(f'<td>{show_cell(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in table.rows.items()
    )
    text = (
        "<div "
        f"class='wide'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    if table.minor:
        return f"<details><summary>{escape(table.title)}</summary>{text}</details>"
    return f"<h3>{escape(table.title)} <small>{escape(table.remark)}</small></h3>{text}"


def show_cell(cell: str) -> str:
    return escape(cell).replace(MARK, f"<sup>{MARK}</sup>")


def show_notes(notes: Sequence[str]) -> str:
    return (
        f"<section><h2>Notes</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul></section>"
        if notes
        else ""
    )


def show_settings(settings: dict) -> str:
    """A closed table for the plain values and one for each group of them."""
    plain = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    groups = ({"Run": plain} if plain else {}) | {
        key: value for key, value in settings.items() if isinstance(value, dict)
    }
    tables = "".join(
        f"<details><summary>{escape(str(name))}</summary>"
        "<table "
        f"class='settings'><tbody>{''.join(map(show_setting, spread(group)))}</tbody></table></details>"
        for name, group in groups.items()
    )
    return f"<section id='settings'><h2>Configuration</h2>{tables}</section>"


def spread(group: dict) -> list[tuple[str, object]]:
    """(dotted key, value) of everything in it, in its order."""
    return [
        (f"{key}.{inner}" if inner else str(key), value)
        for key, values in group.items()
        for inner, value in (spread(values) if isinstance(values, dict) else [("", values)])
    ]


def show_setting(item: tuple[str, object]) -> str:
    key, value = item
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return f"<tr><th scope='row'>{escape(key)}</th><td>{escape(text)}</td></tr>"


# --- the curves and pictures of a set
# --------------------------------------------------


def show_exhibits(exhibits: Sequence[PairExhibit | RankExhibit]) -> str:
    """All plots of a set, then its pictures."""
    parts = [
        pair_parts(exhibit) if isinstance(exhibit, PairExhibit) else rank_parts(exhibit)
        for exhibit in exhibits
    ]
    plots, strips = ("".join(html for part in parts for html in part[place]) for place in (0, 1))
    return f"<div class='plots'>{plots}</div>{strips}"


def pair_parts(exhibit: PairExhibit) -> tuple[list[str], list[str]]:
    name, separation = exhibit.set_name, exhibit.separation
    plots = [show_plot(figures.draw_rocs(exhibit.rocs), f"ROC of {name}")] if exhibit.rocs else []
    plots.append(
        show_plot(
            figures.draw_separation(
                separation, next(iter(exhibit.rocs.values()), None), exhibit.score_name
            ),
            f"score histograms of {name}",
        )
    )
    strips = [
        show_strips(
            title,
            [
                (exhibit.images(pair), f"{exhibit.scores_of(pair):.4f} · {exhibit.captions(pair)}")
                for pair in map(int, pairs[:MOST_PAIRS])
            ],
        )
        for title, pairs in (
            (
                "Hardest false accepts: different people with the highest scores",
                separation.false_accepts,
            ),
            (
                "Hardest false rejects: the same person with the lowest scores",
                separation.false_rejects,
            ),
        )
    ]
    return plots, strips


def rank_parts(exhibit: RankExhibit) -> tuple[list[str], list[str]]:
    plots = (
        [show_plot(figures.draw_cmc(exhibit.cmc), f"CMC of {exhibit.set_name}")]
        if exhibit.cmc
        else []
    )
    plots += (
        [show_plot(figures.draw_tpir(exhibit.tpir), f"TPIR against FPIR of {exhibit.set_name}")]
        if exhibit.tpir
        else []
    )
    return plots, [show_strips("Hardest searches: the mate came last", exhibit.misses[:MOST_PAIRS])]


def show_strips(title: str, strips: Sequence[tuple[Sequence[np.ndarray], str]]) -> str:
    """Pictures side by side with a caption, for each pair or search."""
    shown = "".join(
        f"<figure>{''.join(map(show_thumbnail, images))}<figcaption>{escape(caption)}</figcaption></figure>"
        for images, caption in strips
    )
    return f"<h3>{escape(title)}</h3><div class='strips'>{shown}</div>" if shown else ""


def show_plot(svg: str, description: str) -> str:
    # As an image, not inline: the identifiers inside several SVGs cannot meet.
    return (
        f"<img class='plot' alt='{escape(description)}' "
        f"src='data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}'>"
    )


def show_thumbnail(image: np.ndarray) -> str:
    small = resize_and_crop(np.ascontiguousarray(image), THUMBNAIL)
    _, jpeg = cv2.imencode(
        ".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    )
    return (
        "<img alt='face' width='112' height='112' "
        f"src='data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}'>"
    )


PAGE = Template("""<!DOCTYPE html>
<html lang='en'>
<head>
<meta charset='utf-8'>
<meta name='viewport' content='width=device-width, initial-scale=1'>
<meta http-equiv='Content-Security-Policy' content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { --ink: #1c1e21; --soft: #667; --line: #d9dce1; --paper: #fff; --shade: #f5f6f8; --link: #2166ac; color-scheme: light dark }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e5e8; --soft: #99a; --line: #3a3d44; --paper: #16181c; --shade: #1e2126; --link: #7fb2e5 }
  .plot { filter: invert(0.88) hue-rotate(180deg) }
}
body { margin: 0 auto; max-width: 1120px; padding: 2rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif }
header { border-bottom: 2px solid var(--ink); padding-bottom: .8rem }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere }
header p { margin: .15rem 0; color: var(--soft); overflow-wrap: anywhere }
nav { margin-top: .6rem } nav a { margin-right: 1.2rem; color: var(--link); text-decoration: none } nav a:hover { text-decoration: underline }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .4rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line) }
h3 { font-size: .95rem; margin: 1.4rem 0 .4rem } small { color: var(--soft); font-weight: normal; margin-left: .5rem }
.wide { margin-bottom: .4rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { padding: .28rem .8rem; text-align: right; white-space: nowrap; font-weight: normal }
thead th { border-bottom: 1px solid var(--ink); color: var(--soft) }
tbody tr { border-bottom: 1px solid var(--line) } tbody tr:hover { background: var(--shade) }
th:first-child { text-align: left; padding-left: 0 } td sup { position: absolute; line-height: 1 }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere } .settings th { color: var(--soft); vertical-align: top }
summary { cursor: pointer; color: var(--link); margin: .5rem 0 } .note { color: var(--soft); font-size: .88rem }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; margin: .8rem 0 } .plot { width: 545px; max-width: 100%; height: auto }
.strips { display: flex; flex-wrap: wrap; gap: .9rem 1.2rem } figure { margin: 0; display: table }
figure img { display: inline-block; margin-right: 3px; border-radius: 3px; vertical-align: top }
figcaption { display: table-caption; caption-side: bottom; font-size: .8rem; color: var(--soft); font-variant-numeric: tabular-nums }
@media print { details::details-content { content-visibility: visible } section { break-inside: avoid-page } }
</style>
</head>
<body>
$body
</body>
</html>
""")
