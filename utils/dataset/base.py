"""What record and folder sets share: decoding, the label check, damaged images replaced.

Torch is imported only where a batch is made, so that the MXNet backend runs in MXNet's own
environment, which has no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from utils.dataset.labels import wrong_label
from utils.errors import InputError, RecordError
from utils.images import decode_rgb
from utils.recordio.files import IMAGE_SIZE
from utils.recordio.format import IRHeader
from utils.recordio.image_records import LONGEST_HOLE

if TYPE_CHECKING:
    import torch

# begins an image that is stored as it is, a PPM file: read without OpenCV, in a tenth of the time
PIXELS = b"P6\n%d %d\n255\n" % IMAGE_SIZE[::-1]


class TeacherFeatures(Protocol):
    """Where a set finds what its teacher makes of its images."""

    embedding_size: int

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """(n, 2, D) float16 features of the images ``indices`` and of their mirror images."""


class Batch(NamedTuple):
    """B images, as the DataLoader gives them.

    images: (B, 112, 112, 3) uint8 RGB. labels: (B,) int64. bad: the damaged records of this batch
    as (key, reason). features: (B, 2, D) float16, the teacher's of the images and of their mirror
    images; None for a set without.
    """

    images: torch.Tensor
    labels: torch.Tensor
    bad: list[tuple[int | str, str]]
    features: torch.Tensor | None = None


class FaceImages:
    """Aligned face images with class labels, read in batches; damaged ones are replaced.

    A subclass sets ``num_classes`` and ``root_dir`` and defines ``__len__``, ``name_of``,
    ``stored``, ``label_of`` and what stands at the end of this class; ``class_range`` and ``parts``
    where labels of one part of the set are counted on from another's. ``teacher_features``: where
    every batch finds its teacher features; None: nowhere.
    """

    num_classes: int
    root_dir: str
    teacher_features: TeacherFeatures | None = None

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(uint8 RGB image (112, 112, 3), label).

        Raises RecordError if it is damaged, InputError if its label is out of range.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        image = np.empty((*IMAGE_SIZE, 3), np.uint8)
        return image, self._read_one(index, image)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The images of ``indices`` as one Batch; the DataLoader calls it once a batch (with
        ``collate_fn=keep_batch``).

        A damaged record is listed in ``bad`` and replaced by the next good one (index + 1, cyclic),
        whose label and features come with it. Raises InputError for a label out of range, or if
        LONGEST_HOLE records in a row are damaged.
        """
        import torch

        images, labels = empty_rows(len(indices))
        if self.teacher_features is None:
            bad = self.read_into(indices, images, labels)
            return Batch(torch.from_numpy(images), torch.from_numpy(labels), bad)
        shape = len(indices), 2, self.teacher_features.embedding_size
        features = np.empty(shape, np.float16)
        bad = self.read_into(indices, images, labels, features)
        return Batch(
            torch.from_numpy(images), torch.from_numpy(labels), bad, torch.from_numpy(features)
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
        bad, read = [], list(indices)
        for row, index in enumerate(indices):
            try:
                labels[row] = self._read_one(index, images[row])
            except RecordError as error:
                bad.append((self.name_of(index), str(error)))
                read[row], labels[row] = self._read_next_good(index, images[row])
        if features is not None:
            features[:] = self.teacher_features.read(read)
        return bad

    def _read_next_good(self, index: int, out: np.ndarray) -> tuple[int, int]:
        """Fill ``out`` with the first readable image after ``index``; (its index, its label)."""
        looked_at = min(len(self), LONGEST_HOLE)
        for step in range(1, min(len(self), LONGEST_HOLE + 1)):
            neighbour = (index + step) % len(self)
            try:
                return neighbour, self._read_one(neighbour, out)
            except RecordError as error:
                last = error
        raise InputError(
            f"no readable image among the {looked_at} after {self.name_of(index)} of "
            f"{self.root_dir} (the last: {last}); check the copy of this set"
        )

    def _read_one(self, index: int, out: np.ndarray) -> int:
        encoded, label = self.stored(index)
        decode_into(encoded, out)
        return self.class_of(index, label)

    def class_of(self, index: int, label: float) -> int:
        """The class of a record with ``label``; raises InputError if it is none of this set."""
        first, count = self.class_range(index)
        # a NaN is none either
        if not 0 <= label < count or label != int(label):
            raise wrong_label(self, index, label)
        return first + int(label)

    def labels(self, indices: Sequence[int]) -> np.ndarray:
        """(n,) int64 labels without reading the images; -1 for a record without a readable header.

        Raises InputError for a label out of range.
        """
        classes = np.full(len(indices), -1, np.int64)
        for row, index in enumerate(indices):
            label = self.label_of(index)
            if label is not None:
                classes[row] = self.class_of(index, label)
        return classes

    def class_range(self, index: int) -> tuple[int, int]:
        """(the class of label 0, number of labels) in the part of the set that holds ``index``."""
        return 0, self.num_classes

    def parts(self) -> list[tuple[slice, int, int]]:
        """(indices, the class of label 0, number of labels) of the parts of the set, in order."""
        return [(slice(0, len(self)), 0, self.num_classes)]

    def name_of(self, index: int) -> int | str:
        """What messages call an image: a record's key, or the path below ``root_dir``."""
        raise NotImplementedError

    def stored(self, index: int) -> tuple[bytes, float]:
        """(the image file as it is stored, the label as it stands there): neither is checked.

        Raises RecordError if the record is damaged.
        """
        raise NotImplementedError

    def label_of(self, index: int) -> float | None:
        """The label alone, unchecked; None if the record has no readable header."""
        raise NotImplementedError

    def identity(self) -> dict:
        """What tells this set from any other (``utils.dataset.identity``)."""
        raise NotImplementedError

    def labels_to_check(self) -> tuple[np.ndarray, bool]:
        """(indices whose labels to look at before a training, whether labels ascend with it)."""
        raise NotImplementedError


def decode_into(encoded: bytes, out: np.ndarray) -> None:
    """Decode a JPEG, PNG, ... into ``out`` (112, 112, 3) uint8 RGB.

    Raises RecordError if it is no image or not of that size.
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


def empty_rows(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Uninitialised images (count, 112, 112, 3) uint8 and labels (count,) int64."""
    return np.empty((count, *IMAGE_SIZE, 3), np.uint8), np.empty(count, np.int64)


def keep_batch(batch):
    """``collate_fn`` for these sets: their batches are made whole in the worker."""
    return batch
