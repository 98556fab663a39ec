"""data/decode_rec.py: the copy holds the same images, labels, keys and order, and trains to the
same weights.
"""

import os
import shutil
import signal
import subprocess
import sys
import zlib
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from data import decode_rec
from data.make_synthetic import write_training_set
from data.synth.render_pool import open_studio
from tests.commands import LIMIT, ROOT, run
from tests.dataset.test_dataset import copy_set, jpeg, write_set
from tests.recordio.test_recordio import STYLES
from utils.dataset.base import PIXELS, decode_into
from utils.dataset.records import MXFaceDataset
from utils.errors import InputError, RecordError
from utils.files import take_lock
from utils.recordio.format import IRHeader, pack, unpack
from utils.recordio.indexed import IndexedRecordIO

TOOL = ROOT / "data" / "decode_rec.py"


def records_of(folder, stem="train"):
    """[(key, offset, header and image)] in the order of the file."""
    with IndexedRecordIO(folder / f"{stem}.idx", folder / f"{stem}.rec", "r") as reader:
        found = [(key, reader.offset(key), reader.read_idx(key)) for key in reader.keys]
    return sorted(found, key=lambda entry: entry[1])


def assert_same_set(copy, source):
    assert len(copy) == len(source) and copy.num_classes == source.num_classes
    for index in range(len(source)):
        image, label = source[index]
        assert (
            np.array_equal(copy[index][0], image)
            and copy[index][1] == label
            and copy.name_of(index) == source.name_of(index)
        )


@pytest.mark.processes
@pytest.mark.parametrize("style", STYLES)
def test_golden_sets(style, tmp_path):
    source, copy = copy_set(style, tmp_path / "source"), tmp_path / "new" / "copy"
    assert "30 decoded images of 6 identities, read back and equal" in run(
        TOOL, source, "--output", copy
    )
    assert_same_set(MXFaceDataset(copy), MXFaceDataset(source))
    assert sorted(os.listdir(copy)) == ["property", "train.idx", "train.rec"] and os.listdir(
        copy.parent
    ) == ["copy"]
    images = 0
    for (key, _, record), (key_before, _, before) in zip(
        records_of(copy), records_of(source), strict=True
    ):
        assert key == key_before
        image, image_before = unpack(record)[1], unpack(before)[1]
        if not image_before:
            assert record == before  # of InsightFace's index
            continue
        images += 1
        assert record[: -len(image)] == before[: -len(image_before)] and image.startswith(PIXELS)
        assert np.array_equal(
            cv2.imdecode(np.frombuffer(image, np.uint8), 1),
            cv2.imdecode(np.frombuffer(image_before, np.uint8), 1),
        )
    assert images == 30
    assert_same_set(MXFaceDataset(run_again(copy, tmp_path)), MXFaceDataset(source))


def run_again(copy, tmp_path):
    """Of a copy a copy can be made."""
    run(TOOL, copy, "--output", tmp_path / "again", "--workers", 1)
    assert (tmp_path / "again" / "train.rec").read_bytes() == (copy / "train.rec").read_bytes()
    return tmp_path / "again"


@pytest.mark.processes
def test_shards_vector_labels_and_the_order_in_the_file(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number, keys in ((0, [4, 0, 2]), (1, [1, 3])):
        with IndexedRecordIO(
            source / f"train_{number}.idx", source / f"train_{number}.rec", "w"
        ) as writer:
            for key in keys:
                writer.write_idx(
                    key, pack(IRHeader(0, [float(key % 3), 0.5], key, 7), jpeg(10 * number + key))
                )
    (source / "property").write_text("3,112,112\n")
    run(TOOL, source, "--output", tmp_path / "copy")
    assert_same_set(MXFaceDataset(tmp_path / "copy"), MXFaceDataset(source))
    for stem in ("train_0", "train_1"):
        copied, before = records_of(tmp_path / "copy", stem), records_of(source, stem)
        assert [(key, record[:32]) for key, _, record in copied] == [
            (key, record[:32]) for key, _, record in before
        ]


@pytest.mark.processes
def test_it_trains_to_the_same_weights(tmp_path):
    (tmp_path / "source").mkdir()
    with open_studio(1, 3, 1.0) as studio:
        write_training_set(tmp_path / "source", studio, 6, 8)
    run(TOOL, tmp_path / "source", "--output", tmp_path / "copy")
    for name in ("source", "copy"):
        run(
            ROOT / "train" / "train_standalone.py",
            "dataset=synthetic",
            f"rec={tmp_path / name}",
            "embedding_size=32",
            "num_epoch=1",
            "val_targets=[]",
            "batch_size=8",
            "num_workers=1",
            f"output={tmp_path / name}_run",
        )
    left, right = (
        torch.load(next((tmp_path / f"{name}_run").glob("*backbone.pth")), weights_only=True)
        for name in ("source", "copy")
    )
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.processes
def test_damaged_images_and_labels(tmp_path):
    source = write_set(
        tmp_path, [(0.0, jpeg(0)), (1.0, b"no image"), (1.0, jpeg(2))], "2,112,112\n"
    )
    printed = run(TOOL, source, "--output", tmp_path / "copy", expect=1)
    assert (
        f"error: record 1 of {source} is damaged (8 bytes that are no image OpenCV can read): "
        "data/check_rec.py lists all such"
    ) in printed
    assert not list(tmp_path.glob("copy*"))


@pytest.mark.processes
def test_a_rec_of_another_name_and_what_a_training_would_refuse(tmp_path):
    """The copy of a JPEG that ends early holds its grey rest, which nobody can tell any more."""
    rows = [(float(at % 2), jpeg(at)) for at in range(6)]
    rows[2] = 0.0, rows[2][1][: len(rows[2][1]) * 2 // 3] + bytes(4096)
    (tmp_path / "source").mkdir()
    source = write_set(tmp_path / "source", rows, "2,112,112\n")
    for ending in ("rec", "idx"):
        (source / f"train.{ending}").rename(source / f"faces.{ending}")
    assert "name the files of the set" in run(TOOL, source, "--output", tmp_path / "copy", expect=1)
    printed = run(TOOL, f"rec={source / 'faces.rec'}", "--output", tmp_path / "copy")
    assert "1 images are JPEGs that end early" in printed
    assert sorted(os.listdir(tmp_path / "copy")) == ["faces.idx", "faces.rec", "property"]
    assert_same_set(
        MXFaceDataset(tmp_path / "copy" / "faces.rec"), MXFaceDataset(source / "faces.rec")
    )
    (tmp_path / "one").mkdir()
    one = write_set(tmp_path / "one", [(0.0, jpeg(at)) for at in range(3)], "1,112,112\n")
    assert "all labels are 0" in run(TOOL, one, "--output", tmp_path / "other", expect=1)
    assert not (tmp_path / "other").exists()


def test_pixels_of_another_length_or_size_are_left_to_opencv():
    out, pixels = (
        np.empty((112, 112, 3), np.uint8),
        np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8),
    )
    for end in (b"", b"\n"):
        decode_into(PIXELS + pixels.tobytes() + end, out)
        assert np.array_equal(out, pixels)
    for encoded, reason in (
        (PIXELS + bytes(37631), "37646 bytes that are no image OpenCV can read"),
        (b"P6\n96 100\n255\n" + bytes(28800), "the image is 96x100, not 112x112"),
    ):
        with pytest.raises(RecordError, match=reason):
            decode_into(encoded, out)


@pytest.mark.processes
def test_what_cannot_be_done_is_told(tmp_path, monkeypatch):
    source = copy_set("plain", tmp_path / "source")
    (tmp_path / "there").mkdir()
    assert f"error: --output {tmp_path / 'there'} is there already" in run(
        TOOL, source, "--output", tmp_path / "there", expect=1
    )
    assert f"error: no record set {tmp_path / 'there'}" in run(
        TOOL, tmp_path / "there", "--output", tmp_path / "copy", expect=1
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e6))
    monkeypatch.setattr(
        "sys.argv", ["decode_rec.py", str(source), "--output", str(tmp_path / "copy")]
    )
    with pytest.raises(
        InputError, match=r"30 decoded images take 0.0 GB, the disk has 0.0 GB left"
    ):
        decode_rec.main()
    assert sorted(os.listdir(tmp_path)) == ["source", "there"]


INTERRUPTED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from data import decode_rec
write, written = decode_rec.IndexedRecordIO.write_idx, []
def interrupted(self, key, record):
    written.append(key)
    # shells start what runs in the background deaf to it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if len(written) == 10:
        {what}
    write(self, key, record)
decode_rec.IndexedRecordIO.write_idx = interrupted
decode_rec.run(decode_rec.main)
"""


def run_interrupted(what, source, copy):
    """The command, in which ``what`` happens at the tenth record; returns when its workers have
    ended, too, for they hold its pipes.
    """
    return subprocess.run(
        [
            sys.executable,
            "-c",
            INTERRUPTED.format(root=str(ROOT), what=what),
            str(source),
            "--output",
            str(copy),
        ],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


@pytest.mark.processes
@pytest.mark.parametrize(
    "what, status",
    [
        ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
        ("os.kill(os.getpid(), signal.SIGTERM)", 128 + signal.SIGTERM),
        ("raise MemoryError", 1),
    ],
)
def test_an_end_in_the_middle_leaves_neither_files_nor_processes(tmp_path, what, status):
    source = copy_set("insightface", tmp_path / "source")
    done = run_interrupted(what, source, tmp_path / "copy")
    assert done.returncode == status, done.stderr
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.processes
def test_a_disk_that_fills_up(tmp_path):
    """As a limit to the size of a file, which the system tells likewise."""
    source = copy_set("plain", tmp_path / "source")
    done = run_interrupted(
        "__import__('resource').setrlimit(__import__('resource').RLIMIT_FSIZE, (400_000, 400_000))",
        source,
        tmp_path / "copy",
    )
    assert (
        done.returncode == 1
        and (
            f"error: --output {tmp_path / 'copy'}: a file of the copy: "
            "File too large; nothing is kept"
        )
        in done.stderr
    )
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.processes
def test_what_a_killed_one_left_goes_and_one_at_work_is_left_alone(tmp_path):
    source = copy_set("plain", tmp_path / "source")
    left, at_work, others = (
        tmp_path / name
        for name in (".copy.decode_rec-1", ".copy.decode_rec-2", ".copy.decode_rec-3")
    )
    for folder in (left, at_work, others):
        (folder / "copy").mkdir(parents=True)
        (folder / "copy" / "train.rec.tmp-1").write_bytes(b"half")
    (left / "lock").touch()
    with take_lock(str(at_work / "lock")):
        run(TOOL, source, "--output", tmp_path / "copy")
    assert sorted(os.listdir(tmp_path / "copy")) == ["property", "train.idx", "train.rec"]
    assert sorted(os.listdir(tmp_path)) == [at_work.name, others.name, "copy", "source"]


def test_a_disk_that_gives_back_something_else(tmp_path):
    with IndexedRecordIO(tmp_path / "train.idx", tmp_path / "train.rec", "w") as writer:
        writer.write_idx(3, b"what was written")
        writer.write_idx(1, b"what was not written")
    sums = np.array([zlib.crc32(b"what was written")] * 2, np.uint32)
    with pytest.raises(
        InputError, match="train.rec: record 1 differs from what was written; check the disk"
    ):
        decode_rec.compare(tmp_path / "train.rec", sums)
