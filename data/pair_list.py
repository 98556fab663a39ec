"""The lists of pairs that ``data/make_rec.py --pairs`` packs: ``path1 path2 0|1``, LFW's or RFW's.

No command.

LFW's ``pairs.txt``, and XQLFW's, begin with a line ``10 300``: ten folds of 300 pairs of the same
person (``Name 1 4``) and 300 of different people (``Name 1 Other 2``). ``pairsDevTrain.txt`` and
``pairsDevTest.txt`` begin with the second number alone: one fold. ``Name 1`` is the image
``Name/Name_0001.jpg``, or one with another of the suffixes that training reads. RFW's four lists
have such lines and no first one; the people of a list lie in the folder of their group,
``African/Name/Name_0001.jpg``.
"""

from collections.abc import Sequence
from glob import escape
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from utils.dataset.folder import IMAGE_SUFFIXES
from utils.errors import InputError
from utils.files import read_text
from utils.safe_pickle import refuse_one_kind

FOLDS = 10


class Pair(NamedTuple):
    """Two images, by their paths below the image folder, whether they show one person, and the
    group of people that both belong to, "" where the list has none.
    """

    first: str
    second: str
    same: bool
    group: str = ""


def read_pairs(paths: Sequence[str | Path], images: str | Path) -> list[Pair]:
    """The pairs of a list, in its order; of several, fold after fold of ten, in each the pairs of
    every list.

    images: the folder that the paths of a list start at. Empty lines and lines that begin with
    ``#`` are skipped; fields are separated by tabs or, in a line without one, by blanks.
    Raises InputError if a list or the folder is missing, naming a line that is of no format, and
    for pairs of one kind only.
    """
    images = Path(images)
    if not images.is_dir():
        raise InputError(f"no folder {images.absolute()}: --images is what the pair list refers to")
    lists = [read_list(Path(path), images) for path in paths]
    if len(lists) == 1:
        pairs = lists[0]
    else:
        pairs = [pair for fold in range(FOLDS) for part in lists for pair in fold_of(part, fold)]
    refuse_one_kind([pair.same for pair in pairs], ", ".join(map(str, paths)))
    return pairs


def fold_of(pairs: list[Pair], fold: int) -> list[Pair]:
    """One of the ten contiguous folds, as evaluation cuts them."""
    positions = np.array_split(np.arange(len(pairs)), FOLDS)[fold]
    return [pairs[position] for position in positions]


def read_list(path: Path, images: Path) -> list[Pair]:
    """The pairs of one list, of whichever format it is."""
    if not path.is_file():
        raise InputError(f"no pair list {path.absolute()}")
    lines = list(numbered_fields(path))
    if not lines:
        raise InputError(f"{path} lists no pairs")
    first = lines[0][1]
    if len(first) <= 2 and all(map(is_number, first)):
        return read_lfw_pairs(path, images, first, lines[1:])
    if len(first) in (3, 4) and is_number(first[1]):
        group = find_group(path, images, first[0])
        return [
            parse_names(fields, images, f"{path}, line {number}", group) for number, fields in lines
        ]
    return [parse_paths(fields, f"{path}, line {number}") for number, fields in lines]


def numbered_fields(path: Path):
    """(line number, fields) of the lines that say something."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        line = line.strip()
        if line and not line.startswith("#"):
            yield number, [field.strip() for field in line.split("\t" if "\t" in line else None)]


def parse_paths(fields: list[str], where: str) -> Pair:
    """A line ``path1 path2 0|1``. Raises InputError if it is not."""
    if len(fields) != 3 or fields[2] not in ("0", "1"):
        raise InputError(
            f"{where}: expected 'path1 path2 0|1', got {' '.join(fields)[:80]!r}"
            " (LFW's own lists begin with a line such as '10 300', RFW's with 'name n1 n2')"
        )
    return Pair(fields[0], fields[1], fields[2] == "1")


# --- LFW's and RFW's lists


def read_lfw_pairs(
    path: Path, images: Path, header: list[str], lines: list[tuple[int, list[str]]]
) -> list[Pair]:
    """The pairs below the first line of one of LFW's lists.

    Raises InputError if a line is not LFW's, an image is missing, or the pairs are not as many of
    each kind as the first line says: the list was cut off, and its folds would be others.
    """
    folds, per_kind = (int(number) for number in (["1", *header])[-2:])
    expected = folds * per_kind
    pairs = [parse_names(fields, images, f"{path}, line {number}") for number, fields in lines]
    same = sum(pair.same for pair in pairs)
    if (same, len(pairs) - same) != (expected, expected):
        raise InputError(
            f"{path}: its first line, '{' '.join(header)}', says {expected} pairs of the same"
            f" person and {expected} of different people; there are {same} and {len(pairs) - same}:"
            " fetch the list again, or mend that line"
        )
    return pairs


def find_group(path: Path, images: Path, person: str) -> str:
    """The sub-folder of ``images`` that holds the people of one of RFW's lists, "" for itself.

    Raises InputError if the list's first person is nowhere, or in several.
    """
    if (images / person).is_dir():
        return ""
    groups = sorted(folder.parent.name for folder in images.glob(f"*/{escape(person)}"))
    if len(groups) != 1:
        raise InputError(
            f"{path}: {person}, the first person of the list, has no folder in "
            f"{images.absolute()}, and {len(groups)} of its sub-folders have one "
            f"({', '.join(groups) or 'none'}); RFW's people lie in African, Asian, ..."
        )
    return groups[0]


def parse_names(fields: list[str], images: Path, where: str, group: str = "") -> Pair:
    """A line ``name n1 n2`` or ``name1 n1 name2 n2``. Raises InputError if it is neither.

    group: the sub-folder of ``images`` that the people lie in.
    """
    same = len(fields) == 3
    numbers = fields[1:] if same else fields[1::2]
    if len(fields) not in (3, 4) or not all(map(is_number, numbers)):
        raise InputError(
            f"{where}: expected 'name n1 n2' or 'name1 n1 name2 n2' of LFW's lists,"
            f" got {' '.join(fields)[:80]!r}"
        )
    people = fields[0], fields[0 if same else 2]
    if not same and people[0] == people[1]:
        raise InputError(
            f"{where}: two images of {people[0]} as a pair of different people; one person's pair"
            " is written 'name n1 n2'"
        )
    paths = [
        find_image(images, f"{group}/{person}" if group else person, int(number), where)
        for person, number in zip(people, numbers, strict=True)
    ]
    return Pair(*paths, same, group)


def find_image(images: Path, folder: str, number: int, where: str) -> str:
    """``Name/Name_0001.jpg`` or with another suffix. Raises InputError if there is none."""
    stem = f"{folder}/{PurePath(folder).name}_{number:04d}"
    for suffix in (*IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES)):
        if (images / f"{stem}{suffix}").is_file():
            return f"{stem}{suffix}"
    raise InputError(
        f"{where}: no image {images / stem}.jpg, nor with {', '.join(IMAGE_SUFFIXES[1:])}"
    )


def is_number(field: str) -> bool:
    return field.isascii() and field.isdecimal() and len(field) < 10
