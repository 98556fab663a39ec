"""Who is on the images of test sets, as far as names, genuine pairs and subjects tell."""

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from eval.bootstrap import connect
from eval.groups import numbered_rows
from eval.ijb_templates import find_positions
from utils.errors import InputError

HEADER = ["first", "second"]


def names_file(root: str | Path, name: str) -> Path:
    """``<name>.names.csv`` beside a pair set: ``first,second``, then the two paths of each pair."""
    return Path(root) / f"{name}.names.csv"


def read_names(path: Path, pairs: int) -> list[str]:
    """The paths of the 2N images of a pair set in its order; [] if there is no file of names.

    Raises InputError if it has not as many pairs as the set.
    """
    if not path.is_file():
        return []
    names = [name for _, row in numbered_rows(path, HEADER, "pair set") for name in row]
    if len(names) != 2 * pairs:
        raise InputError(
            f"{path} names the images of {len(names) // 2} pairs, the set beside it has {pairs}: "
            "make both anew with data/make_rec.py --pairs, or remove the names"
        )
    return names


def find_people(images: np.ndarray, issame: np.ndarray, names: list[str]) -> np.ndarray:
    """The person of each of 2N images, (2N,) int from 0.

    By name: the folder, where this is what tells genuine from impostor pairs. Else people are what
    genuine pairs connect; images of one name, or without names of equal bytes, are one image.
    """
    if names:
        folders = np.unique(
            [str(PurePosixPath(name).parent) for name in names], return_inverse=True
        )[1]
        if np.array_equal(folders[0::2] == folders[1::2], issame):
            return folders
    keys = names or [hashlib.blake2b(image.tobytes()).digest() for image in images]
    numbers = {}
    node = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    return connect(len(numbers), node[0::2][issame], node[1::2][issame])[node]


def spellings(name: str) -> tuple[str, ...]:
    """What a file of groups may call an image by this path: path, file name, folder."""
    path = PurePosixPath(name)
    return name, path.name, str(path.parent), path.parent.name


# --- templates


class TemplatePeople(NamedTuple):
    """The person of each template of an IJB set."""

    known: np.ndarray  # (T,) template ids, rising
    people: np.ndarray  # (T,) int32 from 0
    count: int  # of people

    def of(self, templates: np.ndarray) -> np.ndarray:
        return self.people[find_positions(templates, self.known)]


def connect_templates(
    templates: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    lists: Sequence[tuple[np.ndarray, np.ndarray]],
) -> TemplatePeople:
    """People are what genuine pairs (template ids ``first`` and ``second``) and subjects connect.

    ``templates``: ids of all images; ``lists``: (templates, subjects) of galleries and probes.
    """
    known = np.unique(templates)
    subjects = np.unique(np.concatenate([subjects for _, subjects in lists] or [known[:0]]))
    edges = [(find_positions(first, known), find_positions(second, known))]
    for listed, of_listed in lists:
        node = len(known) + np.searchsorted(subjects, of_listed)
        edges.append((find_positions(listed, known), node))
    ends = [np.concatenate(column) for column in zip(*edges, strict=True)]
    people = connect(len(known) + len(subjects), *ends)[: len(known)]
    return TemplatePeople(known, people.astype(np.int32), int(people.max()) + 1)
