"""What tells a training set from any other, wherever it lies.

Kind, number and bytes of the images, and a SHA-256 over their order and over some of them.
"""

import hashlib
import os

import numpy as np

from utils.errors import RecordError
from utils.recordio.image_records import ImageRecords, sampled
from utils.recordio.record_set import RecordSet

# of each record file: half a second for six million images
OFFSETS_HASHED = 1 << 16
IMAGES_HASHED = 64


def records_identity(records: RecordSet) -> dict:
    """Of one ``.rec``: its size, and a SHA-256 over all keys, their offsets and some whole records
    (every 89th offset and 64 records of MS1MV2).

    Of several files: their number, their sizes together, and a SHA-256 over the ones of all.
    """
    identities = [file_identity(file) for file in records.files]
    if len(identities) == 1:
        return identities[0]
    lines = "\n".join(f"{each['images']} {each['sha256']}" for each in identities)
    return dict(
        kind="records",
        files=len(identities),
        images=len(records),
        bytes=sum(each["bytes"] for each in identities),
        sha256=hashlib.sha256(lines.encode()).hexdigest(),
    )


def file_identity(file: ImageRecords) -> dict:
    """What tells one ``.rec`` from any other."""
    index, images = file.index.index, slice(file.first, file.first + file.count)
    keys, offsets = index.keys[images], index.offsets[images]
    digest = hashlib.sha256()
    for first in range(0, len(keys), 1 << 20):
        digest.update(keys[first : first + (1 << 20)].astype("<i8").tobytes())
    digest.update(offsets[sampled(len(keys), OFFSETS_HASHED)].astype("<i8").tobytes())
    for at in sampled(len(keys), IMAGES_HASHED):
        try:
            record = file.index.read_at(file.first + int(at))
        except RecordError:
            record = b"damaged"
        digest.update(hashlib.sha256(record).digest())
    return dict(
        kind="records",
        images=file.count,
        bytes=os.path.getsize(file.path),
        sha256=digest.hexdigest(),
    )


def folder_identity(root_dir: str, paths: np.ndarray) -> dict:
    """Of a folder of images: the bytes of all files together, and a SHA-256 over all paths below
    ``root_dir``, their sizes and 64 whole files.
    """
    files = [os.path.join(root_dir, os.fsdecode(path)) for path in paths]
    sizes = np.array([size_of(file) for file in files], "<i8")
    digest = hashlib.sha256(b"\n".join(paths.tolist()) + sizes.tobytes())
    for at in sampled(len(files), IMAGES_HASHED):
        digest.update(hashlib.sha256(content_of(files[at])).digest())
    return dict(
        kind="folder",
        images=len(files),
        bytes=int(sizes[sizes >= 0].sum()),
        sha256=digest.hexdigest(),
    )


def size_of(file: str) -> int:
    try:
        return os.path.getsize(file)
    except OSError:
        # a damaged record like any other
        return -1


def content_of(file: str) -> bytes:
    try:
        with open(file, "rb") as opened:
            return opened.read()
    except OSError:
        return b"damaged"
