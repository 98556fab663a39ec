"""Training images: RecordIO files (InsightFace or im2rec) or a folder of identities, decoded in
batches by the DataLoader's workers.

Torch is imported only where a batch is made, so that the MXNet backend runs in MXNet's own
environment, which has no torch.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from utils.errors import InputError
from utils.record_set import (
    IMAGE_SIZE,
    LONGEST_HOLE,
    Shard,
    check_labels,
    find_folders,
    read_property,
)
from utils.recordio import EXACT_IN_FLOAT32, IRHeader, RecordError, write_property

if TYPE_CHECKING:
    import torch

    from utils.teacher_cache import TeacherCache

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".jp2")
JPEG_START = b"\xff\xd8\xff"
# begins an image that is stored as it is, a PPM file: read without OpenCV, in a tenth of the time
PIXELS = b"P6\n%d %d\n255\n" % IMAGE_SIZE[::-1]
# of a set that does not ascend by label as InsightFace's does, and of one that does
LABELS_LOOKED_AT, ASCENDING_LOOKED_AT = 1 << 19, 1 << 12
# of the folders and files that a message is about
NAMED = 3
# for the identity of a set: half a second for six million images
OFFSETS_LOOKED_AT, RECORDS_LOOKED_AT = 1 << 16, 64

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Images (B, 112, 112, 3) uint8 RGB; labels (B,) int64; the damaged records of this batch as
    (key, reason); the teacher's features of the images and of their mirror images (B, 2, D)
    float16, None for a set without."""

    images: "torch.Tensor"
    labels: "torch.Tensor"
    bad: list[tuple[int | str, str]]
    features: "torch.Tensor | None" = None


def decode(encoded: bytes, order: int = cv2.IMREAD_COLOR) -> np.ndarray:
    """Decode a JPEG, PNG, ... to (H, W, 3) uint8 BGR.

    RecordError if OpenCV cannot. order: another way for OpenCV to read it.
    """
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), order) if len(encoded) else None
    except cv2.error as error:  # a damaged header that asks for gigapixels
        raise RecordError(f"{len(encoded)} bytes that OpenCV refuses: {error.err}") from None
    if image is None:
        raise RecordError(f"{len(encoded)} bytes that are no image OpenCV can read")
    return image


def decode_rgb(encoded: bytes) -> np.ndarray:
    """As ``decode``, but RGB."""
    if bytes(encoded[:3]) == JPEG_START:
        # saves a conversion; of some rare formats OpenCV gives BGR all the same
        return decode(encoded, cv2.IMREAD_COLOR_RGB)
    return cv2.cvtColor(decode(encoded), cv2.COLOR_BGR2RGB)


def decode_into(encoded: bytes, out: np.ndarray) -> None:
    """Decode a JPEG, PNG, ... into ``out`` (112, 112, 3) uint8 RGB.

    RecordError if it is no image or not of that size.
    """
    if len(encoded) == len(PIXELS) + out.nbytes and encoded[: len(PIXELS)] == PIXELS:
        np.copyto(out, np.frombuffer(encoded, np.uint8, offset=len(PIXELS)).reshape(out.shape))
        return
    image = decode_rgb(encoded)
    if image.shape != out.shape:
        height, width = image.shape[:2]
        raise RecordError(
            f"the image is {width}x{height}, not {out.shape[1]}x{out.shape[0]}; "
            "align and crop it first"
        )
    np.copyto(out, image)


def first_label(header: IRHeader) -> float:
    """The class label of an image header: the label itself or the first of a vector."""
    return float(header.label[0]) if header.flag else header.label


class FaceImages:
    """What both kinds of set share: decoding, the label check, and the replacement of damaged
    records.

    A subclass sets ``num_classes`` and ``root_dir`` and defines ``__len__``, ``_name(index)``,
    ``_encoded(index)`` -> (bytes, label), ``_label(index)`` and ``identity()``; ``_classes(index)``
    where labels of one part of the set are counted on from another's. ``teacher_features``: where
    every batch finds its teacher features; None: nowhere.
    """

    num_classes: int
    teacher_features: "TeacherCache | None" = None

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(uint8 RGB image (112, 112, 3), label).

        RecordError if it is damaged, InputError if its label is out of range.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        image = np.empty((*IMAGE_SIZE, 3), np.uint8)
        return image, self._read_one(index, image)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The images of ``indices`` as one Batch; the DataLoader calls it once a batch (with
        ``collate_fn=keep_batch``).

        A damaged record is listed in ``bad`` and replaced by the next good one (index + 1, cyclic),
        whose label and features come with it. Errors: InputError for a label out of range, or if
        LONGEST_HOLE records in a row are damaged.
        """
        import torch

        images, labels = empty_rows(len(indices))
        features = (
            None
            if self.teacher_features is None
            else np.empty((len(indices), 2, self.teacher_features.embedding_size), np.float16)
        )
        bad = self.read_into(indices, images, labels, features)
        return Batch(
            torch.from_numpy(images),
            torch.from_numpy(labels),
            bad,
            None if features is None else torch.from_numpy(features),
        )

    def read_batch(
        self, indices: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[int | str, str]]]:
        """As ``__getitems__``, in NumPy arrays and without features."""
        images, labels = empty_rows(len(indices))
        return images, labels, self.read_into(indices, images, labels)

    def read_into(
        self,
        indices: Sequence[int],
        images: np.ndarray,
        labels: np.ndarray,
        features: np.ndarray | None = None,
    ) -> list[tuple[int | str, str]]:
        """As ``__getitems__``, into arrays of the shapes and types of a Batch; returns ``bad``."""
        bad, found = [], list(indices)
        for row, index in enumerate(indices):
            try:
                labels[row] = self._read_one(index, images[row])
            except RecordError as error:
                bad.append((self._name(index), str(error)))
                found[row], labels[row] = self._read_next_good(index, images[row])
        if features is not None:
            features[:] = self.teacher_features.read(found)
        return bad

    def _read_next_good(self, index: int, out: np.ndarray) -> tuple[int, int]:
        """Fill ``out`` with the first readable image after ``index``; returns (its index, its
        label).
        """
        for step in range(1, min(len(self), LONGEST_HOLE + 1)):
            neighbour = (index + step) % len(self)
            try:
                return neighbour, self._read_one(neighbour, out)
            except RecordError as error:
                last = error
        raise InputError(
            f"no readable image among the {min(len(self), LONGEST_HOLE)} after "
            f"{self._name(index)} of {self.root_dir} "
            f"(the last: {last}); check the copy of this set"
        )

    def _read_one(self, index: int, out: np.ndarray) -> int:
        encoded, label = self._encoded(index)
        decode_into(encoded, out)
        return self._checked(label, index)

    def _checked(self, label: float, index: int) -> int:
        """The class of a record with ``label``; InputError naming the record if it is none of this
        set (a NaN is none either).
        """
        first, count = self._classes(index)
        if not 0 <= label < count or label != int(label):
            hint = f"; if its labels run from 1, {self.from_1(count)}" if label == count else ""
            raise InputError(
                f"record {self._name(index)} of {self.root_dir} has label {label:g}, but the set "
                f"has {count} classes (0 ... {count - 1}); mend its property file or "
                f"config.num_classes{hint}"
            )
        return first + int(label)

    def _classes(self, index: int) -> tuple[int, int]:
        """(the class of label 0, number of labels) in the part of the set that holds ``index``."""
        return 0, self.num_classes

    def parts(self) -> list[tuple[slice, int, int]]:
        """(indices, the class of label 0, number of labels) of the parts of the set, in order."""
        return [(slice(0, len(self)), 0, self.num_classes)]

    def name_of(self, index: int) -> int | str:
        """What messages call an image: a record's key, or the path below ``root_dir``."""
        return self._name(index)

    def stored(self, index: int) -> tuple[bytes, float]:
        """(the image file as it is stored, the label as it stands there): neither is checked.

        RecordError if the record is damaged.
        """
        return self._encoded(index)

    def labels(self, indices: Sequence[int]) -> np.ndarray:
        """(n,) int64 labels without reading the images; -1 for a record without a readable header.

        Errors: InputError for a label out of range.
        """
        found = (self._label(index) for index in indices)
        return np.array(
            [
                -1 if label is None else self._checked(label, index)
                for index, label in zip(indices, found, strict=True)
            ],
            np.int64,
        )

    def from_1(self, count: int) -> str:
        """How to train where labels are 1 ... count."""
        or_set = f", or set num_classes={count + 1}" if count == self.num_classes else ""
        return (
            f"let the property file say {count + 1} classes{or_set} (class 0 then stays empty), or "
            "make the set again with labels from 0"
        )

    def labels_to_check(self) -> tuple[np.ndarray, bool]:
        """(indices whose labels to look at before a training, whether labels ascend with it)."""
        raise NotImplementedError

    def one_class(self, label: float) -> str:
        """What to say where all images have this label."""
        return (
            f"all labels are {label:g}: training needs two classes or more, and the identities of "
            "this set are elsewhere (in a list beside it?); pack its images again with "
            "data/make_rec.py, a folder for each identity"
        )

    def identity(self) -> dict:
        """What tells this set from any other, wherever it lies: kind, number and bytes of the
        images, and a SHA-256 over their order and over some of them.
        """
        raise NotImplementedError


def check_classes(dataset: FaceImages) -> None:
    """Look at the labels of a training set before it is trained on: at all, at many of a large one.

    Raises InputError if all images are of one class, which trains to a loss of 0 and to nothing
    else, and for a label that is no class. Warns of classes without images.
    """
    indices, ascending = dataset.labels_to_check()
    # an image of each (class of label 0, number of labels, label)
    examples = {}
    for index in indices.tolist():
        label = dataset._label(index)
        if label is not None:
            examples.setdefault((*dataset._classes(index), label), index)
    for first, count in {part[:2] for part in examples}:
        labels = [label for *part, label in examples if part == [first, count]]
        if min(labels) >= 1 and max(labels) == count:
            raise InputError(
                f"{dataset.root_dir}: labels run from {min(labels):g} to {count} (record "
                f"{dataset.name_of(examples[first, count, count])}), but classes are counted from "
                f"0 and there are {count} (0 ... {count - 1}): {dataset.from_1(count)}"
            )
    classes = {dataset._checked(label, index) for (*_, label), index in examples.items()}
    if len(classes) == 1:
        ((*_, label), _) = examples.popitem()
        if all(dataset._label(index) in (label, None) for index in range(len(dataset))):
            raise InputError(f"{dataset.root_dir}: {dataset.one_class(label)}")
    elif classes:
        warn_of_empty(dataset, classes, len(indices) == len(dataset), ascending)


def warn_of_empty(dataset: FaceImages, classes: set[int], all_seen: bool, ascending: bool) -> None:
    """Log which classes have no image, as far as ``classes``, those that were seen, show it."""
    smallest = min(classes)
    if smallest and (all_seen or ascending):
        log.warning(
            "labels of %s begin at %d: class 0 has no image and stays empty; if labels should "
            "count from 0, make the set again",
            dataset.root_dir,
            smallest,
        )
    empty = [number for number in range(smallest, dataset.num_classes) if number not in classes]
    if all_seen and empty:
        log.warning(
            "%d of the %d classes of %s have no image, class %d for one; data/check_rec.py lists "
            "them",
            len(empty),
            dataset.num_classes,
            dataset.root_dir,
            empty[0],
        )


def empty_rows(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Uninitialised images (count, 112, 112, 3) uint8 and labels (count,) int64."""
    return np.empty((count, *IMAGE_SIZE, 3), np.uint8), np.empty(count, np.int64)


def sampled(length: int, count: int) -> np.ndarray:
    """At most ``count`` indices spread evenly over 0 ... length - 1, both ends among them."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).round().astype(np.int64))


def keep_batch(batch):
    """``collate_fn`` for these sets: their batches are made whole in the worker."""
    return batch


class MXFaceDataset(FaceImages):
    """A set of ``train.rec``, ``train.idx`` and ``property``, in key order; or several such files
    as one set, one after another (``utils.record_set``).

    ``ds[i]`` -> (uint8 RGB image (112, 112, 3), int label); ``len(ds)`` images; ``ds.num_classes``
    from ``property`` or the argument. InsightFace's layout (record 0 holds labels and no image):
    images are the keys 1 ... label[0] - 1. Otherwise (im2rec) every record is an image. A vector
    label: the first value counts. A missing ``.idx`` or ``property`` is rebuilt by scanning, and
    logged. ``backend="mxnet"`` reads and unpacks by MXNet 1.9.1 instead. ``root_dir``: a folder, a
    ``.rec``, or a list of these. ``labels``: what those of several folders mean, "shared" or
    "separate". Records are named by their key, those of several files by file and key.
    Errors: InputError for a missing or empty set, for labels that are left open and for a label
    that is no class; RecordError (``ds[i]``) for a damaged record.
    """

    def __init__(
        self,
        root_dir: str | Sequence[str],
        backend: str = "native",
        num_classes: int | None = None,
        labels: str = "auto",
    ):
        self._folders = find_folders(root_dir)
        separate = check_labels(labels, self._folders)
        self.root_dir = ", ".join(folder.path for folder in self._folders)
        self._shards = [
            Shard(folder.path, rec, backend) for folder in self._folders for rec in folder.recs
        ]
        # of each shard
        self._folder_of = np.repeat(
            np.arange(len(self._folders)), [len(folder.recs) for folder in self._folders]
        )
        self._ends = np.cumsum([shard.count for shard in self._shards])
        for shard in self._shards:
            if shard.count == 0:
                raise InputError(
                    f"{shard.path} holds no image; make the set again with "
                    "data/make_rec.py or copy it again"
                )
        # the class of label 0 and the number of labels, of each folder
        self._first_class, self._class_counts = self._count_classes(num_classes, separate)
        self.num_classes = max(
            int((self._first_class + self._class_counts).max()), num_classes or 0
        )
        for shard, end in zip(self._shards, self._ends, strict=True):
            # labels ascend there, so one look finds a property file of another set
            if shard.insightface:
                self._check_last_label(shard, int(end) - 1)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[int, int]:
        """(shard, number of the image in it)."""
        if len(self._shards) == 1:
            return 0, index
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number]) + self._shards[number].count

    def _name(self, index: int) -> int | str:
        number, at = self._place(index)
        shard = self._shards[number]
        if len(self._shards) == 1:
            return shard.key(at)
        return f"{shard.path if len(self._folders) > 1 else os.path.basename(shard.path)}:{shard.key(at)}"

    def _encoded(self, index: int) -> tuple[bytes, float]:
        number, at = self._place(index)
        header, encoded = self._shards[number].read(at)
        return encoded, first_label(header)

    def _label(self, index: int) -> float | None:
        number, at = self._place(index)
        return self._shards[number].label(at)

    def _classes(self, index: int) -> tuple[int, int]:
        folder = self._folder_of[self._place(index)[0]]
        return int(self._first_class[folder]), int(self._class_counts[folder])

    def identity(self) -> dict:
        """The size of the ``.rec``, and a SHA-256 over all keys, their offsets and some whole
        records (every 89th offset and 64 records of MS1MV2).

        Of several files: their number, their sizes together, and a SHA-256 over the ones of all.
        """
        parts = [shard_identity(shard) for shard in self._shards]
        if len(parts) == 1:
            return parts[0]
        together = hashlib.sha256(
            "\n".join(f"{part['images']} {part['sha256']}" for part in parts).encode()
        )
        return dict(
            kind="records",
            files=len(parts),
            images=len(self),
            bytes=sum(part["bytes"] for part in parts),
            sha256=together.hexdigest(),
        )

    def labels_to_check(self) -> tuple[np.ndarray, bool]:
        """In the order of the files, which random reads would make a long look of."""
        ascending = all(shard.insightface for shard in self._shards)
        most = ASCENDING_LOOKED_AT if ascending else LABELS_LOOKED_AT
        parts = []
        for shard, end in zip(self._shards, self._ends, strict=True):
            numbers = sampled(shard.count, max(most * shard.count // len(self), 2))
            order = shard.file_order()
            if order is not None:
                numbers = order[numbers].astype(np.int64)
            parts.append(int(end) - shard.count + numbers)
        return np.concatenate(parts), ascending

    def parts(self) -> list[tuple[slice, int, int]]:
        starts = np.append(0, self._ends).tolist()
        spans = zip(starts, starts[1:], strict=False)
        return [(slice(first, end), *self._classes(first)) for first, end in spans]

    def shards(self) -> list[Shard]:
        """The record files in the order of their images."""
        return self._shards

    def _count_classes(self, asked: int | None, separate: bool) -> tuple[np.ndarray, np.ndarray]:
        """(the class of label 0, number of labels) of each folder. asked: the number of classes of
        all, None: as many as there are.
        """
        if len(self._folders) == 1:
            return np.array([0]), np.array([self._class_count(0, asked)])
        counts = np.array([self._class_count(number, None) for number in range(len(self._folders))])
        found = int(counts.sum() if separate else counts.max())
        if asked is not None and found > asked:
            raise InputError(
                f"num_classes={asked} is smaller than the {found} classes of {self.root_dir}"
            )
        if asked is not None and found != asked:
            log.warning("%s have %d classes, num_classes=%d is used", self.root_dir, found, asked)
        if separate:
            return np.cumsum(counts) - counts, counts
        return np.zeros_like(counts), np.full_like(counts, asked or found)

    def _class_count(self, folder: int, asked: int | None) -> int:
        """Number of classes of a folder: as asked, else from ``property``, else from the labels of
        all its records.
        """
        path = os.path.join(self._folders[folder].path, "property")
        stored = read_property(path) if os.path.isfile(path) else None
        if asked is not None:
            if stored is not None and stored > asked:
                raise InputError(
                    f"num_classes={asked} is smaller than the {stored} classes of {self.root_dir}; "
                    "num_classes=0 takes as many as the set has"
                )
            if stored is not None and stored != asked:
                log.warning("%s says %d classes, num_classes=%d is used", path, stored, asked)
            return asked
        return self._rebuild_property(folder, path) if stored is None else stored

    def _rebuild_property(self, folder: int, path: str) -> int:
        """Count the classes in the image headers; keep the result for the next run where allowed.

        That of a single class is not kept: it says nothing, and whoever trains on it is refused.
        """
        shards = [
            shard
            for shard, its_folder in zip(self._shards, self._folder_of, strict=True)
            if its_folder == folder
        ]
        count = sum(shard.count for shard in shards)
        log.warning("%s is missing: counting the classes in the headers of %d records", path, count)
        smallest, largest = EXACT_IN_FLOAT32, -1
        for shard in shards:
            for at in range(shard.count):
                label = shard.label(at)
                # damaged records, labels beyond what float32 counts and NaN are reported later
                if label is not None and label < EXACT_IN_FLOAT32:
                    smallest, largest = min(smallest, label), max(largest, label)
        num_classes = 1 + int(largest)
        if smallest < largest and os.access(os.path.dirname(path), os.W_OK):
            write_property(os.path.dirname(path), num_classes, IMAGE_SIZE)
            log.warning("rebuilt %s: %d classes", path, num_classes)
        else:
            log.warning("%d classes in %s", num_classes, os.path.dirname(path))
        return num_classes

    def _check_last_label(self, shard: Shard, index: int) -> None:
        try:
            self[index]
        except RecordError as error:
            log.warning(
                "the last image of %s is damaged: %s",
                os.path.dirname(shard.path) if len(self._shards) == 1 else shard.path,
                error,
            )


def shard_identity(shard: Shard) -> dict:
    """What tells one ``.rec`` from any other."""
    index, images = shard.index.index, slice(shard.first, shard.first + shard.count)
    keys, offsets = index.keys[images], index.offsets[images]
    digest = hashlib.sha256()
    for first in range(0, len(keys), 1 << 20):
        digest.update(keys[first : first + (1 << 20)].astype("<i8").tobytes())
    digest.update(offsets[sampled(len(keys), OFFSETS_LOOKED_AT)].astype("<i8").tobytes())
    for at in sampled(len(keys), RECORDS_LOOKED_AT):
        try:
            record = shard.index.read_at(shard.first + int(at))
        except RecordError:
            record = b"damaged"
        digest.update(hashlib.sha256(record).digest())
    return dict(
        kind="records",
        images=shard.count,
        bytes=os.path.getsize(shard.path),
        sha256=digest.hexdigest(),
    )


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
