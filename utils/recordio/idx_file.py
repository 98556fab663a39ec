"""The text of an ``.idx``: a line ``key<tab>offset`` for every record."""

import os
import warnings
from collections.abc import Iterable, Iterator

import numpy as np

from utils.errors import InputError
from utils.files import replacing
from utils.memory import mapped_zeros

# bytes of .idx that are parsed at a time
TEXT_AT_ONCE = 1 << 20


def rebuild_hint(idx_path: str) -> str:
    """How to mend an ``.idx``."""
    return f"delete {os.path.basename(idx_path)} to have it rebuilt from the .rec"


def read_index(idx_path: str) -> tuple[np.ndarray, np.ndarray]:
    """(keys, offsets) of an ``.idx`` file, two int64 arrays in file order.

    Raises InputError if a line is not ``key<tab>offset``.
    """
    # the shortest line is 0<tab>0; pages that are not written to take no memory
    most = os.path.getsize(idx_path) // 4 + 1
    keys, offsets, count = mapped_zeros(most), mapped_zeros(most), 0
    for pairs in parsed(idx_path):
        if len(pairs) and pairs.min() < 0:
            raise InputError(f"{idx_path} names a negative key or offset; {rebuild_hint(idx_path)}")
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
    if not text.strip():
        return np.empty((0, 2), np.int64)
    try:
        with warnings.catch_warnings():
            # how NumPy reports text that is no number
            warnings.simplefilter("error", DeprecationWarning)
            return np.fromstring(text, dtype=np.int64, sep=" ").reshape(-1, 2)
    except (ValueError, DeprecationWarning):
        raise InputError(
            f"{idx_path} is no RecordIO index (lines of key<tab>offset); {rebuild_hint(idx_path)}"
        ) from None


def first_beyond(idx_path: str, size: int) -> tuple[int, int]:
    """(key, offset) of the first line whose offset is ``size`` or more, as it stands there.

    Arrays hold no number above int64: NumPy reads larger ones as the largest.
    """
    with open(idx_path) as file:
        numbers = (int(number) for line in file for number in line.split())
        pairs = zip(numbers, numbers, strict=False)
        return next((key, offset) for key, offset in pairs if offset >= size)


def write_index(idx_path: str, keys: Iterable[int], offsets: Iterable[int]) -> None:
    """Write an ``.idx``."""
    with replacing(idx_path, "w") as file:
        file.writelines(f"{key}\t{offset}\n" for key, offset in zip(keys, offsets, strict=True))
