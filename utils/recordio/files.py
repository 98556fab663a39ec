"""The files of a RecordIO set: one ``train.rec``, shards of one set, or several sets; and the two
ways of reading their records.

What ``config.rec`` may name:

    a folder                       its train.rec; without one all its train*.rec (train_0.rec,
    train-00001.rec, ...), as shards of one set a .rec file several of these
    (separated by commas, or a list)

Beside NAME.rec lies NAME.idx; ``property`` is one for all files of a folder. Shards come in the
order of their names, with numbers in them taken as numbers. Labels: files of one folder share
theirs, label 3 is the same person in all of them. Several folders must say what theirs mean
(``config.rec_labels``): "shared": parts of one set, as above; "separate": sets of different people,
the labels of each are counted on from the classes of those before.
"""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import InputError
from utils.recordio.backends import open_backend
from utils.recordio.format import MAGIC_BYTES, IRHeader, RecordError, unpack
from utils.recordio.index import rebuild
from utils.recordio.indexed import IndexedRecordIO
from utils.recordio.reader import Glance

log = logging.getLogger(__name__)


# of every file, when it is opened
OFFSETS_LOOKED_AT = 64


# of these, to say that the index is another file's: fewer are damaged records
FEWEST_WRONG = 4


# so many damaged records in a row are a damaged file: stop looking for a neighbour
LONGEST_HOLE = 1000


LABELS = ("auto", "shared", "separate")


IMAGE_SIZE = (112, 112)


class Folder(NamedTuple):
    """The files of one folder that belong to a set."""

    path: str
    recs: list[str]  # names in it

    def existing(self) -> list[str]:
        """Names of all files that are there: records, their indices, the property file."""
        names = [name for rec in self.recs for name in (rec, f"{stem(rec)}.idx")] + ["property"]
        return [name for name in names if os.path.isfile(os.path.join(self.path, name))]


def stem(rec: str) -> str:
    return rec.removesuffix(".rec")


def by_number(name: str) -> list:
    """Sort key: train_2.rec before train_10.rec."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def find_folders(rec: str | Sequence[str]) -> list[Folder]:
    """The files that ``rec``, a path or a list of paths, names, by folder.

    Errors: InputError for what is missing or named twice.
    """
    folders = {}
    for entry in [rec] if isinstance(rec, (str, os.PathLike)) else rec:
        path = os.path.abspath(entry)
        folder, names = (
            os.path.split(path)
            if path.endswith(".rec") and not os.path.isdir(path)
            else (path, None)
        )
        for name in [names] if names else records_in(folder):
            if name in folders.setdefault(folder, []):
                raise InputError(
                    f"rec names {os.path.join(folder, name)} twice; every file of a set once"
                )
            folders[folder].append(name)
    if not folders:
        raise InputError(
            "rec names no file: the folder of train.rec, or several paths separated by commas"
        )
    return [Folder(path, names) for path, names in folders.items()]


def records_in(folder: str) -> list[str]:
    """The record files of a folder: train.rec, or its shards."""
    if os.path.isfile(os.path.join(folder, "train.rec")) or not os.path.isdir(folder):
        return ["train.rec"]  # a missing one is told by whoever opens it
    names = sorted((name for name in os.listdir(folder) if name.endswith(".rec")), key=by_number)
    shards = [name for name in names if name.startswith("train")]
    if not shards and names:
        raise InputError(
            f"no record file {os.path.join(folder, 'train.rec')} and no shards "
            f"train*.rec beside it; it holds {', '.join(names[:5])}: "
            f"name the files of the set, rec={os.path.join(folder, names[0])},..."
        )
    return shards or ["train.rec"]


def has_records(folder: str | os.PathLike) -> bool:
    """Whether a folder is meant as a record set, if an incomplete one, not as one of images."""
    with os.scandir(folder) as entries:
        names, others = [], False
        for entry in entries:
            names.append(entry.name)
            others |= entry.is_dir() and not entry.name.startswith(".")
    recs = [name for name in names if name.endswith(".rec")]
    train = [name for name in recs if name.startswith("train")]
    if "train.idx" in names or "property" in names or train:
        return True
    # of other names, which find_folders asks to be named, where they are all there is
    return bool(recs) and not others


def split_paths(text: str, base: Path) -> list[str]:
    """What a text names: one path, or several with commas between (unless the whole is a path)."""
    if "," not in text or (base / Path(text).expanduser()).exists():
        return [text]
    return [word.strip() for word in text.split(",") if word.strip()]


def check_labels(labels: str, folders: Sequence[Folder]) -> bool:
    """Whether the labels of the folders are counted on.

    Errors: InputError if several folders leave it open.
    """
    if labels not in LABELS:
        raise InputError(f"rec_labels={labels!r} is unknown; allowed: {', '.join(LABELS)}")
    if labels == "auto" and len(folders) > 1:
        raise InputError(
            f"rec names {len(folders)} folders "
            f"({', '.join(folder.path for folder in folders)}): set rec_labels=shared if a label "
            "is the same person in all "
            "of them, or rec_labels=separate if each has people of its own"
        )
    return labels == "separate"


class Shard:
    """One ``.rec``: its index and which of its records are images.

    These are at the positions ``first`` ... ``first + count - 1``.
    Raises InputError if its ``.idx`` is another file's, or if its record 0 is.
    """

    def __init__(self, folder: str, rec: str, backend: str):
        self.path = os.path.join(folder, rec)
        self.index = IndexedRecordIO(os.path.join(folder, f"{stem(rec)}.idx"), self.path, "r")
        self._refuse_foreign_index()
        self.records = open_backend(backend, self.index)
        self.insightface, self.first, self.count = self._images()

    def _refuse_foreign_index(self) -> None:
        """Look at some offsets: in another file's index hardly any is where a record begins."""
        keys, offsets = self.index.key_array, self.index.index.offsets
        most = min(len(keys), OFFSETS_LOOKED_AT)
        looked_at = np.linspace(0, max(len(keys) - 1, 0), most).round().astype(np.int64)
        # what lies beyond a file that is cut off was reported when the index was opened
        looked_at = looked_at[offsets[looked_at] < os.path.getsize(self.path)]
        starts = [self.index.records.pread(4, int(offset)) for offset in offsets[looked_at]]
        wrong = [at for at, start in zip(looked_at, starts, strict=True) if start != MAGIC_BYTES]
        if len(wrong) >= FEWEST_WRONG and 2 * len(wrong) > len(looked_at):
            raise InputError(
                f"{self.index.idx_path} is not the index of {self.path}: no record begins at "
                f"{len(wrong)} of {len(looked_at)} offsets that were looked at (the first: key "
                f"{keys[wrong[0]]}, offset {offsets[wrong[0]]}); {rebuild(self.index.idx_path)}, "
                "or copy both again"
            )

    def _images(self) -> tuple[bool, int, int]:
        """(whether the layout is InsightFace's, first position, number) of the images.

        InsightFace's record 0 tells the keys of the images, which the identities' records follow.
        Where the index has lost it, these tell themselves. Elsewhere all records are images.
        """
        keys = self.index.key_array
        if len(keys) == 0:
            return False, 0, 0
        if keys[0] != 0:
            end = self._first_identity(len(keys))
            if end == len(keys):
                return False, 0, end
            log.warning(
                "%s does not list record 0, which tells images from InsightFace's identity "
                "records: the %d records from key %d on, which hold ranges of keys and no image, "
                "are left out",
                self.index.idx_path,
                len(keys) - end,
                keys[end],
            )
            return True, 0, end
        glance = self.index.glance_at(0)
        if not glance.holds_keys:
            return False, 0, len(keys)
        return True, 1, self._end_of_images(glance.label) - 1

    def _end_of_images(self, first_identity: float) -> int:
        """The position after the last image. first_identity: which key is none, says record 0."""
        keys = self.index.key_array
        if not first_identity > 1:
            return 1
        end = len(keys)
        if first_identity <= keys[-1]:
            end = int(np.searchsorted(keys, keys.dtype.type(np.ceil(first_identity))))
            if self._has_image(end):
                raise InputError(
                    f"{self.path}: record 0 says that no image follows key {keys[end - 1]}, but "
                    f"key {keys[end]} is one: record 0 or {self.index.idx_path} is of another set; "
                    "copy both again, or pack the set again"
                )
        images = self._first_identity(end)
        if images < end:
            log.warning(
                "%s: record 0 says that images end before key %g, but the %d records from key %d "
                "on hold ranges of keys and no image: they are left out",
                self.path,
                first_identity,
                end - images,
                keys[images],
            )
        elif end - 1 < first_identity - 1:
            log.warning(
                "%s names %d of the %d images that record 0 of %s counts; %s",
                self.index.idx_path,
                end - 1,
                first_identity - 1,
                self.path,
                rebuild(self.index.idx_path),
            )
        return images

    def _has_image(self, position: int) -> bool:
        try:
            return self.index.glance_at(position).has_image
        except RecordError:
            return False

    def _first_identity(self, end: int) -> int:
        """The position of the first identity record before ``end``; ``end``: there is none.

        All of them follow the images.
        """
        if not self._holds_range(end - 1):
            return end
        images, identities = 0, end - 1
        while images < identities:
            middle = (images + identities) // 2
            if self._holds_range(middle):
                identities = middle
            else:
                images = middle + 1
        return identities

    def _holds_range(self, position: int) -> bool:
        """Whether the record is one of InsightFace's identities: a range of keys, and no image.

        A damaged record is taken for what the one before it is.
        """
        for at in range(position, max(position - LONGEST_HOLE, -1), -1):
            try:
                header, encoded = unpack(self.index.read_at(at))
            except RecordError:
                continue
            if header.flag != 2 or len(encoded):
                return False
            start, end = header.label
            return bool(1 <= start <= end <= self.index.key_array[at])
        return False

    def key(self, at: int) -> int:
        return int(self.index.key_array[self.first + at])

    def offset(self, at: int) -> int:
        return int(self.index.index.offsets[self.first + at])

    def read(self, at: int) -> tuple[IRHeader, bytes]:
        """(header, encoded image) of the ``at``-th image; RecordError if it is damaged."""
        return self.records.read(self.first + at)

    def glance(self, at: int) -> Glance:
        """The start of the ``at``-th image's record; RecordError if it is damaged."""
        return self.index.glance_at(self.first + at)

    def label(self, at: int) -> float | None:
        """The label of the ``at``-th image; None if its header cannot be read."""
        try:
            glance = self.glance(at)
        except RecordError:
            return None
        return None if glance.id < 0 else glance.label

    def file_order(self) -> np.ndarray | None:
        """Numbers of the images in the order in which they lie in the file; None: as they are
        counted.
        """
        offsets = self.index.index.offsets[self.first : self.first + self.count]
        if bool((offsets[1:] > offsets[:-1]).all()):
            return None
        known = self.index.index.by_offset
        if known is None or len(known) != self.count:
            return np.argsort(offsets, kind="stable").astype(np.uint32)
        return known


def read_property(path: str) -> int:
    """Number of classes of a ``property`` file: ``classes,height,width``, in one line or several.

    Lines after these numbers are not read: InsightFace's packers write the number of images there,
    or when the set was shuffled. Raises InputError if the file holds something else.
    """
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        text = file.read().strip()
    numbers = []
    for line in text.splitlines():
        numbers += re.split(r"[\s,;]+", line.strip(" \t,;"))
        if len(numbers) >= 3:
            break
    try:
        num_classes, height, width = map(int, numbers)
        if num_classes < 1:
            raise ValueError
    except ValueError:
        raise InputError(
            f"{path} holds {text[:40]!r} instead of classes,height,width; delete it "
            "to have it rebuilt"
        ) from None
    if (height, width) != IMAGE_SIZE:
        raise InputError(
            f"{path} says images of {height}x{width}; this project trains on 112x112 "
            "crops, make the set again with data/make_rec.py"
        )
    return num_classes
