"""Where the records of a ``.rec`` begin: two arrays, which all processes of a machine share.

An index of millions of records is read from its ``.idx`` once a machine and laid down in a file in
the temporary folder (TMPDIR), which every rank and every reading process then maps: 12 bytes a
record, in memory once. The file tells which ``.idx`` and ``.rec`` it was made from, by path, size,
times and inode; when any of these changes, it is made again. Nothing is written into the data
folder, so that may be read-only. Where the temporary folder cannot be used, each rank has arrays of
its own, and the log says so.
"""

import json
import logging
import mmap
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from utils.errors import InputError
from utils.files import replacing, take_lock
from utils.memory import mapped_zeros
from utils.recordio.idx_file import read_index, rebuild_hint

# of the shared file; 3: arrays as NumPy stores them
FORMAT = 3
# bytes before the arrays: JSON, padded
STAMP_SIZE = 4096
# bytes of .idx from which on it is shared; below, copies cost less than a file
SHARED_FROM = 1 << 20
# the same for a .rec without .idx
SHARED_FROM_RECORDS = 1 << 28
# numbers that are converted at a time, so that no array is held twice
AT_ONCE = 1 << 20

log = logging.getLogger(__name__)


class Index(NamedTuple):
    """Which record lies where; every key and every offset once.

    keys: ascending, uint32 (int64 if one needs more). offsets: int64, in bytes, of these records.
    by_offset: uint32, the positions in the order of the file; None: not known, or the order of the
    keys (the first one may stand elsewhere). mapped: whether the arrays are those of all processes.
    repeated: lines of the ``.idx`` that said again what another one says, and were dropped.
    """

    keys: np.ndarray
    offsets: np.ndarray
    by_offset: np.ndarray | None = None
    mapped: bool = False
    repeated: int = 0


def open_index(
    idx_path: str,
    rec_path: str,
    scan: Callable[[], tuple[np.ndarray, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray], None] = lambda keys, offsets: None,
) -> Index:
    """The index of ``rec_path``: from ``idx_path`` or, if that is missing, from ``scan()``.

    scan: gives (keys, offsets), and may write the ``.idx``. check: looks at those of an ``.idx``
    before they are used. Raises InputError if a line of the ``.idx`` is not ``key<tab>offset``, if
    lines contradict each other (``ascending``, ``order_in_file``), and what ``check`` raises.
    """

    has_idx = os.path.isfile(idx_path)

    def read_or_scan() -> tuple[np.ndarray, np.ndarray]:
        if not has_idx:
            return scan()
        pairs = read_index(idx_path)
        check(*pairs)
        return pairs

    size = os.path.getsize(idx_path if has_idx else rec_path)
    large = size >= (SHARED_FROM if has_idx else SHARED_FROM_RECORDS)
    folder = shared_folder() if large else None
    if folder is None:
        return in_memory(*read_or_scan(), idx_path)
    name = sha256(os.fsencode(os.path.abspath(rec_path))).hexdigest()[:24]
    path = os.path.join(folder, f"{name}.index")
    # the first process makes it, the others of this machine wait
    with take_lock(f"{path}.lock"):
        stamp = made_from(idx_path, rec_path)
        index = load(path, stamp)
        if index is not None:
            return index
        pairs = read_or_scan()
        # a scan may have written it
        stamp["idx"] = stamp["idx"] or marks(idx_path)
        try:
            save(path, stamp, *pairs, idx_path)
        except OSError as error:
            log.warning(
                "%s: %s; every process keeps the index of %s for itself (TMPDIR names another "
                "folder)",
                path,
                error.strerror,
                rec_path,
            )
            return in_memory(*pairs, idx_path)
        return load(path, stamp)


def shared_folder() -> str | None:
    """This user's folder for shared indices, for nobody else to write to.

    None, with a word in the log, if there can be none.
    """
    folder = os.path.join(tempfile.gettempdir(), f"record-index-{os.getuid()}")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        status = os.lstat(folder)
        is_private = status.st_uid == os.getuid() and not status.st_mode & 0o022
        if not is_private or not stat.S_ISDIR(status.st_mode):
            raise PermissionError(0, "it is not this user's alone")
        # whether it can be written to, and locked
        take_lock(os.path.join(folder, "lock")).close()
    except OSError as error:
        log.warning(
            "%s: %s; every process keeps the index of its records for itself (TMPDIR names "
            "another folder)",
            folder,
            error.strerror,
        )
        return None
    return folder


def made_from(idx_path: str, rec_path: str) -> dict:
    """What tells the files of an index from any others."""
    paths = [os.fsencode(os.path.abspath(path)) for path in (rec_path, idx_path)]
    digest = sha256(b"\0".join(paths)).hexdigest()
    return dict(format=FORMAT, paths=digest, rec=marks(rec_path), idx=marks(idx_path))


def marks(path: str) -> list[int] | None:
    """What changes when a file is replaced or written to, even where its size and time are kept
    (rsync -a): the inode and the time of change.
    """
    if not os.path.isfile(path):
        return None
    status = os.stat(path)
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def in_memory(keys: np.ndarray, offsets: np.ndarray, idx_path: str = "the index") -> Index:
    """The index of (keys, offsets), in any order, for this process. Raises as ``open_index``."""
    parts, repeated = ascending(keys, offsets, idx_path)
    order_in_file(parts, idx_path)
    keys, offsets = (joined(arrays) for arrays in zip(*parts, strict=True))
    return Index(keys.astype(key_type(keys)), offsets, repeated=repeated)


def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One array of all; no copy where there is one only."""
    return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]


def key_type(keys: np.ndarray) -> type:
    return np.uint32 if len(keys) == 0 or keys.max() <= np.iinfo(np.uint32).max else np.int64


def ascending(
    keys: np.ndarray, offsets: np.ndarray, idx_path: str
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """(keys, offsets) by key, every key once, and how many repeated lines were dropped for that.

    They come as one part or as two to lay end to end: no copies for files in key order but for a
    last record 0, as InsightFace's are. Raises InputError if a key stands there with two offsets:
    only one of these records could be read by it, and would stand for all.
    """
    if rising(keys):
        return [(keys, offsets)], 0
    if keys[-1] < keys[0] and rising(keys[:-1]):
        return [(keys[-1:], offsets[-1:]), (keys[:-1], offsets[:-1])], 0
    order = order_of(keys)
    keys, offsets = taken(keys, order), taken(offsets, order)
    again = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    if len(again) == 0:
        return [(keys, offsets)], 0
    contradicting = again[offsets[again] != offsets[again - 1]]
    if len(contradicting):
        count = len(np.unique(keys[contradicting]))
        key = keys[contradicting[0]]
        its_offsets = offsets[np.searchsorted(keys, key) : np.searchsorted(keys, key, "right")]
        listed = ", ".join(map(str, its_offsets[:3]))
        if len(its_offsets) > 3:
            listed += ", ..."
        raise InputError(
            f"{idx_path} lists keys several times with different offsets ({count} of them; key "
            f"{key}: {listed}): records would be read twice and others never; "
            f"{rebuild_hint(idx_path)}, which numbers them anew where need be"
        )
    once = np.ones(len(keys), bool)
    once[again] = False
    return [(keys[once], offsets[once])], len(again)


def taken(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    return np.take(values, order, out=mapped_zeros(len(order)), mode="clip")


def order_in_file(parts: list[tuple[np.ndarray, np.ndarray]], idx_path: str) -> np.ndarray | None:
    """The positions in the order of the file; None: that of the keys, but perhaps for the first.

    parts: from ``ascending``. Raises InputError if two keys name one record.
    """
    keys, offsets = zip(*parts, strict=True)
    if len(offsets[0]) == 0:
        return None
    # all but the first record, without a copy
    rest = offsets[-1][2 - len(parts) :]
    if rising(rest):
        order = None
        at = int(np.searchsorted(rest, offsets[0][0]))
        in_rest = at < len(rest) and rest[at] == offsets[0][0]
        same = (0, at + 1) if in_rest else None
    else:
        offsets = joined(offsets)
        order = order_of(offsets)
        same = first_equal(offsets, order)
    if same:
        keys = joined(keys)
        raise InputError(
            f"{idx_path}: the keys {keys[same[0]]} and {keys[same[1]]} have the same offset, "
            f"so that one record would be read as two; {rebuild_hint(idx_path)}"
        )
    return order


def first_equal(values: np.ndarray, order: np.ndarray) -> tuple[int, int] | None:
    """The first two positions with equal values; order: that in which the values ascend."""
    for first in range(0, len(order), AT_ONCE):
        part = values[order[first : first + AT_ONCE + 1]]
        equal = np.flatnonzero(part[1:] == part[:-1])
        if len(equal):
            return order[first + equal[0]], order[first + equal[0] + 1]
    return None


def rising(values: np.ndarray) -> bool:
    return bool((values[1:] > values[:-1]).all())


def order_of(values: np.ndarray) -> np.ndarray:
    """``np.argsort(values, kind="stable")`` of non-negative int64, sorted in place beside the
    positions where both fit into 63 bits: half the memory.
    """
    bits = len(values).bit_length()
    if int(values.max()) >= 1 << 63 - bits:
        return np.argsort(values, kind="stable")
    packed = mapped_zeros(len(values))
    np.left_shift(values, bits, out=packed)
    for first in range(0, len(packed), AT_ONCE):
        part = packed[first : first + AT_ONCE]
        part |= np.arange(first, first + len(part))
    packed.sort()
    packed &= (1 << bits) - 1
    return packed


# --- the shared file: what it was made from, then offsets, keys and positions by offset (none if
# these are in order) as .npy arrays


def save(path: str, stamp: dict, keys: np.ndarray, offsets: np.ndarray, idx_path: str) -> None:
    """Lay down the index of (keys, offsets), in any order. Raises as ``open_index``."""
    parts, repeated = ascending(keys, offsets, idx_path)
    order = order_in_file(parts, idx_path)
    keys, offsets = zip(*parts, strict=True)
    with replacing(path) as file:
        file.write(json.dumps(dict(stamp, repeated=repeated)).encode().ljust(STAMP_SIZE))
        write_array(file, offsets, np.int64)
        write_array(file, keys, key_type(keys[-1]))
        write_array(file, [] if order is None else [order], np.uint32)


def write_array(file, parts: Sequence[np.ndarray], kind: type) -> None:
    """Write the numbers of ``parts`` as one array; each begins where its type may lie in memory."""
    count = sum(map(len, parts))
    header = dict(descr=np.dtype(kind).str, fortran_order=False, shape=(count,))
    np.lib.format.write_array_header_1_0(file, header)
    for values in parts:
        for first in range(0, len(values), AT_ONCE):
            file.write(values[first : first + AT_ONCE].astype(kind, copy=False).data)


def load(path: str, stamp: dict) -> Index | None:
    """Map the index in ``path``; None if there is none, or it was made from other files than
    ``stamp`` says.
    """
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(STAMP_SIZE))
            if not isinstance(header, dict) or not stamp.items() <= header.items():
                return None
            content = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            offsets, keys, by_offset = (map_array(file, content) for _ in range(3))
            if file.tell() != len(content):
                return None
    except (FileNotFoundError, ValueError):
        # damaged or cut off
        return None
    order = by_offset if len(by_offset) else None
    return Index(keys, offsets, order, mapped=True, repeated=header["repeated"])


def map_array(file, content: mmap.mmap) -> np.ndarray:
    """The array that begins where ``file`` stands, which goes to its end; ValueError if cut off."""
    np.lib.format.read_magic(file)
    (count,), _, kind = np.lib.format.read_array_header_1_0(file)
    start = file.tell()
    file.seek(count * kind.itemsize, os.SEEK_CUR)
    return np.frombuffer(content, kind, count, start)
