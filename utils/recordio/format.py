"""The bytes of a RecordIO file as MXNet 1.9.1 writes them: record frames and image headers."""

import numbers
import struct
from typing import NamedTuple

import numpy as np

from utils.errors import InputError

MAGIC = 0xCED7230A


MAGIC_BYTES = struct.pack("<I", MAGIC)


WHOLE, FIRST, MIDDLE, LAST = range(4)


LENGTH_BITS = 29


LENGTH_MASK = (1 << LENGTH_BITS) - 1


EXACT_IN_FLOAT32 = 1 << 24  # labels are float32: identity ranges above this would be rounded


_FRAME = struct.Struct("<II")


_HEADER = struct.Struct("<IfQQ")


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
