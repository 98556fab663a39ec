"""Arrays whose memory goes back to the system when they are dropped.

The heap keeps what it once had, for the networks' sake (launch/environment.sh says why).
"""

import mmap

import numpy as np

BLOCK = 1 << 20


def mapped_zeros(count: int, kind: type = np.int64) -> np.ndarray:
    """(count,) zeros, which take no memory where nothing is written."""
    size = max(count * np.dtype(kind).itemsize, 1)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, kind, count)


def mapped_range(count: int, kind: type = np.int64) -> np.ndarray:
    """0, 1, ... count - 1."""
    values = mapped_zeros(count, kind)
    # in blocks: no second array of this size
    for first in range(0, count, BLOCK):
        values[first : first + BLOCK] = np.arange(first, min(first + BLOCK, count))
    return values
