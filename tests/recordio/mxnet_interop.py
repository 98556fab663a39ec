"""Proves that MXNet and utils.recordio read each other's files.

Run by tests/recordio/test_mxnet.py inside .venv-mxnet (no torch there):

    .venv-mxnet/bin/python tests/recordio/mxnet_interop.py SCRATCH_FOLDER
"""

import os
import shutil
import sys

sys.path[0] = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))

import cv2
import mxnet
import numpy as np

from utils.dataset.base import PIXELS
from utils.dataset.records import MXFaceDataset
from utils.recordio import format, indexed, writer

GOLDEN = os.path.join(sys.path[0], "tests", "golden", "recordio")


def payloads(count):
    """Random bytes with the magic strewn in, on and off the 4-byte grid: every way of splitting."""
    rng = np.random.default_rng(11)
    for _ in range(count):
        pieces = rng.integers(0, 5, rng.integers(0, 12))
        yield b"".join(
            format.MAGIC_BYTES if piece == 0 else rng.bytes(int(rng.integers(0, 9)))
            for piece in pieces
        )


def headers():
    """Image headers with a scalar, an integer and a vector label."""
    yield 0, 3.0, 7, 0
    yield 5, 2, 1, 9
    yield 2, [1.0, 6.0], 31, 0
    yield 0, np.array([4, 5, 6], np.float32), 1, 0


def assert_same_records(writer, reader, scratch, name):
    """What ``writer`` writes, ``reader`` reads; returns the bytes of the record file."""
    idx, rec = (os.path.join(scratch, f"{name}.{suffix}") for suffix in ("idx", "rec"))
    expected = list(payloads(300))
    file = writer(idx, rec, "w")
    for key, payload in enumerate(expected):
        file.write_idx(key, payload)
    file.close()
    file = reader(idx, rec, "r")
    for key in reversed(range(len(expected))):
        assert bytes(file.read_idx(key)) == expected[key], (name, key)
    assert list(file.keys) == list(range(len(expected)))
    with open(rec, "rb") as stored:
        return stored.read()


def check_headers():
    for header in headers():
        packed = format.pack(format.IRHeader(*header), b"image")
        assert packed == mxnet.recordio.pack(mxnet.recordio.IRHeader(*header), b"image")
        ours, theirs = format.unpack(packed), mxnet.recordio.unpack(packed)
        assert (
            ours[1] == theirs[1] and ours[0].flag == theirs[0].flag and ours[0].id == theirs[0].id
        )
        assert np.array_equal(ours[0].label, theirs[0].label)


def golden_images():
    """The encoded golden images by identity."""
    path = os.path.join(GOLDEN, "plain")
    file = mxnet.recordio.MXIndexedRecordIO(path + ".idx", path + ".rec", "r")
    groups = {}
    for key in file.keys:
        header, image = mxnet.recordio.unpack(file.read_idx(key))
        groups.setdefault(header.label, []).append(image)
    return [groups[label] for label in sorted(groups)]


def check_insightface_layout(scratch):
    """MXNet reads our InsightFace layout as InsightFace's own loader does."""
    folder = os.path.join(scratch, "insightface")
    groups = golden_images()
    count = writer.write_insightface(folder, groups)
    file = mxnet.recordio.MXIndexedRecordIO(
        os.path.join(folder, "train.idx"), os.path.join(folder, "train.rec"), "r"
    )
    header, _ = mxnet.recordio.unpack(file.read_idx(0))
    assert header.flag == 2 and tuple(header.label) == (count + 1, count + 1 + len(groups))
    expected = [(label, image) for label, group in enumerate(groups) for image in group]
    for key, (label, image) in enumerate(expected, start=1):
        header, stored = mxnet.recordio.unpack(file.read_idx(key))
        assert (header.label, stored) == (label, image), key


def check_backends(scratch):
    """Both backends give the golden pixels, and name the same damaged records."""
    golden = np.load(os.path.join(GOLDEN, "expected.npz"))
    for style in ("insightface", "plain", "vector"):
        folder = os.path.join(scratch, f"backend_{style}")
        copy_golden(style, folder)
        for backend in ("native", "mxnet"):
            dataset = MXFaceDataset(folder, backend=backend)
            images, labels, bad = dataset.read_batch(range(len(dataset)))
            assert np.array_equal(images, golden[f"{style}/pixels"]), (style, backend)
            assert np.array_equal(labels, golden[f"{style}/labels"]) and not bad, (style, backend)
    folder = os.path.join(scratch, "damaged")
    copy_golden("plain", folder)
    damage(folder)
    native, other = (
        MXFaceDataset(folder, backend=backend).read_batch(range(30))
        for backend in ("native", "mxnet")
    )
    assert np.array_equal(native[0], other[0]) and np.array_equal(native[1], other[1])
    assert [key for key, _ in native[2]] == [key for key, _ in other[2]] == [1, 2, 29]


def check_decoded(scratch):
    """Both backends read images as data/decode_rec.py stores them."""
    encoded = MXFaceDataset(os.path.join(scratch, "backend_plain"))
    folder = os.path.join(scratch, "decoded")
    os.makedirs(folder)
    with indexed.IndexedRecordIO(
        os.path.join(folder, "train.idx"), os.path.join(folder, "train.rec"), "w"
    ) as writer:
        for index in range(3):
            writer.write_idx(
                index,
                format.pack(
                    format.IRHeader(0, 1.0, index, 0), PIXELS + encoded[index][0].tobytes()
                ),
            )
    for backend in ("native", "mxnet"):
        dataset = MXFaceDataset(folder, backend=backend)
        assert all(np.array_equal(dataset[index][0], encoded[index][0]) for index in range(3))


def copy_golden(style, folder):
    os.makedirs(folder)
    for name, suffix in (("train.rec", "rec"), ("train.idx", "idx"), ("property", "property")):
        shutil.copyfile(os.path.join(GOLDEN, f"{style}.{suffix}"), os.path.join(folder, name))


def damage(folder):
    """Overwrite the image of key 1, the magic of key 2, and cut the file inside the last record."""
    path = os.path.join(folder, "train.rec")
    offsets = np.loadtxt(os.path.join(folder, "train.idx"), dtype=np.int64)[:, 1]
    with open(path, "r+b") as file:
        file.seek(offsets[1] + 40)
        file.write(bytes(400))
        file.seek(offsets[2])
        file.write(bytes(4))
        file.truncate(offsets[-1] + 1000)


def main():
    scratch = sys.argv[1]
    cv2.setNumThreads(1)
    ours = assert_same_records(
        indexed.IndexedRecordIO, mxnet.recordio.MXIndexedRecordIO, scratch, "ours"
    )
    theirs = assert_same_records(
        mxnet.recordio.MXIndexedRecordIO, indexed.IndexedRecordIO, scratch, "theirs"
    )
    assert ours == theirs
    check_headers()
    check_insightface_layout(scratch)
    check_backends(scratch)
    check_decoded(scratch)
    print(f"MXNet {mxnet.__version__}, NumPy {np.__version__}, OpenCV {cv2.__version__}: all equal")


if __name__ == "__main__":
    main()
