"""Records by their offsets in a ``.rec`` file, and the search for where they begin."""

import logging
import os
import struct
from array import array
from typing import NamedTuple

import numpy as np

from utils.errors import RecordError
from utils.recordio.format import (
    FIRST,
    FRAME,
    HEADER,
    LAST,
    LENGTH_BITS,
    LENGTH_MASK,
    MAGIC,
    MAGIC_BYTES,
    MIDDLE,
    WHOLE,
)

# bytes read together with a record's frame, in the hope that they are all of it
MOST_AT_ONCE = 1 << 16

# from here on the counter of whoever wrote the index overflowed
NO_OFFSET = 1 << 62

log = logging.getLogger(__name__)


class Glance(NamedTuple):
    """The start of a record.

    end: where the next one begins. id: of its header; -1: there is none. label: the first one.
    has_image: whether bytes follow the labels. flag: number of labels behind the header.
    """

    end: int
    id: int
    label: float
    has_image: bool
    flag: int = 0

    @property
    def holds_keys(self) -> bool:
        """Whether this is one of InsightFace's index records: labels (keys), and no image."""
        return self.flag > 0 and not self.has_image


class RecordFile:
    """Random reads from a ``.rec`` by byte offset.

    Safe in threads, after fork and in pickles: every read names its position.
    """

    def __init__(self, path: str):
        self.path = path
        self._file = None
        self._usual = 0

    def __getstate__(self) -> dict:
        return {"path": self.path, "_file": None, "_usual": 0}

    def pread(self, size: int, offset: int) -> bytes:
        """Up to ``size`` bytes at ``offset``; fewer at the end of the file."""
        if self._file is None:
            self._file = open(self.path, "rb", buffering=0)
        return os.pread(self._file.fileno(), size, offset)

    def read_through(self, start: int, end: int, at_once: int) -> None:
        """Read the bytes ``start`` ... ``end - 1`` from the disk into the page cache.

        ``at_once`` at a time, one after another; their values go nowhere.
        """
        buffer = bytearray(min(at_once, max(end - start, 1)))
        # of its own: the kernel judges by the reads of one opening whether they are sequential
        with open(self.path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_SEQUENTIAL)
            while start < end:
                count = os.preadv(file.fileno(), [memoryview(buffer)[: end - start]], start)
                if count == 0:
                    return
                start += count

    def read(self, offset: int, name: str | int) -> bytes | memoryview:
        """The payload of the record at ``offset``.

        Raises RecordError, saying ``name`` (a number: of a key) and the offset, if it is damaged.
        """
        cflag, payload, end = self._part(offset, name)
        if cflag == WHOLE:
            return payload
        if cflag != FIRST:
            raise self._damaged(name, offset, f"it begins with part {cflag} of a split payload")
        parts = [payload]
        while cflag != LAST:
            cflag, payload, end = self._part(end, name)
            if cflag not in (MIDDLE, LAST):
                raise self._damaged(name, offset, "its last part is missing")
            parts.append(payload)
        return MAGIC_BYTES.join(parts)

    def _part(self, offset: int, name: str | int) -> tuple[int, bytes | memoryview, int]:
        """(cflag, bytes, offset after the padding) of the part at ``offset``."""
        window = self.pread(FRAME.size + self._usual, offset)
        cflag, length = self._frame(window, offset, name)
        payload = memoryview(window)[FRAME.size : FRAME.size + length]
        if len(payload) < length:
            payload = self.pread(length, offset + FRAME.size)
        # records of a file are alike: one call reads most of them whole; what a large one asked for
        # is forgotten step by step
        self._usual = min(max(length, self._usual - (self._usual >> 4)), MOST_AT_ONCE)
        if len(payload) < length:
            raise self._damaged(
                name, offset, f"truncated, {len(payload)} of {length} bytes are there"
            )
        return cflag, payload, end_of_part(offset, length)

    def _frame(self, start: bytes, offset: int, name: str | int) -> tuple[int, int]:
        """(cflag, length) from the bytes at ``offset``."""
        if len(start) < FRAME.size:
            raise self._damaged(name, offset, "truncated, the file ends before it")
        magic, word = FRAME.unpack_from(start)
        if magic != MAGIC:
            raise self._damaged(
                name, offset, f"no record starts there (0x{magic:08x} instead of the magic)"
            )
        return word >> LENGTH_BITS, word & LENGTH_MASK

    def _damaged(self, name: str | int, offset: int, reason: str) -> RecordError:
        record = name if isinstance(name, str) else f"key {name}"
        return RecordError(f"{self.path}: {record} at offset {offset}: {reason}")

    def glance(self, offset: int, name: str | int) -> Glance:
        """What the first bytes of the record at ``offset`` tell, without reading the image.

        Raises RecordError as ``read``.
        """
        # the header and one label
        most = HEADER.size + 4
        window = self.pread(FRAME.size + most, offset)
        cflag, length = self._frame(window, offset, name)
        if cflag == WHOLE:
            start = window[FRAME.size : FRAME.size + length]
            end = end_of_part(offset, length)
        else:
            start = self.read(offset, name)
            end = self._end_of_split(offset, name)
            length = len(start)
        if length < HEADER.size or len(start) < min(most, length):
            return Glance(end, -1, float("nan"), False)
        flag, label, key, _ = HEADER.unpack_from(start)
        labels_end = HEADER.size + 4 * flag
        if labels_end > length:
            # more labels than there are: damage, which says nothing about the record's kind
            return Glance(end, key, label, False)
        if flag:
            label = struct.unpack_from("<f", start, HEADER.size)[0]
        return Glance(end, key, label, length > labels_end, flag)

    def _end_of_split(self, offset: int, name: str | int) -> int:
        """The offset after the last part of the split record at ``offset``."""
        cflag = FIRST
        while cflag != LAST:
            cflag, length = self._frame(self.pread(FRAME.size, offset), offset, name)
            offset = end_of_part(offset, length)
        return offset

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def end_of_part(offset: int, length: int) -> int:
    """The offset after a part of ``length`` bytes and its padding."""
    return offset + FRAME.size + (length + 3) // 4 * 4


def scan_index(records: RecordFile) -> tuple[np.ndarray, np.ndarray]:
    """(keys, offsets), int64, of the records of a ``.rec`` in file order, as its ``.idx`` held.

    The key of a record is the ``id`` in its image header, where MXNet's im2rec, InsightFace's
    face2rec2 and this project put it. Where ids are absent or repeat (a converter that left them 0,
    two files joined), ``number_anew`` gives others. Raises RecordError at the first record that is
    truncated or damaged.
    """
    size = os.path.getsize(records.path)
    offsets, ids, index_records = array("q"), array("q"), array("b")
    offset, glance = 0, None
    while offset < size:
        glance = records.glance(offset, f"record {len(offsets)}")
        if glance.end > size:
            raise RecordError(
                f"{records.path}: record {len(offsets)} at offset {offset}: truncated, the file "
                "ends inside it"
            )
        offsets.append(offset)
        # beyond int64: noise, not a key
        ids.append(glance.id if glance.id < 1 << 62 else -1)
        index_records.append(glance.holds_keys)
        offset = glance.end
    offsets, ids = np.array(offsets, dtype=np.int64), np.array(ids, dtype=np.int64)
    if len(np.unique(ids)) == len(ids) and (ids >= 0).all():
        return ids, offsets
    log.warning("%s: records do not tell their keys: they are numbered as they come", records.path)
    return number_anew(records.path, offsets, np.array(index_records, dtype=bool), glance.label)


def number_anew(
    path: str, offsets: np.ndarray, index_records: np.ndarray, last_label: float
) -> tuple[np.ndarray, np.ndarray]:
    """(keys, offsets) of records that are numbered as they lie in the file.

    index_records: (N,) bool, which hold labels and no image. last_label: the first of the last one.
    From 1, with key 0 for the last, if that is InsightFace's record 0 (written last) and names the
    number of images before it; else from 0, and index records, whose keys mean nothing any more,
    are left out.
    """
    keys = np.arange(len(offsets), dtype=np.int64)
    images = int((~index_records).sum())
    in_order = images < len(offsets) and index_records[images:].all()
    if in_order and last_label == images + 1:
        return np.roll(keys, -1), offsets
    if images < len(offsets):
        log.warning(
            "%s: %d records hold ranges of keys and no image (InsightFace's index of identities), "
            "but not in its order: they are left out",
            path,
            len(offsets) - images,
        )
    return keys[:images], offsets[~index_records]
