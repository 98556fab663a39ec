"""The text files of IJB-B and IJB-C: templates and media, five points, pairs, the lists of 1:N."""

import csv
import io
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from eval.sets.folder import BLOCK, first_of
from utils.errors import InputError
from utils.files import read_text

GALLERY, PROBES = "_1N_gallery_", "_1N_probe_mixed"
# bytes in a file of pairs
ACCEPTED = np.isin(np.arange(256), list(b"0123456789 \t\r\n"))


def read_rows(path: Path, kind: str, columns: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    """A meta file's names and the numbers behind them, (N, columns) int64 (kind "q") or float64
    ("d"). Raises InputError naming the line.
    """
    number, number_type = (int, np.int64) if kind == "q" else (float, np.float64)
    names, values = [], array(kind)
    for line, text in enumerate(read_text(path).rstrip().split("\n"), 1):
        name, *fields = text.split() or [""]
        try:
            if len(fields) != len(columns):
                raise ValueError
            values.extend(map(number, fields))
        except (ValueError, OverflowError) as error:
            raise InputError(
                f"{path}: line {line} is {text.strip()[:100]!r}; expected are a name, "
                f"{', '.join(columns)}, separated by blanks"
            ) from error
        names.append(name)
    return names, np.frombuffer(values, number_type).reshape(len(names), len(columns))


def in_order(
    names: list[str], faces: Path, other_names: list[str], values: np.ndarray, points: Path
) -> np.ndarray:
    """The rows of ``values`` in the order of ``names``.

    Raises InputError if the two files name other images.
    """
    if names == other_names:  # so it is in the published files
        return values
    place = dict(zip(other_names, range(len(other_names)), strict=True))
    for names_here, here, known, there in (
        (names, faces, place, points),
        (other_names, points, set(names), faces),
    ):
        unknown = [name for name in names_here if name not in known]
        if unknown:
            raise InputError(
                f"{here.name} ({len(names_here)} images) names "
                f"{first_of(unknown, 'image')}, that {there} does not"
            )
    if len(place) != len(other_names):
        raise InputError(f"{points} names images twice and in another order than {faces.name}")
    return values[[place[name] for name in names]]


def check_points(names: list[str], points: np.ndarray, path: Path) -> None:
    """Raises InputError if points, (N, 5, 2), are not finite, or all five in one place."""
    are_finite = np.isfinite(points).all(axis=(1, 2))
    refuse_images(names, ~are_finite, "points that are not finite (NaN or infinite)", path)
    in_one_place = np.ptp(points, axis=1).max(axis=1) == 0
    refuse_images(names, in_one_place, "all five points in one place", path)


def refuse_images(names: list[str], is_wrong: np.ndarray, what: str, path: Path) -> None:
    wrong = [names[index] for index in np.flatnonzero(is_wrong)]
    if wrong:
        raise InputError(f"{path}: {first_of(wrong, 'image')}, with {what}")


def read_pairs(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(p1, p2, label), (P,) int64 each, of a file with three whole numbers a line; 16 million lines
    take seconds.

    Raises InputError naming the first line that is anything else, as the last one of a file that
    was cut off.
    """
    blocks, line = [np.empty((0, 3), np.int64)], 1
    for text in whole_lines(path):
        blocks.append(parse_pairs(text, path, line))
        line += text.count(b"\n")
    p1, p2, label = (np.concatenate([block[:, column] for block in blocks]) for column in range(3))
    return p1, p2, label


def whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        rest = file.read(len(BOM_UTF8)).removeprefix(BOM_UTF8)
        while block := file.read(BLOCK):
            lines, newline, end = block.rpartition(b"\n")
            if newline:
                yield rest + lines + newline
                rest = b""
            rest += end
            if len(rest) > BLOCK:
                raise InputError(
                    f"{path} is no text file: a line of it does not end within {BLOCK} bytes"
                )
        if rest:
            yield rest


def parse_pairs(block: bytes, path: Path, line: int) -> np.ndarray:
    """(lines, 3) int64 of whole lines, of which ``line`` is the first one's number.

    Blank lines are passed over.
    """
    values = np.frombuffer(block, np.uint8)
    digit = (values >= ord("0")) & (values <= ord("9"))
    begins = digit.copy()
    begins[1:] &= ~digit[:-1]
    # of all lines but the last; where the next one begins
    ends = np.flatnonzero(values[:-1] == ord("\n")) + 1
    counts = np.add.reduceat(begins, np.concatenate(([0], ends)), dtype=np.int64)
    clean = ACCEPTED[values]
    if not clean.all():
        counts[np.searchsorted(ends, np.flatnonzero(~clean), side="right")] = -1
    wrong = np.flatnonzero((counts != 3) & (counts != 0))
    if len(wrong):
        text = block.split(b"\n")[wrong[0]].decode("utf-8", "replace").strip()
        raise InputError(
            f"{path}: line {line + wrong[0]} is {text[:100]!r}; expected are two "
            "templates and a label, separated by blanks"
        )
    if not counts.any():
        return np.empty((0, 3), np.int64)  # of which np.fromstring would make a number
    return np.fromstring(block, np.int64, sep=" ").reshape(-1, 3)


def read_lists(places: list[Path], prefix: str) -> dict:
    """The 1:N lists in these folders as ``galleries`` and ``probes``; {} and None if there are
    none. ``prefix``: of their names, "*" for any.
    """
    files = [path for place in places for path in sorted(place.glob(f"{prefix}_1N_*.csv"))]
    probes = [path for path in files if path.stem.endswith(PROBES)]
    galleries = {}
    for path in files:
        if GALLERY in path.name:
            name = path.stem.rpartition("_")[2]
            if name in galleries:
                raise InputError(f"{path}: there is another list of gallery {name}")
            galleries[name] = read_list(path)
    if len(probes) > 1 or bool(galleries) != bool(probes):
        names = ", ".join(path.name for path in files)
        raise InputError(
            f"{places[0]}: 1:N takes one list of probes (*{PROBES}.csv) and galleries "
            f"(*{GALLERY}*.csv); there are {names}"
        )
    return {"galleries": galleries, "probes": read_list(probes[0]) if probes else None}


def read_list(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(templates, subjects), (rows,) int64 each: the first two columns of a CSV file with a header.

    Raises InputError naming the line.
    """
    templates, subjects = array("q"), array("q")
    with io.StringIO(read_text(path), newline="") as file:
        rows = csv.reader(file)
        try:
            check_header([cell.strip().lower() for cell in next(rows, [])], path)
            for row in filter(None, rows):
                templates.append(int(row[0]))
                subjects.append(int(row[1]))
        except InputError:
            raise
        except (ValueError, IndexError, OverflowError, csv.Error) as error:
            raise InputError(
                f"{path}: line {rows.line_num} does not begin with two whole numbers, "
                "template and subject"
            ) from error
    if not templates:
        raise InputError(f"{path}: no line follows the header")
    return np.array(templates, np.int64), np.array(subjects, np.int64)


def check_header(header: list[str], path: Path) -> None:
    """Raises InputError unless these can be names of the columns template and subject."""
    is_header = len(header) >= 2 and not header[0].isdigit()
    if not is_header or "subject" in header[0] or "template" in header[1]:
        raise InputError(
            f"{path}: the first line is {', '.join(header)[:100]!r}, no header of the columns "
            "template, subject, ..."
        )
