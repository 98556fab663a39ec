"""Which files a RecordIO set has: one ``train.rec``, shards of one set, or several sets.

What ``config.rec`` may name:

    a folder              its train.rec; without one all its train*.rec (train_0.rec,
                          train-00001.rec, ...), as shards of one set
    a .rec file
    several of these      separated by commas, or a list

Beside NAME.rec lies NAME.idx; ``property`` is one for all files of a folder. Shards come in the
order of their names, with numbers in them taken as numbers.

Labels: files of one folder share theirs, label 3 is the same person in all of them. Several folders
must say what theirs mean (``config.rec_labels``):

    "shared"      parts of one set, as above
    "separate"    sets of different people; the labels of each are counted on from the classes of
                  those before
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from utils.errors import InputError

# what rec_labels may be
LABELS = ("auto", "shared", "separate")

# (height, width) of the images
IMAGE_SIZE = (112, 112)


class Folder(NamedTuple):
    """The files of one folder that belong to a set."""

    path: str
    # names of record files in it
    recs: list[str]

    def existing(self) -> list[str]:
        """Names of all files that are there: records, their indices, the property file."""
        indices = [f"{stem(rec)}.idx" for rec in self.recs]
        names = [*self.recs, *indices, "property"]
        return [name for name in names if os.path.isfile(os.path.join(self.path, name))]


def stem(rec: str) -> str:
    return rec.removesuffix(".rec")


def by_number(name: str) -> list:
    """Sort key: train_2.rec before train_10.rec."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def find_folders(rec: str | Sequence[str]) -> list[Folder]:
    """The files that ``rec``, a path or a list of paths, names, by folder.

    Raises InputError if a file is named twice, or none at all.
    """
    folders = {}
    for entry in [rec] if isinstance(rec, (str, os.PathLike)) else rec:
        path = os.path.abspath(entry)
        if path.endswith(".rec") and not os.path.isdir(path):
            folder, name = os.path.split(path)
            names = [name]
        else:
            folder, names = path, records_in(path)
        named_before = folders.setdefault(folder, [])
        for name in names:
            if name in named_before:
                raise InputError(
                    f"rec names {os.path.join(folder, name)} twice; every file of a set once"
                )
            named_before.append(name)
    if not folders:
        raise InputError(
            "rec names no file: the folder of train.rec, or several paths separated by commas"
        )
    return [Folder(path, names) for path, names in folders.items()]


def records_in(folder: str) -> list[str]:
    """The record files of a folder: train.rec, or its shards."""
    if os.path.isfile(os.path.join(folder, "train.rec")) or not os.path.isdir(folder):
        # whoever opens a missing one says so
        return ["train.rec"]
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
    with os.scandir(folder) as scanned:
        entries = list(scanned)
    names = [entry.name for entry in entries]
    recs = [name for name in names if name.endswith(".rec")]
    if "train.idx" in names or "property" in names or any(rec.startswith("train") for rec in recs):
        return True
    # of other names, which find_folders asks to be named, where they are all there is
    has_folders = any(entry.is_dir() and not entry.name.startswith(".") for entry in entries)
    return bool(recs) and not has_folders


def split_paths(text: str, base: Path) -> list[str]:
    """What a text names: one path, or several with commas between (unless the whole is a path)."""
    if "," not in text or (base / Path(text).expanduser()).exists():
        return [text]
    return [path.strip() for path in text.split(",") if path.strip()]


def labels_are_separate(labels: str, folders: Sequence[Folder]) -> bool:
    """Whether each folder has people of its own, by ``rec_labels``.

    Raises InputError if several folders leave it open.
    """
    if labels not in LABELS:
        raise InputError(f"rec_labels={labels!r} is unknown; allowed: {', '.join(LABELS)}")
    if labels == "auto" and len(folders) > 1:
        listed = ", ".join(folder.path for folder in folders)
        raise InputError(
            f"rec names {len(folders)} folders ({listed}): set rec_labels=shared if a label is the "
            "same person in all of them, or rec_labels=separate if each has people of its own"
        )
    return labels == "separate"


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
