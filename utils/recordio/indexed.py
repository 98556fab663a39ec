"""RecordIO files by key, as MXNet 1.9.1 reads and writes them.

Needs NumPy only. Source: ``mxnet/recordio.py``; InsightFace ``face2rec2.py`` (which keys are
images).
"""

import os
from array import array

import numpy as np

from utils.errors import InputError, RecordError
from utils.recordio.format import MAGIC_BYTES, frame
from utils.recordio.idx_file import first_beyond, read_index, rebuild_hint, write_index
from utils.recordio.index import open_index
from utils.recordio.reader import NO_OFFSET, Glance, RecordFile, log, scan_index


class IndexedRecordIO:
    """Records by integer key, as ``mxnet.recordio.MXIndexedRecordIO``: ``read_idx``, ``write_idx``,
    ``keys``, ``close``.

    ``"r"``: a missing ``.idx`` is rebuilt by scanning (``scan_index``), logged, and saved if the
    folder is writable. A reader may be shared by threads and forked or spawned workers; a large
    index is in a machine's memory once (``utils.recordio.index``). Besides by key, records are read
    by position, 0 ... len - 1 in ascending order of their keys.

    ``"w"``: both files get their names on ``close``; a writer that dies, or whose ``with`` block
    raises, leaves neither.

    Raises InputError for a missing ``.rec``, and for an ``.idx`` that is unreadable, contradicts
    itself (a key with two offsets, an offset of two keys) or leads beyond the ``.rec``; RecordError
    for a damaged record; KeyError for an unknown key.
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
            f"{self.rec_path}{more}; {rebuild_hint(self.idx_path)}, or copy both again if they "
            "should fit"
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
        if self.writable or not self.index.mapped:
            return self.__dict__
        return dict(self.__dict__, index=None)

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
