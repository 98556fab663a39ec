"""Memory that goes back to the system.

The heap keeps what it once had, for the networks' sake (launch/environment.sh says why).
"""

import mmap

import numpy as np


def mapped_zeros(count: int, kind: type = np.int64) -> np.ndarray:
    """(count,) zeros whose memory is returned to the system when they are dropped, and which take
    none where nothing is written.
    """
    size = count * np.dtype(kind).itemsize
    return np.frombuffer(
        mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), kind, count
    )


def mapped_range(count: int, kind: type = np.int64) -> np.ndarray:
    """0, 1, ... count - 1 in such memory."""
    values = mapped_zeros(count, kind)
    for first in range(0, count, 1 << 20):
        values[first : first + (1 << 20)] = np.arange(first, min(first + (1 << 20), count))
    return values
