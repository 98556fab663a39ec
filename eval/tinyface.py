"""TinyFace from given features: identification of low-resolution faces among mates and distractors.

Protocol: Cheng, Zhu, Gong, "Low-Resolution Face Recognition", ACCV 2018; file lists as CVLFace stores them. A probe's gallery is all mate images and
all distractors, each image for itself; a hit at rank k is any image of the probe's person among the k that are most alike (cosine).
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval.roc import check_norms, cmc, search
from utils.errors import InputError

RANKS = (1, 5, 20)
ROLES = ("probe_paths", "gallery_paths", "distractor_paths")
DISTRACTOR = -1     # the subject of all distractors, which is no probe's


class Ranking(NamedTuple):
    """What each probe of ``meta["probe_paths"]`` found; image indices count the rows of the features."""

    ranks: np.ndarray       # (probes,) int, of the best mate: 1 + the images of others that score at least as high
    hardest: np.ndarray     # (probes, 2) int, image indices: of those that are not the person the most alike (-1: there is none), and the most alike mate


def evaluate(features: np.ndarray, image_paths: Sequence[str], meta: dict[str, Sequence[str]], ranks: Sequence[int] = RANKS) -> dict[str, float]:
    """Identification rate at each of ``ranks``: {"rank-1": percent, …}. Arguments and errors as in ``rank_probes``."""
    return figures(rank_probes(features, image_paths, meta).ranks, ranks)


def figures(found: np.ndarray, ranks: Sequence[int] = RANKS) -> dict[str, float]:
    """The dict of ``evaluate`` from the ranks (probes,) of ``rank_probes``."""
    if min(ranks) < 1:
        raise InputError(f"rank {min(ranks)}: ranks start at 1")
    rates = cmc(found, max(ranks))
    return {f"rank-{rank}": 100 * float(rates[rank - 1]) for rank in ranks}


def rank_probes(features: np.ndarray, image_paths: Sequence[str], meta: dict[str, Sequence[str]]) -> Ranking:
    """Rank of every probe's best mate, and the two images that decide it.

    ``features``: (N, D), not necessarily normalised, both flips added; ``image_paths``: (N,), what each row is of; ``meta``: lists of paths
    "probe_paths", "gallery_paths" and "distractor_paths". Paths are matched by file name without folder and extension (by the whole path where
    several images have that name); the person is what stands before the first ``_`` of the name, but distractors are nobody's mates.
    Raises InputError, naming what is wrong, for unequal lengths, a feature that is zero or not finite, a path that was not embedded or
    that several images answer to, an image that the lists name twice, no probe, no gallery image, a probe without a mate.
    """
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or len(features) != len(image_paths):
        raise InputError(f"features of shape {features.shape} do not fit {len(image_paths)} image paths: a row for each is needed")
    norms = check_norms(features)
    probes, gallery, distractors = _find_roles(image_paths, meta)
    subjects = _number_people(image_paths, probes, gallery)
    searched = np.append(gallery, distractors)
    found = search(features[probes] / norms[probes, None], features[searched] / norms[searched, None],
                   subjects[:len(probes)], np.append(subjects[len(probes):], np.full(len(distractors), DISTRACTOR)))
    return Ranking(found.ranks, np.stack([np.where(found.others < 0, -1, searched[found.others]), searched[found.mates]], axis=1))


def _find_roles(image_paths: Sequence[str], meta: dict[str, Sequence[str]]) -> list[np.ndarray]:
    """Image indices of the probes, the gallery and the distractors."""
    missing = [role for role in ROLES if role not in meta]
    if missing:
        raise InputError(f"TinyFace lists: no {', '.join(missing)}; there are {', '.join(map(str, meta)) or 'none'}")
    by_stem = _sort_by_stem(image_paths)
    roles = [np.array([_find(path, role, by_stem) for path in meta[role]], np.int64) for role in ROLES]
    for role, images in zip(ROLES[:2], roles):
        if not len(images):
            raise InputError(f"TinyFace lists: {role} is empty")
    images, counts = np.unique(np.concatenate(roles), return_counts=True)
    if (counts > 1).any():
        raise InputError(f"TinyFace lists: {image_paths[images[np.argmax(counts > 1)]]} is named more than once in {', '.join(ROLES)}")
    return roles


def _sort_by_stem(image_paths: Sequence[str]) -> dict[str, dict[str, int]]:
    """For each stem the paths that have it, with their image indices; most often it is one."""
    by_stem: dict[str, dict[str, int]] = {}
    for index, path in enumerate(map(str, image_paths)):
        paths = by_stem.setdefault(_stem(path), {})
        if path in paths:
            raise InputError(f"images {paths[path]} and {index} have the same path, {path}")
        paths[path] = index
    return by_stem


def _find(path: str, role: str, by_stem: dict[str, dict[str, int]]) -> int:
    paths = by_stem.get(_stem(path), {})
    if len(paths) == 1:
        return next(iter(paths.values()))
    if str(path) not in paths:
        raise InputError(f"{role}: {path} {'could be ' + ' or '.join(paths) if paths else 'was not embedded'}")
    return paths[str(path)]


def _number_people(image_paths: Sequence[str], probes: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """A number for each person, (probes + gallery,) int. Raises InputError for a probe without a mate: the protocol has one for each."""
    people = [_stem(image_paths[index]).split("_")[0] for index in (*probes, *gallery)]
    alone = set(people[:len(probes)]) - set(people[len(probes):])
    if alone:
        probe, person = next((index, person) for index, person in zip(probes, people) if person in alone)
        raise InputError(f"TinyFace probe {image_paths[probe]} has no mate: gallery_paths have no image of person {person}")
    return np.unique(people, return_inverse=True)[1]


def _stem(path: str) -> str:
    """File name without folder and extension."""
    return os.path.splitext(os.path.basename(str(path)))[0]
