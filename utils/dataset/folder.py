"""A folder with one sub-folder of images per identity as a training set."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from utils.dataset.base import RECORDS_LOOKED_AT, FaceImages, log, sampled
from utils.errors import InputError
from utils.recordio.format import RecordError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".jp2")


# of the folders and files that a message is about
NAMED = 3


class FaceDatasetFolder(FaceImages):
    """A folder of identities: sorted sub-folders are the labels 0, 1, ..., their sorted image files
    the images.

    ``sample``: the first so many images of each identity (all if None). Items, ``num_classes`` and
    batches as MXFaceDataset; records are named by their path below ``root_dir``. Raises InputError
    as ``list_identities``.
    """

    def __init__(self, root_dir: str, sample: int | None = None):
        self.root_dir = os.path.abspath(root_dir)
        found = scan_identities(self.root_dir)
        self._refuse_empty(found)
        groups = [group[:sample] for group in found.groups]
        self.identities = found.names
        self.num_classes = len(groups)
        # one array of bytes: half a million str objects would be copied into every worker by their
        # reference counts
        self._paths = np.array([os.fsencode(path) for group in groups for path in group])
        self._labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])

    def _refuse_empty(self, found: "Identities") -> None:
        refuse_empty(self.root_dir, found)

    def __len__(self) -> int:
        return len(self._paths)

    def _name(self, index: int) -> str:
        return os.fsdecode(self._paths[index])

    def _encoded(self, index: int) -> tuple[bytes, int]:
        try:
            with open(os.path.join(self.root_dir, self._name(index)), "rb") as file:
                return file.read(), int(self._labels[index])
        except OSError as error:
            raise RecordError(f"cannot be read: {error.strerror}") from None

    def _label(self, index: int) -> int:
        return int(self._labels[index])

    def labels_to_check(self) -> tuple[np.ndarray, bool]:
        return sampled(len(self), 2), True

    def one_class(self, label: float) -> str:
        return (
            f"all images are of one identity ({self.identities[int(label)]}): training needs two "
            "or more, a sub-folder for each"
        )

    def identity(self) -> dict:
        """The bytes of all files together, and a SHA-256 over all paths below ``root_dir``, their
        sizes and 64 whole files.
        """
        sizes = np.array([self._size(index) for index in range(len(self))], "<i8")
        digest = hashlib.sha256(b"\n".join(self._paths.tolist()) + sizes.tobytes())
        for index in sampled(len(self), RECORDS_LOOKED_AT):
            try:
                content = self._encoded(index)[0]
            except RecordError:
                content = b"damaged"
            digest.update(hashlib.sha256(content).digest())
        return dict(
            kind="folder",
            images=len(self),
            bytes=int(sizes[sizes >= 0].sum()),
            sha256=digest.hexdigest(),
        )

    def _size(self, index: int) -> int:
        try:
            return os.path.getsize(os.path.join(self.root_dir, self._name(index)))
        except OSError:
            return -1  # a damaged record like any other


class Identities(NamedTuple):
    """What a folder holds.

    names: its sub-folders, sorted. groups: of each the paths of its images below the folder,
    sorted. Those without images are in one of three more: nested {name: sub-folders that hold
    images}, others {name: files with other suffixes}, bare [names of folders with neither].
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
    found = scan_identities(root_dir)
    refuse_empty(root_dir, found)
    return [group[:sample] for group in found.groups]


def scan_identities(root_dir: str) -> Identities:
    """As ``list_identities``, but identities without images are no error."""
    root = os.path.abspath(root_dir)
    if not os.path.isdir(root):
        raise InputError(f"no folder {root}; it should hold one sub-folder of images per identity")
    identities, loose = split_folder(root)
    found = Identities(identities, [], {}, {}, [])
    left_out, deeper = [], []
    for identity in identities:
        folders, files = split_folder(os.path.join(root, identity))
        found.groups.append([os.path.join(identity, name) for name in files if is_image_name(name)])
        others = [os.path.join(identity, name) for name in files if not is_image_name(name)]
        nested = [name for name in folders if holds_images(os.path.join(root, identity, name))]
        if found.groups[-1]:
            left_out += others
            deeper += [os.path.join(identity, name) for name in nested]
        elif nested:
            found.nested[identity] = nested
        elif others:
            found.others[identity] = others
        else:
            found.bare.append(identity)
    loose = [name for name in loose if is_image_name(name)]
    kinds = f"other suffixes than {' '.join(IMAGE_SUFFIXES)} ({suffixes(left_out)})"
    for what, paths in (
        (f"{len(left_out)} files with {kinds}", left_out),
        (f"the images in {len(deeper)} sub-folders of identities", deeper),
        (f"{len(loose)} images in no identity's folder", loose),
    ):
        if paths:
            log.warning("%s: left out are %s: %s", root, what, few(paths))
    return found


def is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def split_folder(folder: str) -> tuple[list[str], list[str]]:
    """(names of its sub-folders, of its files), sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        seen = sorted((entry.name, entry.is_dir()) for entry in entries if entry.name[0] != ".")
    return [name for name, is_dir in seen if is_dir], [name for name, is_dir in seen if not is_dir]


def holds_images(folder: str) -> bool:
    """Whether there is an image in the folder or below it."""
    return any(is_image_name(name) for _, _, names in os.walk(folder) for name in names)


def few(names: Sequence[str], most: int = NAMED) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def suffixes(paths: Sequence[str]) -> str:
    """ "3 .jfif, 2 without": how many files have which suffix."""
    counts = Counter(os.path.splitext(path)[1].lower() or "without" for path in paths)
    return few([f"{count} {suffix}" for suffix, count in counts.most_common()], 8)


def refuse_empty(root_dir: str, found: Identities) -> None:
    """Raises InputError if there is no identity, or one without images."""
    root = os.path.abspath(root_dir)
    if not found.names:
        raise InputError(
            f"no images in {root}; it should hold one sub-folder of images per identity"
        )
    without = [name for name, group in zip(found.names, found.groups, strict=True) if not group]
    if len(without) == 1:
        raise InputError(f"identity {without[0]} in {root} has no image: {why_empty(found)}")
    if without:
        counts = f"{len(without)} of {len(found.names)} identities"
        raise InputError(f"{counts} in {root} have no image: {why_empty(found)}")


def why_empty(found: Identities) -> str:
    """Which identities have no images, and what to do: they need not be without photographs."""
    reasons = []
    if found.nested:
        folders = list(dict.fromkeys(name for names in found.nested.values() for name in names))
        reasons.append(
            f"the images of {few(list(found.nested))} lie in sub-folders ({few(folders)}): move "
            "them up into the identity's own, or name the folder that holds the identities"
        )
    if found.others:
        files = [path for paths in found.others.values() for path in paths]
        reasons.append(
            f"{few(list(found.others))}: only files with other suffixes ({suffixes(files)}) than "
            f"{' '.join(IMAGE_SUFFIXES)}: rename or convert them"
        )
    if found.bare:
        reasons.append(f"{few(found.bare)}: empty; remove such folders")
    return "; ".join(reasons)
