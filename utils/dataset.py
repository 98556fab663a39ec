"""Training images: a RecordIO set (InsightFace or im2rec) or a folder of identities, decoded in batches by the DataLoader's workers.

Torch is imported only where a batch is made, so that the MXNet backend runs in MXNet's own environment, which has no torch.
"""
import hashlib
import logging
import os
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from utils.errors import InputError
from utils.recordio import EXACT_IN_FLOAT32, IndexedRecordIO, IRHeader, RecordError, unpack, write_property

if TYPE_CHECKING:
    import torch

    from utils.teacher_cache import TeacherCache

IMAGE_SIZE = (112, 112)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".jp2")
LONGEST_HOLE = 1000     # so many damaged records in a row are a damaged file: stop looking for a neighbour
OFFSETS_LOOKED_AT, RECORDS_LOOKED_AT = 1 << 16, 64      # for the identity of a set: half a second for six million images

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Images (B, 112, 112, 3) uint8 RGB; labels (B,) int64; the damaged records of this batch as (key, reason); the teacher's
    features of the images and of their mirror images (B, 2, D) float16, None for a set without."""

    images: "torch.Tensor"
    labels: "torch.Tensor"
    bad: list[tuple[int | str, str]]
    features: "torch.Tensor | None" = None


def decode(encoded: bytes) -> np.ndarray:
    """Decode a JPEG, PNG, ... to (H, W, 3) uint8 BGR. RecordError if OpenCV cannot."""
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR) if len(encoded) else None
    except cv2.error as error:          # a damaged header that asks for gigapixels
        raise RecordError(f"{len(encoded)} bytes that OpenCV refuses: {error.err}") from None
    if image is None:
        raise RecordError(f"{len(encoded)} bytes that are no image OpenCV can read")
    return image


def decode_into(encoded: bytes, out: np.ndarray) -> None:
    """Decode a JPEG, PNG, ... into ``out`` (H, W, 3) uint8 RGB. RecordError if it is no image or not of that size."""
    image = decode(encoded)
    if image.shape != out.shape:
        height, width = image.shape[:2]
        raise RecordError(f"the image is {width}x{height}, not {out.shape[1]}x{out.shape[0]}; align and crop it first")
    cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=out)


def first_label(header: IRHeader) -> float:
    """The class label of an image header: the label itself or the first of a vector."""
    return float(header.label[0]) if header.flag else header.label


class FaceImages:
    """What both kinds of set share: decoding, the label check, and the replacement of damaged records.

    A subclass sets ``num_classes`` and ``root_dir`` and defines ``__len__``, ``_name(index)``, ``_encoded(index)`` -> (bytes, label), ``_label(index)`` and
    ``identity()``. ``teacher_features``: where every batch finds its teacher features; None: nowhere.
    """

    num_classes: int
    teacher_features: "TeacherCache | None" = None

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(uint8 RGB image (112, 112, 3), label). RecordError if it is damaged, InputError if its label is out of range."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        image = np.empty((*IMAGE_SIZE, 3), np.uint8)
        return image, self._read_into(index, image)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The images of ``indices`` as one Batch; the DataLoader calls it once a batch (with ``collate_fn=keep_batch``).

        A damaged record is listed in ``bad`` and replaced by the next good one (index + 1, cyclic), whose label and features come with it.
        Errors: InputError for a label out of range, or if LONGEST_HOLE records in a row are damaged.
        """
        import torch
        images, labels, bad, found = self._read_rows(indices)
        features = None if self.teacher_features is None else torch.from_numpy(self.teacher_features.read(found))
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), bad, features)

    def read_batch(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, list[tuple[int | str, str]]]:
        """As ``__getitems__``, in NumPy arrays and without features."""
        return self._read_rows(indices)[:3]

    def _read_rows(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, list[tuple[int | str, str]], list[int]]:
        """(images, labels, bad, the index that each image really was read from)."""
        images = np.empty((len(indices), *IMAGE_SIZE, 3), np.uint8)
        labels = np.empty(len(indices), np.int64)
        bad, found = [], list(indices)
        for row, index in enumerate(indices):
            try:
                labels[row] = self._read_into(index, images[row])
            except RecordError as error:
                bad.append((self._name(index), str(error)))
                found[row], labels[row] = self._read_next_good(index, images[row])
        return images, labels, bad, found

    def _read_next_good(self, index: int, out: np.ndarray) -> tuple[int, int]:
        """Fill ``out`` with the first readable image after ``index``; returns (its index, its label)."""
        for step in range(1, min(len(self), LONGEST_HOLE + 1)):
            neighbour = (index + step) % len(self)
            try:
                return neighbour, self._read_into(neighbour, out)
            except RecordError as error:
                last = error
        raise InputError(f"no readable image among the {min(len(self), LONGEST_HOLE)} after {self._name(index)} of {self.root_dir} "
                         f"(the last: {last}); check the copy of this set")

    def _read_into(self, index: int, out: np.ndarray) -> int:
        encoded, label = self._encoded(index)
        decode_into(encoded, out)
        return self._checked(label, index)

    def _checked(self, label: float, index: int) -> int:
        """``label`` as an int; InputError naming the record if it is no class of this set (a NaN is none either)."""
        if not 0 <= label < self.num_classes or label != int(label):
            raise InputError(f"record {self._name(index)} of {self.root_dir} has label {label:g}, but the set has {self.num_classes} "
                             f"classes (0 ... {self.num_classes - 1}); mend its property file or config.num_classes")
        return int(label)

    def name_of(self, index: int) -> int | str:
        """What messages call an image: a record's key, or the path below ``root_dir``."""
        return self._name(index)

    def labels(self, indices: Sequence[int]) -> np.ndarray:
        """(n,) int64 labels without reading the images; -1 for a record without a readable header. Errors: InputError for a label out of range."""
        found = (self._label(index) for index in indices)
        return np.array([-1 if label is None else self._checked(label, index) for index, label in zip(indices, found)], np.int64)

    def identity(self) -> dict:
        """What tells this set from any other, wherever it lies: kind, number and bytes of the images, and a SHA-256 over their order and over some of them."""
        raise NotImplementedError


def sampled(length: int, count: int) -> np.ndarray:
    """At most ``count`` indices spread evenly over 0 ... length - 1, both ends among them."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).round().astype(np.int64))


def keep_batch(batch: Batch) -> Batch:
    """``collate_fn`` for these sets: their batches are made whole in the worker."""
    return batch


class MXFaceDataset(FaceImages):
    """A set of ``train.rec``, ``train.idx`` and ``property``, in key order.

    ``ds[i]`` -> (uint8 RGB image (112, 112, 3), int label); ``len(ds)`` images; ``ds.num_classes`` from ``property`` or
    the argument. InsightFace's layout (record 0 holds labels and no image): images are the keys 1 ... label[0] - 1.
    Otherwise (im2rec) every record is an image. A vector label: the first value counts. A missing ``.idx`` or
    ``property`` is rebuilt by scanning, and logged. ``backend="mxnet"`` reads and unpacks by MXNet 1.9.1 instead.
    Errors: InputError for a missing or empty set and for a label that is no class; RecordError (``ds[i]``) for a damaged record.
    """

    def __init__(self, root_dir: str, backend: str = "native", num_classes: int | None = None):
        self.root_dir = os.path.abspath(root_dir)
        idx_path, rec_path = os.path.join(self.root_dir, "train.idx"), os.path.join(self.root_dir, "train.rec")
        self._index = IndexedRecordIO(idx_path, rec_path, "r")
        self._records = open_backend(backend, self._index)
        self._insightface = False
        self._keys = self._image_keys()
        if len(self._keys) == 0:
            raise InputError(f"{rec_path} holds no image; make the set again with data/make_rec.py or copy it again")
        self.num_classes = self._class_count(num_classes)
        if self._insightface:       # labels ascend there, so one look finds a property file of another set
            self._check_last_label()

    def __len__(self) -> int:
        return len(self._keys)

    def _name(self, index: int) -> int:
        return int(self._keys[index])

    def _encoded(self, index: int) -> tuple[bytes, float]:
        header, encoded = self._records.read(self._name(index))
        return encoded, first_label(header)

    def _label(self, index: int) -> float | None:
        try:
            glance = self._index.glance(self._name(index))
        except RecordError:
            return None
        return None if glance.id < 0 else glance.label

    def identity(self) -> dict:
        """The size of ``train.rec``, and a SHA-256 over all keys, their offsets and some whole records (every 89th offset and 64 records of MS1MV2)."""
        digest = hashlib.sha256(self._keys.astype("<i8").tobytes())
        offsets = [self._index.offset(self._name(index)) for index in sampled(len(self), OFFSETS_LOOKED_AT)]
        digest.update(np.array(offsets, "<i8").tobytes())
        for index in sampled(len(self), RECORDS_LOOKED_AT):
            try:
                record = self._index.read_idx(self._name(index))
            except RecordError:
                record = b"damaged"
            digest.update(hashlib.sha256(record).digest())
        return dict(kind="records", images=len(self), bytes=os.path.getsize(self._index.rec_path), sha256=digest.hexdigest())

    def _image_keys(self) -> np.ndarray:
        """Keys of the records that are images, ascending: the same whether the index was found or rebuilt."""
        keys = np.sort(self._index.key_array)
        if len(keys) == 0 or keys[0] != 0:
            return keys
        glance = self._index.glance(0)
        self._insightface = glance.id >= 0 and not glance.has_image
        return keys[(keys >= 1) & (keys < glance.label)] if self._insightface else keys

    def _class_count(self, asked: int | None) -> int:
        """Number of classes: as asked, else from ``property``, else from the labels of all records."""
        path = os.path.join(self.root_dir, "property")
        stored = read_property(path) if os.path.isfile(path) else None
        if asked is not None:
            if stored is not None and stored > asked:
                raise InputError(f"num_classes={asked} is smaller than the {stored} classes of {self.root_dir}")
            if stored is not None and stored != asked:
                log.warning("%s says %d classes, num_classes=%d is used", path, stored, asked)
            return asked
        return self._rebuild_property(path) if stored is None else stored

    def _rebuild_property(self, path: str) -> int:
        """Count the classes in the image headers; keep the result for the next run where that is allowed."""
        log.warning("%s is missing: counting the classes in the headers of %d records", path, len(self))
        labels = (self._index.glance(int(key)).label for key in self._keys)
        # no label beyond what float32 counts, and no NaN: those are reported when they are read
        num_classes = 1 + int(max((label for label in labels if label < EXACT_IN_FLOAT32), default=-1))
        if os.access(self.root_dir, os.W_OK):
            write_property(self.root_dir, num_classes, IMAGE_SIZE)
        log.warning("rebuilt %s: %d classes", path, num_classes)
        return num_classes

    def _check_last_label(self) -> None:
        try:
            self[len(self) - 1]
        except RecordError as error:
            log.warning("the last image of %s is damaged: %s", self.root_dir, error)


def read_property(path: str) -> int:
    """Number of classes of a ``property`` file (``classes,height,width``); InputError if it holds something else."""
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read().strip()
    try:
        num_classes, height, width = (int(field) for field in text.split(","))
        if num_classes < 1:
            raise ValueError
    except ValueError:
        raise InputError(f"{path} holds {text[:40]!r} instead of classes,height,width; delete it to have it rebuilt") from None
    if (height, width) != IMAGE_SIZE:
        raise InputError(f"{path} says images of {height}x{width}; this project trains on 112x112 crops, make the set again with data/make_rec.py")
    return num_classes


class NativeRecords:
    """Records through ``utils.recordio``."""

    def __init__(self, index: IndexedRecordIO):
        self._index = index

    def read(self, key: int) -> tuple[IRHeader, memoryview]:
        """(header, encoded image) of the record ``key``; RecordError if it is damaged."""
        header, encoded = unpack(memoryview(self._index.read_idx(key)))
        return header, encoded


class MXNetRecords:
    """Records through MXNet itself (Python <= 3.11, requirements/mxnet.txt): to prove that the native reader agrees."""

    def __init__(self, index: IndexedRecordIO):
        try:
            import mxnet
        except (ImportError, OSError, AttributeError) as error:     # OSError: a library is missing; AttributeError: NumPy has no np.bool
            raise InputError(f'rec_backend "mxnet" needs MXNet, which does not import here ({error}); install requirements/mxnet.txt '
                             f'in an environment with Python <= 3.11, or use rec_backend="native"') from None
        if not os.path.isfile(index.idx_path):
            raise InputError(f'rec_backend "mxnet" needs {index.idx_path}, and its folder is not writable; use rec_backend="native"')
        self._records = mxnet.recordio.MXIndexedRecordIO(index.idx_path, index.rec_path, "r")
        self._unpack = mxnet.recordio.unpack
        self._error = mxnet.base.MXNetError

    def read(self, key: int) -> tuple[IRHeader, bytes]:
        """(header, encoded image) of the record ``key``; RecordError if it is damaged."""
        try:
            record = self._records.read_idx(key)
        except self._error as error:
            raise RecordError(f"key {key}: {str(error).strip().splitlines()[-1]}") from None
        if record is None:
            raise RecordError(f"key {key}: truncated, the file ends before it")
        try:
            return self._unpack(record)
        except (struct.error, ValueError) as error:
            raise RecordError(f"key {key}: its image header does not fit ({error})") from None


BACKENDS = {"native": NativeRecords, "mxnet": MXNetRecords}


def open_backend(backend: str, index: IndexedRecordIO) -> NativeRecords | MXNetRecords:
    """The reader named ``backend``: "native" or "mxnet"."""
    if backend not in BACKENDS:
        raise InputError(f"unknown rec_backend {backend!r}; known: {', '.join(BACKENDS)}")
    return BACKENDS[backend](index)


class FaceDatasetFolder(FaceImages):
    """A folder of identities: sorted sub-folders are the labels 0, 1, ..., their sorted image files the images.

    ``sample``: the first so many images of each identity (all if None). Items, ``num_classes`` and batches as MXFaceDataset;
    records are named by their path below ``root_dir``. Errors: InputError if the folder is missing or holds no images.
    """

    def __init__(self, root_dir: str, sample: int | None = None):
        self.root_dir = os.path.abspath(root_dir)
        groups = list_identities(self.root_dir, sample)
        self.num_classes = len(groups)
        # one array of bytes: half a million str objects would be copied into every worker by their reference counts
        self._paths = np.array([os.fsencode(path) for group in groups for path in group])
        self._labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])

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

    def identity(self) -> dict:
        """The bytes of all files together, and a SHA-256 over all paths below ``root_dir``, their sizes and 64 whole files."""
        sizes = np.array([self._size(index) for index in range(len(self))], "<i8")
        digest = hashlib.sha256(b"\n".join(self._paths.tolist()) + sizes.tobytes())
        for index in sampled(len(self), RECORDS_LOOKED_AT):
            try:
                content = self._encoded(index)[0]
            except RecordError:
                content = b"damaged"
            digest.update(hashlib.sha256(content).digest())
        return dict(kind="folder", images=len(self), bytes=int(sizes[sizes >= 0].sum()), sha256=digest.hexdigest())

    def _size(self, index: int) -> int:
        try:
            return os.path.getsize(os.path.join(self.root_dir, self._name(index)))
        except OSError:
            return -1       # a damaged record like any other


def list_identities(root_dir: str, sample: int | None = None) -> list[list[str]]:
    """Image paths below ``root_dir``, one sorted list per identity (sub-folder, sorted by name; hidden ones are skipped).

    ``sample``: at most so many of each. Errors: InputError if there is no such folder, no image, or an identity without images.
    """
    if not os.path.isdir(root_dir):
        raise InputError(f"no folder {os.path.abspath(root_dir)}; it should hold one sub-folder of images per identity")
    with os.scandir(root_dir) as entries:
        identities = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    groups = []
    for identity in identities:
        files = (name for name in os.listdir(os.path.join(root_dir, identity)) if name.lower().endswith(IMAGE_SUFFIXES))
        groups.append([os.path.join(identity, name) for name in sorted(files) if not name.startswith(".")][:sample])
        if not groups[-1]:
            raise InputError(f"identity {identity} in {os.path.abspath(root_dir)} has no image ({', '.join(IMAGE_SUFFIXES)}); remove its folder")
    if not groups:
        raise InputError(f"no images in {os.path.abspath(root_dir)}; it should hold one sub-folder of images per identity")
    return groups
