"""Evaluation protocols on given features: ours against straightforward loops, on made-up data with
the shapes of IJB-C, TinyFace and LFW.

    python bench/evaluation.py             # an eighth of the images and pairs: a minute or two
    python bench/evaluation.py --full              # all of them: about seven minutes and 5 GB
    python bench/evaluation.py --limits    # only ours, full size, beside time and memory limits

The loops do what published evaluators do: search all images for those of each template, average
media by media, fetch two rows for each pair, sort the whole gallery for each probe, try every
threshold on every fold. Both must give the same figures, else this ends with an error. Both run in
this process, in turns; short ones several times, of which the median counts. Memory is the
process's peak, inputs included.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])

from sklearn.metrics import roc_curve

from bench.plain import plain_verification
from bench.processes import resident, start_peak
from eval import ijb, tinyface, verification
from utils.errors import InputError, run
from utils.files import replacing

DIMENSIONS = 512
IJBC = {
    "images": 469_375,
    "templates": 23_124,
    "medias": 138_836,
    "people": 3_531,
    "genuine": 19_557,
    "impostor": 15_638_932,
    "first gallery": 1_772,
}
TINYFACE = {"people": 2_569, "probes": 3_728, "gallery": 4_443, "distractors": 153_428}
PAIRS = 6_000
ROUNDS, ENOUGH = 7, 5.0  # repeat until one of both is reached: times, seconds of ours


class Work(NamedTuple):
    name: str
    plain: Callable[[], dict]
    ours: Callable[[], dict]
    seconds: float  # limits of ours at full size, on 2 CPU cores
    gigabytes: float | None


def main() -> None:
    arguments = parse_arguments()
    scale = 1 if arguments.full or arguments.limits else 8
    size = "full size" if scale == 1 else f"1/{scale} of the images and pairs"
    print(
        f"{size}; seconds, and peak memory of the process in GB\n{header(arguments.limits)}",
        flush=True,
    )
    rows = []
    for work in workloads(scale):
        rows.append(measure_ours(work) if arguments.limits else measure_both(work))
        print(line(rows[-1]), flush=True)
    if arguments.json:
        with replacing(str(arguments.json), "w") as file:
            file.write(json.dumps({"scale": scale, "rows": rows}, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="full sizes")
    size.add_argument(
        "--limits", action="store_true", help="only ours, full sizes, beside the limits"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser.parse_args()


def workloads(scale: int) -> Iterator[Work]:
    """One after the other, so that memory holds the data of one."""
    images, pairs, searches = make_ijb(scale)
    yield Work(
        "IJB-C 1:1, three variants",
        lambda: plain_ijb(*images, *pairs),
        lambda: ijb.evaluate(*images, *pairs),
        45,
        6,
    )
    yield Work(
        "IJB-C 1:N, two galleries",
        lambda: join(plain_1n(*images, *search) for search in searches),
        lambda: join(ijb.evaluate_1n(*images, *search) for search in searches),
        10,
        None,
    )
    del images, pairs, searches
    faces = make_tinyface(scale)
    yield Work(
        "TinyFace", lambda: plain_tinyface(*faces), lambda: tinyface.evaluate(*faces), 15, None
    )
    del faces
    embeddings, issame = make_pairs()
    yield Work(
        "pair set, ten folds",
        lambda: plain_verification(embeddings, issame),
        lambda: dict(
            zip(("accuracy", "val"), verification.evaluate(embeddings, issame)[2:4], strict=True)
        ),
        0.1,
        None,
    )


# --- measuring
# --------------------------------------------------


def measure_both(work: Work) -> dict:
    plain, ours = [], []
    while not ours or (
        len(ours) < ROUNDS and sum(seconds for seconds, _, _ in ours + plain) < ENOUGH
    ):
        plain.append(timed(work.plain))
        ours.append(timed(work.ours))
    check_equal(work.name, plain[-1][2], ours[-1][2])
    row = {"what": work.name, "plain": median(plain), "ours": median(ours)}
    return row | {
        "ratio": row["plain"] / row["ours"],
        "plain_peak": max(peak for _, peak, _ in plain),
        "ours_peak": max(peak for _, peak, _ in ours),
    }


def measure_ours(work: Work) -> dict:
    ours = [timed(work.ours)]
    while len(ours) < ROUNDS and sum(seconds for seconds, _, _ in ours) < ENOUGH:
        ours.append(timed(work.ours))
    return {
        "what": work.name,
        "ours": median(ours),
        "limit": work.seconds,
        "ours_peak": max(peak for _, peak, _ in ours),
        "limit_peak": work.gigabytes,
    }


def timed(function: Callable[[], dict]) -> tuple[float, float, dict]:
    """Seconds, peak resident memory in GB, result."""
    start_peak()
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    return seconds, resident("VmHWM") / 1e9, result


def median(runs: list[tuple[float, float, dict]]) -> float:
    return statistics.median(seconds for seconds, _, _ in runs)


def check_equal(name: str, plain: dict, ours: dict) -> None:
    """The loops work in float64, ours in float32: scores that differ by less than that can change
    places, so a rate may differ by 1 in 5,000.
    """
    for key in plain.keys() | ours.keys():
        if not np.allclose(plain[key], ours[key], rtol=2e-4, atol=1e-6):
            raise InputError(f"{name}: {key} is {plain[key]} by the loops, {ours[key]} by ours")


def header(limits: bool) -> str:
    columns = (
        ("ours", "limit", "peak", "limit")
        if limits
        else ("plain", "ours", "ratio", "peak plain", "peak ours")
    )
    return f"{'':28}" + "".join(f"{column:>12}" for column in columns)


def line(row: dict) -> str:
    cells = [
        f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)
        for key, value in row.items()
        if key != "what"
    ]
    return f"{row['what']:28}" + "".join(f"{cell:>12}" for cell in cells)


def three_passes(scale: int) -> float:
    """Seconds to fetch the two rows of every pair three times, at the speed at which this machine
    copies memory.
    """
    block = np.ones(1 << 26, np.float32)
    target = np.empty_like(block)
    copies = []
    for _ in range(5):
        start = time.perf_counter()
        torch.from_numpy(target).copy_(torch.from_numpy(block))
        copies.append(time.perf_counter() - start)
    bytes_a_second = 2 * block.nbytes / statistics.median(copies)
    return 3 * (IJBC["genuine"] + IJBC["impostor"]) // scale * 2 * DIMENSIONS * 4 / bytes_a_second


def join(results: Iterator[dict]) -> dict:
    return {
        f"{number} {key}": value
        for number, result in enumerate(results, 1)
        for key, value in result.items()
    }


# --- data
# --------------------------------------------------


def faces_of(person: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """(N, 512) float32 features of various norms: a direction for each person, and noise; person -1
    has noise alone.
    """
    directions = rng.standard_normal((person.max() + 2, DIMENSIONS), dtype=np.float32)
    directions[-1] = 0
    faces = np.empty((len(person), DIMENSIONS), np.float32)
    for start in range(0, len(person), 10_000):
        part = person[start : start + 10_000]
        faces[start : start + 10_000] = directions[part] + noise * rng.standard_normal(
            (len(part), DIMENSIONS), dtype=np.float32
        )
    return faces * rng.uniform(0.5, 1.5, (len(faces), 1)).astype(np.float32)


def make_ijb(scale: int) -> tuple[tuple, tuple, list[tuple]]:
    """Images in random order, pairs of random templates, and the lists of two galleries: person n
    has gallery template n, all others are probes.
    """
    rng = np.random.default_rng(0)
    size = {name: number // scale for name, number in IJBC.items()}
    people, templates = size["people"], size["templates"]
    person = np.append(np.arange(people), rng.integers(0, people, templates - people))
    of_image = np.append(
        np.arange(templates), rng.integers(0, templates, size["images"] - templates)
    )
    rng.shuffle(of_image)
    faceness_scores, medias = (
        rng.uniform(0.5, 1, len(of_image)).astype(np.float32),
        rng.integers(0, size["medias"], len(of_image)),
    )
    images = faces_of(person[of_image], 8, rng), faceness_scores, of_image, medias

    p1, p2 = rng.integers(0, templates, (2, size["genuine"] + size["impostor"]))
    # probe templates, person by person
    probes_of = np.argsort(person[people:], kind="stable") + people
    first = rng.integers(0, len(probes_of) - 1, size["genuine"])
    p1[: size["genuine"]], p2[: size["genuine"]] = probes_of[first], probes_of[first + 1]
    order = rng.permutation(len(p1))
    p1, p2 = p1[order], p2[order]
    pairs = (person[p1] == person[p2]).astype(np.int64), p1, p2

    probes = np.arange(people, templates)
    galleries = np.split(np.arange(people), [size["first gallery"]])
    return (
        images,
        pairs,
        [(gallery, person[gallery], probes, person[probes]) for gallery in galleries],
    )


def make_tinyface(scale: int) -> tuple[np.ndarray, list[str], dict]:
    rng = np.random.default_rng(1)
    size = {name: number // scale for name, number in TINYFACE.items()}
    person = {
        "Probe": rng.integers(0, size["people"], size["probes"]),
        "Gallery_Distractor": np.full(size["distractors"], -1),
        "Gallery_Match": np.append(
            np.arange(size["people"]),
            rng.integers(0, size["people"], size["gallery"] - size["people"]),
        ),
    }
    paths = {
        role: [f"{role}/{one}_{role}{index}.jpg" for index, one in enumerate(people)]
        for role, people in person.items()
    }
    meta = {
        "probe_paths": paths["Probe"],
        "gallery_paths": paths["Gallery_Match"],
        "distractor_paths": paths["Gallery_Distractor"],
    }
    return (
        faces_of(np.concatenate(list(person.values())), 3, rng),
        [path for role in paths.values() for path in role],
        meta,
    )


def make_pairs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    issame = np.arange(PAIRS) % 600 < 300
    person = np.arange(2 * PAIRS)
    person[1::2][issame] = person[0::2][issame]
    embeddings = faces_of(person, 3, rng)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), issame


# --- the plain way
# --------------------------------------------------


def plain_templates(
    embeddings: np.ndarray, templates: np.ndarray, medias: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    features = np.zeros((len(wanted), embeddings.shape[1]))
    for row, template in enumerate(wanted):
        members = np.where(templates == template)[0]
        for media in np.unique(medias[members]):
            features[row] += embeddings[members[medias[members] == media]].mean(axis=0)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def plain_ijb(embeddings, faceness_scores, templates, medias, label, p1, p2) -> dict:
    figures = {}
    for variant in ijb.VARIANTS:
        weighted = (
            embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
            if "Norm:False" in variant
            else embeddings
        )
        weighted = weighted * faceness_scores[:, None] if "Det:True" in variant else weighted
        ids = np.unique(templates)
        features = plain_templates(weighted, templates, medias, ids)
        row = np.zeros(ids.max() + 1, int)
        row[ids] = np.arange(len(ids))
        scores = np.zeros(len(p1))
        for start in range(0, len(p1), 100_000):
            part = slice(start, start + 100_000)
            scores[part] = np.sum(features[row[p1[part]]] * features[row[p2[part]]], axis=1)
        fpr, tpr, thresholds = (column[::-1] for column in roc_curve(label, scores))
        for wanted in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
            nearest = np.argmin(abs(fpr - wanted))
            figures[f"{variant}_tpr_at_fpr_{wanted}"] = 100 * tpr[nearest]
            figures[f"{variant}_thresh_at_fpr_{wanted}"] = thresholds[nearest]
    return figures


def plain_1n(
    embeddings,
    faceness_scores,
    templates,
    medias,
    gallery,
    gallery_subjects,
    probes,
    probe_subjects,
) -> dict:
    weighted = embeddings * faceness_scores[:, None]
    scores = (
        plain_templates(weighted, templates, medias, probes)
        @ plain_templates(weighted, templates, medias, gallery).T
    )
    ranks, mates, others, maxima = [], [], [], []
    for row, subject in zip(scores, probe_subjects, strict=True):
        falling = np.argsort(-row)
        is_mate = gallery_subjects[falling] == subject
        if is_mate.any():
            ranks.append(np.where(is_mate)[0][0] + 1)
            mates.append(row[falling[is_mate]][0])
            others.append(row[falling[~is_mate]][0])
        else:
            maxima.append(row[falling[0]])
    ranks, mates, others, maxima = map(
        np.array, (ranks, mates, others, sorted(maxima, reverse=True))
    )
    thresholds = [maxima[max(int(len(maxima) * far) - 1, 0)] for far in ijb.FARS]
    return {
        "top1": np.mean(ranks <= 1),
        "top5": np.mean(ranks <= 5),
        "top10": np.mean(ranks <= 10),
        "thresholds": thresholds,
        "tpir": [np.mean((mates > threshold) & (mates > others)) for threshold in thresholds],
        "mated": len(ranks),
        "non_mated": len(maxima),
    }


def plain_tinyface(features: np.ndarray, paths: list[str], meta: dict) -> dict:
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    by_key = {Path(path).stem: feature for path, feature in zip(paths, features, strict=True)}
    person = {
        path: int(Path(path).name.split("_")[0])
        for path in meta["probe_paths"] + meta["gallery_paths"]
    }
    searched = meta["gallery_paths"] + meta["distractor_paths"]
    of_gallery = np.array([person.get(path, -100) for path in searched])
    scores = (
        np.stack([by_key[Path(path).stem] for path in meta["probe_paths"]])
        @ np.stack([by_key[Path(path).stem] for path in searched]).T
    )
    ranks = np.array(
        [
            np.where(of_gallery[np.argsort(-row)] == person[path])[0][0] + 1
            for path, row in zip(meta["probe_paths"], scores, strict=True)
        ]
    )
    return {f"rank-{rank}": 100 * np.mean(ranks <= rank) for rank in (1, 5, 20)}


if __name__ == "__main__":
    run(main)
