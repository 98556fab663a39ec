"""utils.staging: copies of a set on a disk of the machine, also when something goes wrong on the
way.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest

from config.load import load_config
from data.make_synthetic import write_training_set
from data.synth.render_pool import open_studio
from tests.commands import ROOT, run
from tests.dataset.test_dataset import copy_set
from train import cache_teacher
from train.build import build_dataset
from utils.dataset import staging
from utils.dataset.records import MXFaceDataset
from utils.dataset.staging import stage
from utils.errors import InputError

NAMES = ["train.idx", "train.rec", "property"]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A set of 123 kB, copied in parts of 10,000 bytes; locks end with the test."""
    monkeypatch.setattr(staging, "PART", 10_000)
    monkeypatch.setattr(staging, "_held", [])
    return copy_set("plain", tmp_path / "faces")


def let_go():
    """As when the processes that read the copies end."""
    for lock in staging._held:
        lock.close()
    staging._held.clear()


def assert_same(source, copy, names=NAMES):
    for name in names:
        assert (copy / name).read_bytes() == (source / name).read_bytes(), name
    assert sorted(path.name for path in copy.iterdir()) == sorted(
        [*names, "complete.json", "copying", "reading", "source.json"]
    )


@pytest.mark.processes
def test_a_copy_is_made_once(source, tmp_path):
    copy = stage(source, NAMES, tmp_path / "disk")
    assert_same(source, copy)
    times = {name: (copy / name).stat().st_mtime_ns for name in os.listdir(copy)}
    assert stage(source, NAMES, tmp_path / "disk") == copy
    assert times == {name: (copy / name).stat().st_mtime_ns for name in os.listdir(copy)}
    other = (
        copy_set("vector", tmp_path / "elsewhere" / "faces")
        if (tmp_path / "elsewhere").mkdir() is None
        else None
    )
    # of the same name, but another place
    assert stage(other, NAMES, tmp_path / "disk") != copy
    assert_same(source, copy)


@pytest.mark.processes
def test_a_changed_source_is_copied_anew_and_the_old_copy_goes_when_nobody_reads_it(
    source, tmp_path, caplog
):
    first = stage(source, NAMES, tmp_path / "disk")
    with open(source / "train.rec", "r+b") as file:
        file.seek(50_000)
        file.write(b"other bytes, as many")
    second = stage(source, NAMES, tmp_path / "disk")
    assert second != first and first.is_dir() and "a run still reads it" in caplog.text
    assert_same(source, second)
    let_go()
    os.utime(source / "train.idx")
    third = stage(source, NAMES, tmp_path / "disk")
    assert third not in (first, second) and os.listdir(tmp_path / "disk") == [third.name]


@pytest.mark.processes
def test_a_copy_that_was_written_to_is_copied_again(source, tmp_path, caplog):
    copy = stage(source, NAMES, tmp_path / "disk")
    with open(copy / "train.rec", "r+b") as file:
        file.write(b"oops")
    (copy / "train.idx").unlink()
    assert (
        stage(source, NAMES, tmp_path / "disk") == copy
        and ("train.rec is not any more what was copied") in caplog.text
    )
    assert_same(source, copy)


COPY = """
import logging, os, sys
sys.path.insert(0, sys.argv[1])
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from utils.dataset import staging
staging.PART = 10_000
write, stop_at = staging.write_part, int(sys.argv[4])
def telling(file, start, content):
    write(file, start, content)
    if start == stop_at:
        print("at", start, flush=True)
        sys.stdin.readline()
    elif stop_at < 0:
        print("part", start, flush=True)
staging.write_part = telling
print(staging.stage(sys.argv[2], ["train.idx", "train.rec", "property"], sys.argv[3]), flush=True)
"""


def copying(source, to, stop_at=-1):
    return subprocess.Popen(
        [sys.executable, "-c", COPY, ROOT, source, to, str(stop_at)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.processes
@pytest.mark.parametrize("damage", [False, True])
def test_a_killed_copy_goes_on_where_it_was(damage, source, tmp_path):
    """At the first part whose sum does not fit: the one it was killed in, or one that the disk has
    lost since.
    """
    process = copying(source, tmp_path / "disk", stop_at=60_000)
    assert process.stdout.readline() == "at 60000\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (copy,) = (tmp_path / "disk").iterdir()
    assert not (copy / "train.rec").exists() and not (copy / "complete.json").exists()
    if damage:
        with open(copy / "train.rec.partial", "r+b") as file:
            file.seek(25_000)
            file.write(bytes(100))
    parts = [
        line
        for line in copying(source, tmp_path / "disk").communicate()[0].splitlines()
        if line.startswith("part")
    ]
    # the smaller files were there
    assert parts == [
        f"part {start}" for start in range(20_000 if damage else 60_000, 123_488, 10_000)
    ]
    assert_same(source, copy)


@pytest.mark.processes
def test_two_runs_at_once_copy_once(source, tmp_path):
    first = copying(source, tmp_path / "disk", stop_at=60_000)
    assert first.stdout.readline() == "at 60000\n"
    second = copying(source, tmp_path / "disk")
    assert "waiting for it" in second.stdout.readline()
    first.communicate("go on\n")
    text = second.communicate()[0]
    assert "part" not in text and first.returncode == second.returncode == 0
    assert_same(source, next((tmp_path / "disk").iterdir()))


def test_a_disk_that_is_too_small(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage(200_000, 100_000, 100_000))
    with pytest.raises(
        InputError,
        match=r"stage_to: .*faces takes 0.000 GB more in .*disk, 0.000 "
        r"GB are free on its disk; make room",
    ):
        stage(source, NAMES, tmp_path / "disk")
    assert not list((tmp_path / "disk").glob("*/train*"))
    monkeypatch.undo()


@pytest.mark.processes
def test_a_disk_that_fills_up_keeps_what_is_done(source, tmp_path, monkeypatch):
    write = staging.write_part

    def filling(file, start, content):
        if start >= 60_000:
            raise OSError(28, "No space left on device", "train.rec.partial")
        write(file, start, content)

    monkeypatch.setattr(staging, "write_part", filling)
    with pytest.raises(
        InputError, match="cannot copy .*No space left on device.*what is done is kept"
    ):
        stage(source, NAMES, tmp_path / "disk")
    monkeypatch.setattr(staging, "write_part", write)
    assert_same(source, stage(source, NAMES, tmp_path / "disk"))


@pytest.mark.processes
def test_a_disk_that_does_not_give_back_what_was_written(source, tmp_path, monkeypatch):
    write = staging.write_part
    monkeypatch.setattr(
        staging,
        "write_part",
        lambda file, start, content: write(
            file, start, content if start != 70_000 else b"\0" + content[1:]
        ),
    )
    with pytest.raises(InputError, match="train.rec is not what was written to it, at byte 70000"):
        stage(source, NAMES, tmp_path / "disk")
    monkeypatch.setattr(staging, "write_part", write)
    assert_same(source, stage(source, NAMES, tmp_path / "disk"))


@pytest.mark.processes
def test_a_source_that_changes_meanwhile(source, tmp_path, monkeypatch):
    write = staging.write_part

    def changing(file, start, content):
        write(file, start, content)
        if start == 70_000:
            os.utime(source / "train.rec")

    monkeypatch.setattr(staging, "write_part", changing)
    with pytest.raises(InputError, match="train.rec changed while it was copied"):
        stage(source, NAMES, tmp_path / "disk")
    monkeypatch.setattr(staging, "write_part", write)
    assert_same(source, stage(source, NAMES, tmp_path / "disk"))


def test_places_that_cannot_be_copied_to(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match="stage_to: cannot copy .*faces to .*File exists|Not a directory"
    ):
        stage(source, NAMES, tmp_path / "file")
    with pytest.raises(InputError, match="stage_to copies record files"):
        load_config(ROOT / "config" / "config.py", ["dataset=Idifface", "stage_to=/tmp"])


def test_sets_are_read_from_their_copies(source, tmp_path):
    """One set without property, and shards of two folders: names, labels and identity are those of
    the originals.
    """
    (source / "property").unlink()
    cfg = load_config(
        ROOT / "config" / "config.py",
        ["dataset=synthetic", f"rec={source}", f"stage_to={tmp_path / 'disk'}"],
    )
    dataset = build_dataset(cfg)
    shutil.move(source, tmp_path / "away")
    assert dataset.root_dir.startswith(str(tmp_path / "disk")) and cfg.rec == str(source)
    original = MXFaceDataset(tmp_path / "away")
    assert dataset.identity() == original.identity() and np.array_equal(
        dataset.read_batch(range(30))[0], original.read_batch(range(30))[0]
    )
    others = [copy_set(style, tmp_path / style) for style in ("insightface", "vector")]
    cfg = load_config(
        ROOT / "config" / "config.py",
        [
            "dataset=synthetic",
            f"rec={others[0]},{others[1] / 'train.rec'}",
            "rec_labels=separate",
            f"stage_to={tmp_path / 'disk'}",
        ],
    )
    dataset = build_dataset(cfg)
    assert (
        dataset.num_classes == 12
        and dataset.identity() == MXFaceDataset(others, labels="separate").identity()
    )
    cfg.rec = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no record file .*nowhere/train.rec"):
        build_dataset(cfg)


@pytest.mark.processes
def test_two_ranks_train_from_one_copy(tmp_path, monkeypatch):
    """The real command; the set and the teacher's features are copied by the first rank of the
    machine, and the run does not touch the originals any more.
    """
    (tmp_path / "faces").mkdir()
    with open_studio(1, 3, 1.0) as studio:
        write_training_set(tmp_path / "faces", studio, 4, 8)
    features = np.random.default_rng(0).standard_normal((2, 32, 16)).astype(np.float32)
    np.savez(tmp_path / "features.npz", emb=features[0], emb_flip=features[1])
    rec = f"rec={tmp_path / 'faces'}"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "cache_teacher.py",
            "dataset=synthetic",
            rec,
            "--from",
            str(tmp_path / "features.npz"),
            "--output",
            str(tmp_path / "teacher"),
        ],
    )
    cache_teacher.main()
    said = run(
        ROOT / "train" / "train_AdaDistill.py",
        "dataset=synthetic",
        rec,
        "embedding_size=16",
        "batch_size=4",
        "num_epoch=1",
        "val_targets=[]",
        "num_workers=1",
        f"teacher_embeddings={tmp_path / 'teacher'}",
        f"stage_to={tmp_path / 'disk'}",
        f"output={tmp_path / 'run'}",
        ranks=2,
    )
    (teacher, faces) = sorted((tmp_path / "disk").iterdir(), reverse=True)
    assert (
        f"32 images of 4 classes in {faces}" in said
        and f"Teacher features from {teacher}" in said
        and ("Finished at step 4") in said
    )
    assert_same(tmp_path / "teacher", teacher, ["features.npy", "manifest.json"])
    assert_same(tmp_path / "faces", faces)
