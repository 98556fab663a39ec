"""Training images: RecordIO files (InsightFace or im2rec) or a folder of identities, decoded in
batches by the DataLoader's workers.

Torch is imported only where a batch is made, so that the MXNet backend runs in MXNet's own
environment, which has no torch.
"""

import hashlib
import os
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from utils.dataset.base import (
    OFFSETS_LOOKED_AT,
    RECORDS_LOOKED_AT,
    FaceImages,
    first_label,
    log,
    sampled,
)
from utils.dataset.classes import ASCENDING_LOOKED_AT, LABELS_LOOKED_AT
from utils.errors import InputError
from utils.recordio.files import IMAGE_SIZE, Shard, check_labels, find_folders, read_property
from utils.recordio.format import EXACT_IN_FLOAT32, RecordError
from utils.recordio.writer import write_property


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
        file = shard.path if len(self._folders) > 1 else os.path.basename(shard.path)
        return f"{file}:{shard.key(at)}"

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
        return [(slice(first, end), *self._classes(first)) for first, end in pairwise(starts)]

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
