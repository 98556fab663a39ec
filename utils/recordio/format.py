"""The bytes of a RecordIO file as MXNet 1.9.1 writes them: record frames and image headers.

A record is ``uint32 magic, uint32 (3-bit cflag << 29 | 29-bit length), payload padded to 4 bytes``.
A payload that contains the magic on a 4-byte boundary is cut there: cflag 1, 2, 3 mark its first,
middle and last part, 0 a whole one. Source: dmlc-core ``recordio.h`` (the record),
``mxnet/recordio.py`` (IRHeader).
"""

import numbers
import struct
from typing import NamedTuple

import numpy as np

from utils.errors import RecordError

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)

# cflag, which says what of a payload follows; it stands above the bits of the length
WHOLE, FIRST, MIDDLE, LAST = range(4)
LENGTH_BITS = 29
LENGTH_MASK = (1 << LENGTH_BITS) - 1

FRAME = struct.Struct("<II")
HEADER = struct.Struct("<IfQQ")

# labels are float32: identity ranges above this would be rounded
EXACT_IN_FLOAT32 = 1 << 24


class IRHeader(NamedTuple):
    """What precedes the image.

    flag: number of float32 labels that follow; 0: the label is the one here. id: the record's key.
    id2: unused.
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
        return HEADER.pack(0, label, key, key2) + payload
    vector = np.asarray(label, dtype="<f4")
    return HEADER.pack(vector.size, 0.0, key, key2) + vector.tobytes() + payload


def unpack(record: bytes) -> tuple[IRHeader, bytes]:
    """Split a record's payload into (IRHeader, image bytes); ``label`` is a float, or a float32
    vector if flag > 0.

    Accepts any bytes-like object and returns a slice of it. Raises RecordError if the header does
    not fit. Source: mxnet.recordio.unpack.
    """
    if len(record) < HEADER.size:
        raise RecordError(
            f"a payload of {len(record)} bytes has no room for the image header of {HEADER.size}"
        )
    flag, label, key, key2 = HEADER.unpack_from(record)
    start = HEADER.size + 4 * flag
    if start > len(record):
        raise RecordError(
            f"the image header promises {flag} labels, the payload has {len(record)} bytes"
        )
    if flag:
        label = np.frombuffer(record, "<f4", flag, HEADER.size)
    return IRHeader(flag, label, key, key2), record[start:]


def frame(payload: bytes) -> bytes:
    """The bytes that store ``payload`` (under 2**29 bytes): frames, parts and padding.

    Source: dmlc RecordIOWriter.
    """
    if len(payload) > LENGTH_MASK:
        raise ValueError(f"a record holds less than {LENGTH_MASK + 1} bytes, got {len(payload)}")
    parts, start = [], 0
    for cut in aligned_magics(payload):
        parts += frame_part(MIDDLE if start else FIRST, payload[start:cut])
        start = cut + len(MAGIC_BYTES)
    parts += frame_part(LAST if start else WHOLE, payload[start:])
    parts.append(bytes(-len(payload) % 4))
    return b"".join(parts)


def frame_part(cflag: int, part: bytes) -> tuple[bytes, bytes]:
    """(its frame, ``part``)."""
    return FRAME.pack(MAGIC, (cflag << LENGTH_BITS) | len(part)), part


def aligned_magics(payload: bytes) -> list[int]:
    """Offsets, multiples of 4, at which ``payload`` holds the magic."""
    offsets, offset = [], payload.find(MAGIC_BYTES)
    while offset >= 0:
        if offset % 4 == 0:
            offsets.append(offset)
        offset = payload.find(MAGIC_BYTES, offset + 1)
    return offsets
