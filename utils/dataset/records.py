"""Record files of InsightFace or im2rec as a training set."""

import logging
import os
from collections.abc import Sequence

import numpy as np

from utils.dataset.base import FaceImages, first_label
from utils.dataset.class_count import count_classes
from utils.dataset.identity import records_identity
from utils.errors import RecordError
from utils.recordio.files import find_folders, labels_are_separate
from utils.recordio.image_records import ImageRecords, sampled
from utils.recordio.record_set import RecordSet

# labels of a set that does not ascend by label as InsightFace's does, and of one that does
LABELS_LOOKED_AT = 1 << 19
ASCENDING_LOOKED_AT = 1 << 12

log = logging.getLogger(__name__)


class MXFaceDataset(FaceImages):
    """A set of ``train.rec``, ``train.idx`` and ``property``, in key order; or several such files
    as one set, one after another (``utils.recordio.files``).

    ``ds[i]`` -> (uint8 RGB image (112, 112, 3), int label); ``len(ds)`` images; ``ds.num_classes``
    from ``property`` or the argument. InsightFace's layout (record 0 holds labels and no image):
    images are the keys 1 ... label[0] - 1. Otherwise (im2rec) every record is an image. A vector
    label: the first value counts. A missing ``.idx`` or ``property`` is rebuilt by scanning, and
    logged. Records are named by their key, those of several files by file and key.

    ``root_dir``: a folder, a ``.rec``, or a list of these. ``backend="mxnet"`` reads and unpacks by
    MXNet 1.9.1 instead. ``labels``: what those of several folders mean, "shared" or "separate".
    Raises InputError for a missing or empty set, for labels that are left open and for a label that
    is no class; RecordError (``ds[i]``) for a damaged record.
    """

    def __init__(
        self,
        root_dir: str | Sequence[str],
        backend: str = "native",
        num_classes: int | None = None,
        labels: str = "auto",
    ):
        folders = find_folders(root_dir)
        separate = labels_are_separate(labels, folders)
        self.root_dir = ", ".join(folder.path for folder in folders)
        self.records = RecordSet(folders, backend)
        # the class of label 0 and the number of labels, of each folder
        self.first_class, self.class_counts = count_classes(
            self.records, self.root_dir, num_classes, separate
        )
        self.num_classes = max(int((self.first_class + self.class_counts).max()), num_classes or 0)
        self._check_last_labels()

    def _check_last_labels(self) -> None:
        """Labels ascend in InsightFace's layout: one look finds a property file of another set."""
        for file, span in zip(self.record_files(), self.records.spans(), strict=True):
            if not file.insightface:
                continue
            try:
                self[span.stop - 1]
            except RecordError as error:
                alone = len(self.record_files()) == 1
                name = os.path.dirname(file.path) if alone else file.path
                log.warning("the last image of %s is damaged: %s", name, error)

    def __len__(self) -> int:
        return len(self.records)

    def name_of(self, index: int) -> int | str:
        return self.records.name_of(index)

    def stored(self, index: int) -> tuple[bytes, float]:
        file, at = self.records.locate(index)
        header, encoded = file.read(at)
        return encoded, first_label(header)

    def label_of(self, index: int) -> float | None:
        file, at = self.records.locate(index)
        return file.label(at)

    def class_range(self, index: int) -> tuple[int, int]:
        folder = self.records.folder_of(index)
        return int(self.first_class[folder]), int(self.class_counts[folder])

    def parts(self) -> list[tuple[slice, int, int]]:
        return [(span, *self.class_range(span.start)) for span in self.records.spans()]

    def record_files(self) -> list[ImageRecords]:
        """The record files in the order of their images."""
        return self.records.files

    def identity(self) -> dict:
        return records_identity(self.records)

    def labels_to_check(self) -> tuple[np.ndarray, bool]:
        """In the order of the files: random reads would take long."""
        ascending = all(file.insightface for file in self.record_files())
        most = ASCENDING_LOOKED_AT if ascending else LABELS_LOOKED_AT
        parts = []
        for file, span in zip(self.record_files(), self.records.spans(), strict=True):
            numbers = sampled(file.count, max(most * file.count // len(self), 2))
            order = file.file_order()
            if order is not None:
                numbers = order[numbers].astype(np.int64)
            parts.append(span.start + numbers)
        return np.concatenate(parts), ascending
