"""Where the records of a ``.rec`` begin: two integer arrays, which all processes of a machine
share.

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
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from utils.errors import InputError
from utils.files import replacing, take_lock
from utils.memory import mapped_zeros

# 2: a repeated line is dropped, a repeated key refused
FORMAT = 2
HEADER = 4096  # bytes before the arrays: JSON, padded
# bytes of .idx from which on it is shared; below, copies cost less than a file
SHARED_FROM = 1 << 20
SHARED_FROM_RECORDS = 1 << 28  # the same for a .rec without .idx
TEXT_AT_ONCE = 1 << 20  # bytes of .idx that are parsed at a time

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


def rebuild(idx_path: str) -> str:
    """How to mend an ``.idx``."""
    return f"delete {os.path.basename(idx_path)} to have it rebuilt from the .rec"


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

    def find() -> tuple[np.ndarray, np.ndarray]:
        if not os.path.isfile(idx_path):
            return scan()
        pairs = read_index(idx_path)
        check(*pairs)
        return pairs

    there = os.path.isfile(idx_path)
    size = os.path.getsize(idx_path if there else rec_path)
    large = size >= (SHARED_FROM if there else SHARED_FROM_RECORDS)
    folder = shared_folder() if large else None
    if folder is None:
        return in_memory(*find(), idx_path)
    name = sha256(os.fsencode(os.path.abspath(rec_path))).hexdigest()[:24]
    path = os.path.join(folder, f"{name}.index")
    # the first process makes it, the others of this machine wait
    with take_lock(f"{path}.lock"):
        stamp = origin(idx_path, rec_path)
        index = load(path, stamp)
        if index is None:
            pairs = find()
            # a scan may have written it
            stamp["idx"] = stamp["idx"] or marks(idx_path)
            try:
                save(path, stamp, *pairs, idx_path)
            except OSError as error:
                log.warning(
                    "%s: %s; every process keeps the index of %s for itself (TMPDIR names "
                    "another folder)",
                    path,
                    error.strerror,
                    rec_path,
                )
                return in_memory(*pairs, idx_path)
            index = load(path, stamp)
    return index


def shared_folder() -> str | None:
    """This user's folder for shared indices, for nobody else to write to; None, with a word in the
    log, if there can be none.
    """
    folder = os.path.join(tempfile.gettempdir(), f"record-index-{os.getuid()}")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        status = os.lstat(folder)
        if (
            status.st_uid != os.getuid()
            or status.st_mode & 0o022
            or not os.path.isdir(folder)
            or os.path.islink(folder)
        ):
            raise PermissionError(0, "it is not this user's alone")
        take_lock(os.path.join(folder, "lock")).close()  # can it be written to, and locked?
    except OSError as error:
        log.warning(
            "%s: %s; every process keeps the index of its records for itself (TMPDIR names "
            "another folder)",
            folder,
            error.strerror,
        )
        return None
    return folder


def origin(idx_path: str, rec_path: str) -> dict:
    """What an index was made from."""
    paths = sha256(
        b"\0".join(os.fsencode(os.path.abspath(path)) for path in (rec_path, idx_path))
    ).hexdigest()
    return dict(format=FORMAT, paths=paths, rec=marks(rec_path), idx=marks(idx_path))


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
    keys, offsets = (
        np.take(values, order, out=mapped_zeros(len(order)), mode="clip")
        for values in (keys, offsets)
    )
    again = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    if len(again) == 0:
        return [(keys, offsets)], 0
    contradicting = again[offsets[again] != offsets[again - 1]]
    if len(contradicting):
        count, key = len(np.unique(keys[contradicting])), keys[contradicting[0]]
        its_offsets = offsets[np.searchsorted(keys, key) : np.searchsorted(keys, key, "right")]
        listed = ", ".join(map(str, its_offsets[:3])) + (", ..." if len(its_offsets) > 3 else "")
        raise InputError(
            f"{idx_path} lists keys several times with different offsets ({count} of them; key "
            f"{key}: {listed}): records would be read twice and others never; {rebuild(idx_path)}, "
            "which numbers them anew where need be"
        )
    once = np.ones(len(keys), bool)
    once[again] = False
    return [(keys[once], offsets[once])], len(again)


def order_in_file(parts: list[tuple[np.ndarray, np.ndarray]], idx_path: str) -> np.ndarray | None:
    """The positions in the order of the file; None: that of the keys, but perhaps for the first.

    parts: from ``ascending``. Raises InputError if two keys name one record.
    """
    keys, offsets = zip(*parts, strict=True)
    if len(offsets[0]) == 0:
        return None
    # all but the first record, without a copy
    rest = offsets[-1][2 - len(parts) :]
    order, shared = None, None
    if rising(rest):
        at = np.searchsorted(rest, offsets[0][0])
        shared = (0, at + 1) if at < len(rest) and rest[at] == offsets[0][0] else None
    else:
        offsets = joined(offsets)
        order = order_of(offsets)
        for first in range(0, len(order), 1 << 20):
            part = offsets[order[first : first + (1 << 20) + 1]]
            same = np.flatnonzero(part[1:] == part[:-1])
            if len(same):
                shared = order[first + same[0]], order[first + same[0] + 1]
                break
    if shared:
        keys = joined(keys)
        raise InputError(
            f"{idx_path}: the keys {keys[shared[0]]} and {keys[shared[1]]} have the same offset, "
            f"so that one record would be read as two; {rebuild(idx_path)}"
        )
    return order


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
    for first in range(0, len(packed), 1 << 20):
        part = packed[first : first + (1 << 20)]
        part |= np.arange(first, first + len(part))
    packed.sort()
    packed &= (1 << bits) - 1
    return packed


# --- the text


def read_index(idx_path: str) -> tuple[np.ndarray, np.ndarray]:
    """(keys, offsets) of an ``.idx`` file, two int64 arrays in file order.

    InputError if a line is not ``key<tab>offset``.
    """
    # the shortest line is 0<tab>0; pages that are not written to take no memory
    most = os.path.getsize(idx_path) // 4 + 1
    keys, offsets, count = mapped_zeros(most), mapped_zeros(most), 0
    for pairs in parsed(idx_path):
        if len(pairs) and pairs.min() < 0:
            raise InputError(f"{idx_path} names a negative key or offset; {rebuild(idx_path)}")
        keys[count : count + len(pairs)], offsets[count : count + len(pairs)] = pairs.T
        count += len(pairs)
    return keys[:count], offsets[:count]


def parsed(idx_path: str) -> Iterator[np.ndarray]:
    """The numbers of an ``.idx`` as (n, 2) int64 arrays, some megabytes of text at a time."""
    with open(idx_path, "rb") as file:
        rest = b""
        while text := file.read(TEXT_AT_ONCE):
            whole, newline, rest = (rest + text).rpartition(b"\n")
            yield parse(whole + newline, idx_path)
        yield parse(rest, idx_path)


def parse(text: bytes, idx_path: str) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            # how NumPy reports text that is no number
            warnings.simplefilter("error", DeprecationWarning)
            numbers = (
                np.fromstring(text, dtype=np.int64, sep=" ")
                if text.strip()
                else np.empty(0, np.int64)
            )
        return numbers.reshape(-1, 2)
    except (ValueError, DeprecationWarning):
        raise InputError(
            f"{idx_path} is no RecordIO index (lines of key<tab>offset); {rebuild(idx_path)}"
        ) from None


def first_beyond(idx_path: str, size: int) -> tuple[int, int]:
    """(key, offset) of the first line whose offset is ``size`` or more, as it stands there.

    Arrays hold no number above int64: NumPy reads larger ones as the largest.
    """
    with open(idx_path) as file:
        words = (int(word) for line in file for word in line.split())
        return next(
            (key, offset) for key, offset in zip(words, words, strict=False) if offset >= size
        )


def write_index(idx_path: str, keys: Iterable[int], offsets: Iterable[int]) -> None:
    """Write an ``.idx``."""
    with replacing(idx_path, "w") as file:
        file.writelines(f"{key}\t{offset}\n" for key, offset in zip(keys, offsets, strict=True))


# --- the shared file: header, offsets, keys, and the positions by offset if these are not in order


def save(path: str, stamp: dict, keys: np.ndarray, offsets: np.ndarray, idx_path: str) -> None:
    """Lay down the index of (keys, offsets), in any order. Raises as ``open_index``."""
    parts, repeated = ascending(keys, offsets, idx_path)
    order = order_in_file(parts, idx_path)
    kind = key_type(parts[-1][0])
    header = dict(
        stamp,
        records=sum(len(keys) for keys, _ in parts),
        key_bytes=np.dtype(kind).itemsize,
        by_offset=order is not None,
        repeated=repeated,
    )
    with replacing(path) as file:
        file.write(json.dumps(header).encode().ljust(HEADER))
        for _, values in parts:
            file.write(values.data)
        for values, _ in parts:
            write_as(kind, values, file)
        if order is not None:
            write_as(np.uint32, order, file)


def write_as(kind: type, values: np.ndarray, file) -> None:
    for first in range(0, len(values), 1 << 20):
        file.write(values[first : first + (1 << 20)].astype(kind).data)


def load(path: str, stamp: dict) -> Index | None:
    """Map the index in ``path``; None if there is none, or it was made from other files than
    ``stamp`` says.
    """
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        try:
            header = json.loads(file.read(HEADER))
        except ValueError:
            return None
        if not isinstance(header, dict) or any(
            header.get(key) != value for key, value in stamp.items()
        ):
            return None
        count, kind = (
            header["records"],
            np.dtype(np.uint32 if header["key_bytes"] == 4 else np.int64),
        )
        size = HEADER + count * (8 + kind.itemsize + (4 if header["by_offset"] else 0))
        if os.fstat(file.fileno()).st_size != size:
            return None
        content = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
    keys_at = HEADER + 8 * count
    by_offset = (
        np.frombuffer(content, np.uint32, count, keys_at + kind.itemsize * count)
        if header["by_offset"]
        else None
    )
    return Index(
        np.frombuffer(content, kind, count, keys_at),
        np.frombuffer(content, np.int64, count, HEADER),
        by_offset,
        mapped=True,
        repeated=header["repeated"],
    )
