"""RecordIO files as MXNet 1.9.1 writes them: the record, the index and the image header. Needs
NumPy only.

A record is ``uint32 magic, uint32 (3-bit cflag << 29 | 29-bit length), payload padded to 4 bytes``.
A payload that contains the magic on a 4-byte boundary is cut there: cflag 1, 2, 3 mark its first,
middle and last part, 0 a whole one. Source: dmlc-core ``recordio.h`` (the record),
``mxnet/recordio.py`` (the index and IRHeader), InsightFace ``face2rec2.py`` (which keys are
images).
"""

import logging
import numbers
import os
import struct
from array import array
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from utils.errors import InputError
from utils.files import replacing
from utils.record_index import first_beyond, open_index, read_index, rebuild, write_index

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
WHOLE, FIRST, MIDDLE, LAST = range(4)
LENGTH_BITS = 29
LENGTH_MASK = (1 << LENGTH_BITS) - 1
# bytes read together with a record's frame, in the hope that they are all of it
MOST_AT_ONCE = 1 << 16
EXACT_IN_FLOAT32 = 1 << 24  # labels are float32: identity ranges above this would be rounded
# from here on the counter of whoever wrote the index overflowed
NO_OFFSET = 1 << 62

_FRAME = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")

log = logging.getLogger(__name__)


class RecordError(InputError):
    """A record that is truncated or damaged.

    The message names the file, the key and the byte offset.
    """


class IRHeader(NamedTuple):
    """What precedes the image: number of float32 labels (0: the one here), label, the record's key,
    a second id (unused).
    """

    flag: int
    label: float | np.ndarray
    id: int
    id2: int


def pack(header: IRHeader, payload: bytes) -> bytes:
    """Put ``header`` before ``payload``; a scalar label gives flag 0, a vector flag = its length.

    Source: mxnet.recordio.pack.
    """
    flag, label, key, key2 = header
    if isinstance(label, numbers.Number):
        return _HEADER.pack(0, label, key, key2) + payload
    vector = np.asarray(label, dtype="<f4")
    return _HEADER.pack(vector.size, 0.0, key, key2) + vector.tobytes() + payload


def unpack(record: bytes) -> tuple[IRHeader, bytes]:
    """Split a record's payload into (IRHeader, image bytes); ``label`` is a float, or a float32
    vector if flag > 0.

    Accepts any bytes-like object and returns a slice of it. Errors: RecordError if the header does
    not fit. Source: mxnet.recordio.unpack.
    """
    if len(record) < _HEADER.size:
        raise RecordError(
            f"a payload of {len(record)} bytes has no room for the image header of {_HEADER.size}"
        )
    flag, label, key, key2 = _HEADER.unpack_from(record)
    start = _HEADER.size + 4 * flag
    if start > len(record):
        raise RecordError(
            f"the image header promises {flag} labels, the payload has {len(record)} bytes"
        )
    if flag:
        label = np.frombuffer(record, "<f4", flag, _HEADER.size)
    return IRHeader(flag, label, key, key2), record[start:]


def frame(payload: bytes) -> bytes:
    """The bytes that store ``payload`` (under 2**29 bytes): frames, parts and padding.

    Source: dmlc RecordIOWriter.
    """
    if len(payload) > LENGTH_MASK:
        raise ValueError(f"a record holds less than {LENGTH_MASK + 1} bytes, got {len(payload)}")
    parts, start = [], 0
    for cut in _aligned_magics(payload):
        parts.append(
            _FRAME.pack(MAGIC, ((FIRST if start == 0 else MIDDLE) << LENGTH_BITS) | (cut - start))
        )
        parts.append(payload[start:cut])
        start = cut + 4
    cflag = LAST if start else WHOLE
    parts.append(_FRAME.pack(MAGIC, (cflag << LENGTH_BITS) | (len(payload) - start)))
    parts.append(payload[start:])
    parts.append(bytes(-len(payload) % 4))
    return b"".join(parts)


def _aligned_magics(payload: bytes) -> list[int]:
    """Offsets, multiples of 4, at which ``payload`` holds the magic."""
    found, at = [], payload.find(MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0:
            found.append(at)
        at = payload.find(MAGIC_BYTES, at + 1)
    return found


class Glance(NamedTuple):
    """The start of a record.

    end: where the next one begins. id: of its header, -1: there is none. label: the first one.
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
        """Read the bytes ``start`` ... ``end - 1`` from the disk into the page cache, ``at_once``
        at a time, one after another; their values go nowhere.
        """
        buffer = bytearray(min(at_once, max(end - start, 1)))
        # of its own: the kernel judges by the reads of one opening whether they are sequential
        with open(self.path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_SEQUENTIAL)
            while start < end and (
                got := os.preadv(file.fileno(), [memoryview(buffer)[: end - start]], start)
            ):
                start += got

    def read(self, offset: int, name: str | int) -> bytes | memoryview:
        """The payload of the record at ``offset``; RecordError, saying ``name`` (a number: of a
        key) and the offset, if it is damaged.
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
        window = self.pread(_FRAME.size + self._usual, offset)
        cflag, length = self._frame(window, offset, name)
        payload = memoryview(window)[_FRAME.size : _FRAME.size + length]
        if len(payload) < length:
            payload = self.pread(length, offset + _FRAME.size)
        # records of a file are alike: one call reads most of them whole; what a large one asked for
        # is forgotten step by step
        self._usual = min(max(length, self._usual - (self._usual >> 4)), MOST_AT_ONCE)
        if len(payload) < length:
            raise self._damaged(
                name, offset, f"truncated, {len(payload)} of {length} bytes are there"
            )
        return cflag, payload, _after(offset, length)

    def _frame(self, start: bytes, offset: int, name: str | int) -> tuple[int, int]:
        """(cflag, length) from the bytes at ``offset``."""
        if len(start) < _FRAME.size:
            raise self._damaged(name, offset, "truncated, the file ends before it")
        magic, word = _FRAME.unpack_from(start)
        if magic != MAGIC:
            raise self._damaged(
                name, offset, f"no record starts there (0x{magic:08x} instead of the magic)"
            )
        return word >> LENGTH_BITS, word & LENGTH_MASK

    def _damaged(self, name: str | int, offset: int, reason: str) -> RecordError:
        return RecordError(
            f"{self.path}: {name if isinstance(name, str) else f'key {name}'} at "
            f"offset {offset}: {reason}"
        )

    def glance(self, offset: int, name: str | int) -> Glance:
        """What the first bytes of the record at ``offset`` tell, without reading the image;
        RecordError as ``read``.
        """
        wanted = _HEADER.size + 4
        window = self.pread(_FRAME.size + wanted, offset)
        cflag, length = self._frame(window, offset, name)
        if cflag == WHOLE:
            start, end = window[_FRAME.size : _FRAME.size + length], _after(offset, length)
        else:
            start, end = self.read(offset, name), self._end_of_split(offset, name)
            length = len(start)
        if length < _HEADER.size or len(start) < min(wanted, length):
            return Glance(end, -1, float("nan"), False)
        flag, label, key, _ = _HEADER.unpack_from(start)
        labels_end = _HEADER.size + 4 * flag
        if 0 < flag and labels_end <= length:
            label = struct.unpack_from("<f", start, _HEADER.size)[0]
        # a flag of more labels than there are is damage, and says nothing about the record's kind
        return Glance(end, key, label, length > labels_end, flag if labels_end <= length else 0)

    def _end_of_split(self, offset: int, name: str | int) -> int:
        """The offset after the last part of the split record at ``offset``."""
        cflag = FIRST
        while cflag != LAST:
            cflag, length = self._frame(self.pread(_FRAME.size, offset), offset, name)
            offset = _after(offset, length)
        return offset

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _after(offset: int, length: int) -> int:
    """The offset after a part of ``length`` bytes and its padding."""
    return offset + _FRAME.size + (length + 3) // 4 * 4


def scan_index(records: RecordFile) -> tuple[np.ndarray, np.ndarray]:
    """(keys, offsets), int64, of the records of a ``.rec`` in file order: what its lost ``.idx``
    held.

    The key of a record is the ``id`` in its image header, where MXNet's im2rec, InsightFace's
    face2rec2 and this project put it. Where ids are absent or repeat (a converter that left them 0,
    two files joined), ``number_anew`` gives others. Raises RecordError at the first record that is
    truncated or damaged.
    """
    size = os.path.getsize(records.path)
    offsets, ids, index_records, offset, glance = array("q"), array("q"), array("b"), 0, None
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
    keys, images = np.arange(len(offsets), dtype=np.int64), int((~index_records).sum())
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


class IndexedRecordIO:
    """Records by integer key, as ``mxnet.recordio.MXIndexedRecordIO``: ``read_idx``, ``write_idx``,
    ``keys``, ``close``.

    ``"r"``: a missing ``.idx`` is rebuilt by scanning (``scan_index``), logged, and saved if the
    folder is writable. A reader may be shared by threads and forked or spawned workers; a large
    index is in a machine's memory once (``utils.record_index``). Besides by key, records are read
    by position, 0 ... len - 1 in ascending order of their keys. ``"w"``: both files get their names
    on ``close``; a writer that dies, or whose ``with`` block raises, leaves neither. Raises
    InputError for a missing ``.rec``, and for an ``.idx`` that is unreadable, contradicts itself (a
    key with two offsets, an offset of two keys) or leads beyond the ``.rec``; RecordError for a
    damaged record; KeyError for an unknown key.
    """

    def __init__(self, idx_path: str, rec_path: str, flag: str):
        self.idx_path = os.fspath(idx_path)
        self.rec_path = os.fspath(rec_path)
        self.writable = flag == "w"
        if flag == "r":
            self._open_reader()
            self._report_index()
        elif flag == "w":
            self._open_writer()
        else:
            raise ValueError(f'flag is "r" or "w", got {flag!r}')

    def _open_reader(self) -> None:
        if not os.path.isfile(self.rec_path):
            raise InputError(
                f"no record file {os.path.abspath(self.rec_path)}; check the path or "
                "make one with data/make_rec.py"
            )
        self.records = RecordFile(self.rec_path)
        self.index = open_index(
            self.idx_path, self.rec_path, self._rebuild_index, self._refuse_foreign_offsets
        )

    def _refuse_foreign_offsets(self, keys: np.ndarray, offsets: np.ndarray) -> None:
        """Raises InputError if offsets lie beyond the file, unless that is cut off."""
        size = os.path.getsize(self.rec_path)
        beyond = offsets >= size
        count = int(beyond.sum())
        if count == 0 or offsets.max() < NO_OFFSET and self._is_cut_off(keys, offsets, size):
            return
        key, offset = first_beyond(self.idx_path, size)
        more = f", as do {count - 1} more" if count > 1 else ""
        raise InputError(
            f"{self.idx_path}: offset {offset} of key {key} lies beyond the {size} bytes of "
            f"{self.rec_path}{more}; {rebuild(self.idx_path)}, or copy both again if they should "
            "fit"
        )

    def _is_cut_off(self, keys: np.ndarray, offsets: np.ndarray, size: int) -> bool:
        """Whether the file ends inside the last record that begins in it."""
        inside = np.flatnonzero(offsets < size)
        if len(inside) == 0:
            return size == 0
        last = inside[offsets[inside].argmax()]
        offset = int(offsets[last])
        try:
            return self.records.glance(offset, keys[last]).end > size
        except RecordError:
            return self.records.pread(4, offset) == MAGIC_BYTES[: size - offset]

    def _report_index(self) -> None:
        """Log what is strange about the index, and can be lived with."""
        if self.index.repeated:
            log.warning(
                "%s: %d lines say again what another one says; every record counts once",
                self.idx_path,
                self.index.repeated,
            )
        beyond = int((self.index.offsets >= os.path.getsize(self.rec_path)).sum())
        if beyond:
            log.warning(
                "%s is cut off: it ends inside a record, and %d more that %s names are not there; "
                "copy it again",
                self.rec_path,
                beyond,
                self.idx_path,
            )

    def __getstate__(self) -> dict:
        """A shared index is not sent along to a spawned process: that maps it itself."""
        return (
            dict(self.__dict__, index=None)
            if not self.writable and self.index.mapped
            else self.__dict__
        )

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if not self.writable and self.index is None:
            self._open_reader()

    def _rebuild_index(self) -> tuple[np.ndarray, np.ndarray]:
        """Scan the ``.rec``; keep the result beside it for the next run where that is allowed."""
        log.warning("%s is missing: rebuilding it by scanning %s", self.idx_path, self.rec_path)
        keys, offsets = scan_index(self.records)
        if os.access(os.path.dirname(os.path.abspath(self.idx_path)), os.W_OK):
            write_index(self.idx_path, keys, offsets)
        log.warning("rebuilt the index of %s: %d records", self.rec_path, len(keys))
        return keys, offsets

    @property
    def keys(self) -> list[int]:
        """All keys in the order of the index file, read anew into a list as in MXNet; for millions
        of records see ``key_array``.
        """
        if self.writable:
            return self._keys.tolist()
        if os.path.isfile(self.idx_path):
            keys = read_index(self.idx_path)[0].tolist()
            return list(dict.fromkeys(keys)) if self.index.repeated else keys
        # a scan finds them in this order
        return self.index.keys[np.argsort(self.index.offsets, kind="stable")].tolist()

    @property
    def key_array(self) -> np.ndarray:
        """All keys, ascending; readers only."""
        return self.index.keys

    def position(self, key: int) -> int:
        """Where ``key`` stands among all keys in ascending order."""
        keys = self.index.keys
        if 0 <= key <= np.iinfo(keys.dtype).max:
            # of the array's own type: with another one, NumPy converts the whole array
            at = int(np.searchsorted(keys, keys.dtype.type(key)))
            if at < len(keys) and keys[at] == key:
                return at
        raise KeyError(f"{self.rec_path} has no record with key {key}")

    def offset(self, key: int) -> int:
        """Byte offset of the record ``key``."""
        return int(self.index.offsets[self.position(key)])

    def read_idx(self, key: int) -> bytes:
        """The payload of the record ``key`` (for images: to be split by ``unpack``)."""
        return bytes(self.records.read(self.offset(key), key))

    def read_at(self, position: int) -> bytes | memoryview:
        """The payload of the record at ``position``."""
        return self.records.read(int(self.index.offsets[position]), self.index.keys[position])

    def glance(self, key: int) -> Glance:
        """The start of the record ``key``, without reading the image."""
        return self.glance_at(self.position(key))

    def glance_at(self, position: int) -> Glance:
        """The start of the record at ``position``, without reading the image."""
        return self.records.glance(int(self.index.offsets[position]), self.index.keys[position])

    def _open_writer(self) -> None:
        # 16 bytes a record where lists would take 72
        self._keys = array("q")
        self._offsets = array("q")
        self._position = 0
        self._temporary = f"{self.rec_path}.tmp-{os.getpid()}"
        self._file = open(self._temporary, "wb")

    def write_idx(self, key: int, payload: bytes) -> None:
        """Append ``payload`` under ``key``."""
        framed = frame(payload)
        self._file.write(framed)
        self._keys.append(int(key))
        self._offsets.append(self._position)
        self._position += len(framed)

    def close(self) -> None:
        """Release the file; a writer gives its two files their names.

        A second call does nothing.
        """
        if not self.writable:
            self.records.close()
        elif not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            # a crash between the two renames leaves a .rec without .idx, which readers mend; never
            # one with a stale .idx
            if os.path.exists(self.idx_path):
                os.unlink(self.idx_path)
            os.replace(self._temporary, self.rec_path)
            write_index(self.idx_path, self._keys, self._offsets)

    def discard(self) -> None:
        """Give up writing: remove what was written and keep the files that had the names before."""
        self._file.close()
        if os.path.exists(self._temporary):
            os.unlink(self._temporary)

    def __enter__(self) -> "IndexedRecordIO":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.writable and kind is not None:
            self.discard()
        else:
            self.close()


def write_property(
    root_dir: str, num_classes: int, image_size: tuple[int, int] = (112, 112)
) -> None:
    """Write ``root_dir/property``: ``classes,height,width``."""
    with replacing(os.path.join(root_dir, "property"), "w") as file:
        file.write(f"{num_classes},{image_size[0]},{image_size[1]}\n")


def write_insightface(
    root_dir: str, groups: Iterable[Iterable[bytes]], image_size: tuple[int, int] = (112, 112)
) -> int:
    """Write a set in InsightFace's layout: ``train.rec``, ``train.idx``, ``property``; returns the
    number of images.

    ``groups``: one iterable of encoded images (JPEG bytes) per identity, consumed as a stream;
    labels are 0, 1, ... in that order. Keys: images 1 ... N; identities N+1 ..., each with label
    [first key, end); record 0, written last, with label [N+1, end of the identities). Errors:
    InputError if the keys outgrow float32. Source: InsightFace face2rec2.py.
    """
    os.makedirs(root_dir, exist_ok=True)
    paths = os.path.join(root_dir, "train.idx"), os.path.join(root_dir, "train.rec")
    key, starts = 1, [1]
    with IndexedRecordIO(*paths, "w") as writer:
        for label, images in enumerate(groups):
            for image in images:
                writer.write_idx(key, pack(IRHeader(0, float(label), key, 0), image))
                key += 1
            starts.append(key)
        end = key + len(starts) - 1
        if end > EXACT_IN_FLOAT32:
            raise InputError(
                f"{root_dir}: InsightFace's layout keeps keys as float32, exact to "
                f"{EXACT_IN_FLOAT32} records, got {end}; "
                f"use the plain layout (data/make_rec.py --layout plain)"
            )
        for identity, span in enumerate(zip(starts, starts[1:], strict=False)):
            writer.write_idx(key + identity, pack(IRHeader(2, span, key + identity, 0), b""))
        writer.write_idx(0, pack(IRHeader(2, (key, end), 0, 0), b""))
    write_property(root_dir, len(starts) - 1, image_size)
    return key - 1
