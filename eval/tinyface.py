"""TinyFace from given features: identification of low-resolution faces among mates and distractors.

Protocol: Cheng, Zhu, Gong, "Low-Resolution Face Recognition", ACCV 2018; file lists as CVLFace
stores them. A probe's gallery is all mate images and all distractors, each image for itself; a hit
at rank k is any image of the probe's person among the k that are most alike (cosine).
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval.bootstrap import sample_ranks
from eval.roc import check_norms, cmc, search
from utils.errors import InputError

RANKS = (1, 5, 20)
ROLES = ("probe_paths", "gallery_paths", "distractor_paths")
DISTRACTOR = -1  # the subject of all distractors, which is no probe's
NO_MATE = 2**31 - 1  # beyond every rank that is asked for, also in a small gallery


class Ranking(NamedTuple):
    """What each probe of ``meta["probe_paths"]`` found; image indices count the rows of the
    features.
    """

    # (P,) int, of the best mate: 1 + the images of others that score at least as high; NO_MATE if
    # the gallery has none
    ranks: np.ndarray
    # (P, 2) int, image indices: of those that are not the person the most alike, and the most alike
    # mate; -1: there is none
    hardest: np.ndarray
    probes: np.ndarray  # (P,) int, image indices of the probes


def evaluate(
    features: np.ndarray,
    image_paths: Sequence[str],
    meta: dict[str, Sequence[str]],
    ranks: Sequence[int] = RANKS,
) -> dict[str, float]:
    """Identification rate at each of ``ranks``: {"rank-1": percent, …}.

    Arguments and errors as in ``rank_probes``.
    """
    return figures(rank_probes(features, image_paths, meta).ranks, ranks)


def figures(ranks_of_probes: np.ndarray, ranks: Sequence[int] = RANKS) -> dict[str, float]:
    """The dict of ``evaluate`` from ``ranks_of_probes`` (P,), those of ``rank_probes``."""
    if min(ranks) < 1:
        raise InputError(f"rank {min(ranks)}: ranks start at 1")
    rates = cmc(ranks_of_probes, max(ranks))
    return {f"rank-{rank}": 100 * float(rates[rank - 1]) for rank in ranks}


def sample_figures(
    ranks_of_probes: np.ndarray, weights: np.ndarray, ranks: Sequence[int] = RANKS
) -> dict[str, np.ndarray]:
    """The dict of ``evaluate`` in every draw of people, (draws,) each; ``weights``: (P, draws)."""
    rates = sample_ranks(ranks_of_probes, weights, ranks)
    return {f"rank-{rank}": 100 * rate for rank, rate in zip(ranks, rates, strict=True)}


def rank_probes(
    features: np.ndarray, image_paths: Sequence[str], meta: dict[str, Sequence[str]]
) -> Ranking:
    """Rank of every probe's best mate, and the two images that decide it.

    ``features``: (N, D), not necessarily normalised, both flips added; ``image_paths``: (N,), what
    each row is of; ``meta``: lists of paths "probe_paths", "gallery_paths" and "distractor_paths"
    (may be empty), resolved as in ``find_roles``. A probe without a mate counts as a miss. Raises
    InputError, naming what is wrong, for unequal lengths, a feature that is zero or not finite, and
    as ``find_roles`` and ``find_mateless`` do.
    """
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or len(features) != len(image_paths):
        raise InputError(
            f"features of shape {features.shape} do not fit {len(image_paths)} image "
            "paths: a row for each is needed"
        )
    norms = check_norms(features)
    probes, gallery, distractors = find_roles(image_paths, meta)
    find_mateless(image_paths, probes, gallery)
    people = np.unique(
        [identity_of(image_paths[index]) for index in (*probes, *gallery)], return_inverse=True
    )[1]
    searched = np.append(gallery, distractors)
    hits = search(
        features[probes] / norms[probes, None],
        features[searched] / norms[searched, None],
        people[: len(probes)],
        np.append(people[len(probes) :], np.full(len(distractors), DISTRACTOR)),
    )
    hardest = np.stack(
        [np.where(best < 0, -1, searched[best]) for best in (hits.others, hits.mates)], axis=1
    )
    return Ranking(np.where(hits.mates < 0, NO_MATE, hits.ranks), hardest, probes)


def find_roles(image_paths: Sequence[str], meta: dict[str, Sequence[str]]) -> list[np.ndarray]:
    """Image indices of the probes, the gallery and the distractors.

    Paths are matched by file name without folder and extension, by the whole path where several
    images have that name. Raises InputError for a path that is of no image or of several, an image
    that the lists name twice, no probe, no gallery image.
    """
    missing = [role for role in ROLES if role not in meta]
    if missing:
        raise InputError(
            f"TinyFace lists: no {', '.join(missing)}; there are "
            f"{', '.join(map(str, meta)) or 'none'}"
        )
    by_stem = _sort_by_stem(image_paths)
    roles = [
        np.array([_find(path, role, by_stem) for path in meta[role]], np.int64) for role in ROLES
    ]
    for role, images in zip(ROLES[:2], roles[:2], strict=True):
        if not len(images):
            raise InputError(f"TinyFace lists: {role} is empty")
    images, counts = np.unique(np.concatenate(roles), return_counts=True)
    if (counts > 1).any():
        raise InputError(
            f"TinyFace lists: {image_paths[images[np.argmax(counts > 1)]]} is named "
            f"more than once in {', '.join(ROLES)}"
        )
    return roles


def find_mateless(image_paths: Sequence[str], probes: np.ndarray, gallery: np.ndarray) -> list[str]:
    """Paths of the probes of whose person the gallery has no image.

    Raises InputError if that is all of them.
    """
    people = {identity_of(image_paths[index]) for index in gallery}
    mateless = [
        image_paths[index] for index in probes if identity_of(image_paths[index]) not in people
    ]
    if len(mateless) == len(probes):
        raise InputError(
            "no TinyFace probe has a mate: gallery_paths have no image of person "
            f"{identity_of(mateless[0])} ({mateless[0]}) or any other"
        )
    return mateless


def _sort_by_stem(image_paths: Sequence[str]) -> dict[str, dict[str, int]]:
    """For each stem the paths that have it, with their image indices; most often it is one."""
    by_stem: dict[str, dict[str, int]] = {}
    for index, path in enumerate(map(str, image_paths)):
        paths = by_stem.setdefault(stem_of(path), {})
        if path in paths:
            raise InputError(f"images {paths[path]} and {index} have the same path, {path}")
        paths[path] = index
    return by_stem


def _find(path: str, role: str, by_stem: dict[str, dict[str, int]]) -> int:
    paths = by_stem.get(stem_of(path), {})
    if len(paths) == 1:
        return next(iter(paths.values()))
    if str(path) not in paths:
        raise InputError(
            f"{role}: {path} "
            f"{'could be ' + ' or '.join(paths) if paths else 'is not among the image paths'}"
        )
    return paths[str(path)]


def stem_of(path: str) -> str:
    """File name without folder and extension."""
    return os.path.splitext(os.path.basename(str(path)))[0]


def identity_of(path: str) -> str:
    """The person, who stands before the first ``_`` of the file name."""
    return stem_of(path).split("_")[0]
