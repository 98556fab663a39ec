"""A folder with one sub-folder of images per identity as a training set."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from utils.dataset.base import FaceImages
from utils.dataset.identity import folder_identity
from utils.errors import InputError, RecordError
from utils.recordio.image_records import sampled

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".jp2")

# of the folders and files that a message is about, so many are named
NAMED = 3

log = logging.getLogger(__name__)


class FaceDatasetFolder(FaceImages):
    """A folder of identities: sorted sub-folders are the labels 0, 1, ..., their sorted image files
    the images.

    ``sample``: the first so many images of each identity (all if None). Items, ``num_classes`` and
    batches as MXFaceDataset; records are named by their path below ``root_dir``. Raises InputError
    as ``list_identities``.
    """

    def __init__(self, root_dir: str, sample: int | None = None):
        self.root_dir = os.path.abspath(root_dir)
        scanned = scan_identities(self.root_dir)
        self._refuse_empty(scanned)
        groups = [group[:sample] for group in scanned.groups]
        self.identities = scanned.names
        self.num_classes = len(groups)
        # one array of bytes: half a million str objects would be copied into every worker by their
        # reference counts
        self._paths = np.array([os.fsencode(path) for group in groups for path in group])
        self._labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])

    def _refuse_empty(self, identities: "Identities") -> None:
        refuse_empty(self.root_dir, identities)

    def __len__(self) -> int:
        return len(self._paths)

    def name_of(self, index: int) -> str:
        return os.fsdecode(self._paths[index])

    def stored(self, index: int) -> tuple[bytes, int]:
        try:
            with open(os.path.join(self.root_dir, self.name_of(index)), "rb") as file:
                return file.read(), int(self._labels[index])
        except OSError as error:
            raise RecordError(f"cannot be read: {error.strerror}") from None

    def label_of(self, index: int) -> int:
        return int(self._labels[index])

    def labels_to_check(self) -> tuple[np.ndarray, bool]:
        return sampled(len(self), 2), True

    def identity(self) -> dict:
        return folder_identity(self.root_dir, self._paths)


class Identities(NamedTuple):
    """What a folder holds.

    names: its sub-folders, sorted. groups: of each the paths of its images below the folder,
    sorted. Those without images are in one of three more:

        nested    {name: sub-folders that hold images}
        others    {name: files with other suffixes}
        bare      [names of folders with neither]
    """

    names: list[str]
    groups: list[list[str]]
    nested: dict[str, list[str]]
    others: dict[str, list[str]]
    bare: list[str]


def list_identities(root_dir: str, sample: int | None = None) -> list[list[str]]:
    """Image paths below ``root_dir``, one sorted list per identity (sub-folder, sorted by name;
    hidden ones are skipped).

    ``sample``: at most so many of each. Raises InputError if there is no such folder, no image, or
    an identity without images. Logs which files and sub-folders are left out.
    """
    identities = scan_identities(root_dir)
    refuse_empty(root_dir, identities)
    return [group[:sample] for group in identities.groups]


def scan_identities(root_dir: str) -> Identities:
    """As ``list_identities``, but identities without images are no error."""
    root = os.path.abspath(root_dir)
    if not os.path.isdir(root):
        raise InputError(f"no folder {root}; it should hold one sub-folder of images per identity")
    names, loose = split_folder(root)
    identities = Identities(names, [], {}, {}, [])
    left_out, deeper = [], []
    for name in names:
        folders, files = split_folder(os.path.join(root, name))
        images = [os.path.join(name, file) for file in files if is_image_name(file)]
        others = [os.path.join(name, file) for file in files if not is_image_name(file)]
        nested = [folder for folder in folders if holds_images(os.path.join(root, name, folder))]
        identities.groups.append(images)
        if images:
            left_out += others
            deeper += [os.path.join(name, folder) for folder in nested]
        elif nested:
            identities.nested[name] = nested
        elif others:
            identities.others[name] = others
        else:
            identities.bare.append(name)
    loose = [file for file in loose if is_image_name(file)]
    kinds = f"other suffixes than {' '.join(IMAGE_SUFFIXES)} ({suffixes(left_out)})"
    for what, paths in (
        (f"{len(left_out)} files with {kinds}", left_out),
        (f"the images in {len(deeper)} sub-folders of identities", deeper),
        (f"{len(loose)} images in no identity's folder", loose),
    ):
        if paths:
            log.warning("%s: left out are %s: %s", root, what, few(paths))
    return identities


def is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def split_folder(folder: str) -> tuple[list[str], list[str]]:
    """(names of its sub-folders, of its files), sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        visible = sorted((entry.name, entry.is_dir()) for entry in entries if entry.name[0] != ".")
    folders = [name for name, is_folder in visible if is_folder]
    return folders, [name for name, is_folder in visible if not is_folder]


def holds_images(folder: str) -> bool:
    """Whether there is an image in the folder or below it."""
    return any(is_image_name(name) for _, _, names in os.walk(folder) for name in names)


def few(names: Sequence[str], most: int = NAMED) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def suffixes(paths: Sequence[str]) -> str:
    """ "3 .jfif, 2 without": how many files have which suffix."""
    counts = Counter(os.path.splitext(path)[1].lower() or "without" for path in paths)
    return few([f"{count} {suffix}" for suffix, count in counts.most_common()], 8)


def refuse_empty(root_dir: str, identities: Identities) -> None:
    """Raises InputError if there is no identity, or one without images."""
    root = os.path.abspath(root_dir)
    if not identities.names:
        raise InputError(
            f"no images in {root}; it should hold one sub-folder of images per identity"
        )
    without = [
        name for name, group in zip(identities.names, identities.groups, strict=True) if not group
    ]
    if len(without) == 1:
        raise InputError(f"identity {without[0]} in {root} has no image: {why_empty(identities)}")
    if without:
        counts = f"{len(without)} of {len(identities.names)} identities"
        raise InputError(f"{counts} in {root} have no image: {why_empty(identities)}")


def why_empty(identities: Identities) -> str:
    """Which identities have no images, and what to do: they need not be without photographs."""
    reasons = []
    if identities.nested:
        folders = list(dict.fromkeys(chain(*identities.nested.values())))
        reasons.append(
            f"the images of {few(list(identities.nested))} lie in sub-folders ({few(folders)}): "
            "move them up into the identity's own, or name the folder that holds the identities"
        )
    if identities.others:
        kinds = suffixes(list(chain(*identities.others.values())))
        reasons.append(
            f"{few(list(identities.others))}: only files with other suffixes ({kinds}) than "
            f"{' '.join(IMAGE_SUFFIXES)}: rename or convert them"
        )
    if identities.bare:
        reasons.append(f"{few(identities.bare)}: empty; remove such folders")
    return "; ".join(reasons)
