"""What record and folder sets share: decoding, the label check, damaged images replaced.

Torch is imported only where a batch is made, so that the MXNet backend runs in MXNet's own
environment, which has no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from utils.errors import InputError
from utils.images import decode_rgb
from utils.recordio.files import IMAGE_SIZE, LONGEST_HOLE
from utils.recordio.format import IRHeader, RecordError

if TYPE_CHECKING:
    import torch

    from utils.teacher.cache import TeacherCache

# begins an image that is stored as it is, a PPM file: read without OpenCV, in a tenth of the time
PIXELS = b"P6\n%d %d\n255\n" % IMAGE_SIZE[::-1]


# for the identity of a set: half a second for six million images
OFFSETS_LOOKED_AT, RECORDS_LOOKED_AT = 1 << 16, 64


log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Images (B, 112, 112, 3) uint8 RGB; labels (B,) int64; the damaged records of this batch as
    (key, reason); the teacher's features of the images and of their mirror images (B, 2, D)
    float16, None for a set without."""

    images: torch.Tensor
    labels: torch.Tensor
    bad: list[tuple[int | str, str]]
    features: torch.Tensor | None = None


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
    teacher_features: TeacherCache | None = None

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


def empty_rows(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Uninitialised images (count, 112, 112, 3) uint8 and labels (count,) int64."""
    return np.empty((count, *IMAGE_SIZE, 3), np.uint8), np.empty(count, np.int64)


def sampled(length: int, count: int) -> np.ndarray:
    """At most ``count`` indices spread evenly over 0 ... length - 1, both ends among them."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).round().astype(np.int64))


def keep_batch(batch):
    """``collate_fn`` for these sets: their batches are made whole in the worker."""
    return batch
