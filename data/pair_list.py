"""The lists of pairs that ``data/make_rec.py --pairs`` packs: ``path1 path2 0|1``, or LFW's own.

No command.

LFW's ``pairs.txt`` begins with a line ``10 300``: ten folds of 300 pairs of the same person
(``Name 1 4``) and 300 of different people (``Name 1 Other 2``). ``pairsDevTrain.txt`` and
``pairsDevTest.txt`` begin with the second number alone: one fold. ``Name 1`` is the image
``Name/Name_0001.jpg``, or one with another of the suffixes that training reads.
"""

from pathlib import Path
from typing import NamedTuple

from utils.dataset.folder import IMAGE_SUFFIXES
from utils.errors import InputError
from utils.files import read_text
from utils.safe_pickle import refuse_one_kind


class Pair(NamedTuple):
    """Two images, by their paths below the image folder, and whether they show one person."""

    first: str
    second: str
    same: bool


def read_pairs(path: str | Path, images: str | Path) -> list[Pair]:
    """The pairs of a list, in its order.

    images: the folder that the paths of the list start at. Empty lines and lines that begin with
    ``#`` are skipped; fields are separated by tabs or, in a line without one, by blanks.
    Raises InputError if the list or the folder is missing, naming a line that is neither format's,
    and for pairs of one kind only.
    """
    path, images = Path(path), Path(images)
    if not path.is_file():
        raise InputError(f"no pair list {path.absolute()}")
    if not images.is_dir():
        raise InputError(f"no folder {images.absolute()}: --images is what the pair list refers to")
    lines = list(numbered_fields(path))
    if not lines:
        raise InputError(f"{path} lists no pairs")
    header = lines[0][1]
    if len(header) <= 2 and all(map(is_number, header)):
        pairs = read_lfw_pairs(path, images, header, lines[1:])
    else:
        pairs = [parse_paths(fields, f"{path}, line {number}") for number, fields in lines]
    refuse_one_kind([pair.same for pair in pairs], str(path))
    return pairs


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
            " (LFW's own lists begin with a line such as '10 300')"
        )
    return Pair(fields[0], fields[1], fields[2] == "1")


# --- LFW's own lists


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


def parse_names(fields: list[str], images: Path, where: str) -> Pair:
    """A line ``name n1 n2`` or ``name1 n1 name2 n2``. Raises InputError if it is neither."""
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
        find_image(images, person, int(number), where)
        for person, number in zip(people, numbers, strict=True)
    ]
    return Pair(*paths, same)


def find_image(images: Path, person: str, number: int, where: str) -> str:
    """``Name/Name_0001.jpg`` or with another suffix. Raises InputError if there is none."""
    stem = f"{person}/{person}_{number:04d}"
    for suffix in IMAGE_SUFFIXES:
        if (images / f"{stem}{suffix}").is_file():
            return f"{stem}{suffix}"
    raise InputError(
        f"{where}: no image {images / stem}.jpg, nor with {', '.join(IMAGE_SUFFIXES[1:])}"
    )


def is_number(field: str) -> bool:
    return field.isascii() and field.isdecimal() and len(field) < 10
