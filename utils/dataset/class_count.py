"""How many classes a record set has: as asked, by its ``property`` files, or by its labels."""

import logging
import os

import numpy as np

from utils.errors import InputError
from utils.recordio.files import read_property
from utils.recordio.format import EXACT_IN_FLOAT32
from utils.recordio.image_records import ImageRecords
from utils.recordio.record_set import RecordSet
from utils.recordio.writer import write_property

log = logging.getLogger(__name__)


def count_classes(
    records: RecordSet, root_dir: str, asked: int | None, separate: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(the class of label 0, number of labels) of each folder.

    asked: the number of classes of all, None: as many as there are. separate: whether the labels of
    a folder are counted on from the classes of those before.
    """
    folders = range(len(records.folders))
    if len(folders) == 1:
        return np.array([0]), np.array([count_in_folder(records, 0, root_dir, asked)])
    counts = np.array([count_in_folder(records, folder, root_dir, None) for folder in folders])
    stored = int(counts.sum() if separate else counts.max())
    if asked is not None and stored > asked:
        raise InputError(f"num_classes={asked} is smaller than the {stored} classes of {root_dir}")
    if asked is not None and stored != asked:
        log.warning("%s have %d classes, num_classes=%d is used", root_dir, stored, asked)
    if separate:
        return np.cumsum(counts) - counts, counts
    return np.zeros_like(counts), np.full_like(counts, asked or stored)


def count_in_folder(records: RecordSet, folder: int, root_dir: str, asked: int | None) -> int:
    """Number of classes of a folder: as asked, else from ``property``, else from the labels."""
    path = os.path.join(records.folders[folder].path, "property")
    stored = read_property(path) if os.path.isfile(path) else None
    if asked is None:
        return rebuild_property(path, records.in_folder(folder)) if stored is None else stored
    if stored is not None and stored > asked:
        raise InputError(
            f"num_classes={asked} is smaller than the {stored} classes of {root_dir}; "
            "num_classes=0 takes as many as the set has"
        )
    if stored is not None and stored != asked:
        log.warning("%s says %d classes, num_classes=%d is used", path, stored, asked)
    return asked


def rebuild_property(path: str, files: list[ImageRecords]) -> int:
    """Count the classes in the image headers; keep the result for the next run where allowed.

    That of a single class is not kept: it says nothing, and whoever trains on it is refused.
    """
    folder = os.path.dirname(path)
    count = sum(file.count for file in files)
    log.warning("%s is missing: counting the classes in the headers of %d records", path, count)
    smallest, largest = EXACT_IN_FLOAT32, -1
    for file in files:
        for at in range(file.count):
            label = file.label(at)
            # damaged records, labels beyond what float32 counts and NaN are reported later
            if label is not None and label < EXACT_IN_FLOAT32:
                smallest, largest = min(smallest, label), max(largest, label)
    num_classes = 1 + int(largest)
    if smallest < largest and os.access(folder, os.W_OK):
        write_property(folder, num_classes)
        log.warning("rebuilt %s: %d classes", path, num_classes)
    else:
        log.warning("%d classes in %s", num_classes, folder)
    return num_classes
