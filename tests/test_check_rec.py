"""data/check_rec.py: every kind of finding in sets that were damaged on purpose, in one process and in two, and what counts as an error."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest

from data.check_rec import describe_sizes, group_equal
from tests.commands import ROOT, environment
from test_dataset import copy_set, jpeg, write_folder, write_set

SCRIPT = ROOT / "data" / "check_rec.py"


def check(*arguments, expect):
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, env=environment(), cwd="/")
    assert done.returncode == expect and "Traceback" not in done.stderr, done.stderr + done.stdout
    return done.stdout, done.stderr


@pytest.fixture
def damaged(tmp_path):
    """Keys 0 ... 11: labels 0, 0, 0, 1, 1, 3, 3, 9 (no class), 1.5 (no class), no image, too large, a copy of key 0 under label 3, a copy of key 3 under its own."""
    folder = tmp_path / "set"
    folder.mkdir()
    images = [(0, jpeg(1)), (0, jpeg(2)), (0, jpeg(3)), (1, jpeg(4)), (1, jpeg(5)), (3, jpeg(6)), (3, jpeg(7)), (9, jpeg(8)), (1.5, jpeg(9)), (1, b"no image"),
              (1, jpeg(10, (120, 112))), (3, jpeg(1)), (1, jpeg(4))]
    return write_set(folder, images, "5,112,112\n")


@pytest.mark.parametrize("workers", [1, 2])
def test_every_finding(damaged, tmp_path, workers):
    output, error = check(damaged, "--json", tmp_path / "check.json", "--sheet", tmp_path / "sheet.png", "--workers", workers, expect=1)
    found = json.loads((tmp_path / "check.json").read_text())
    assert (found["images"], found["classes"]) == (13, 5)
    listed = {name: (found[name]["count"], found[name]["listed"]) for name in ("unreadable", "labels", "gaps", "shared", "duplicates")}
    assert listed["unreadable"] == (2, [dict(record=9, reason="8 bytes that are no image OpenCV can read"),
                                        dict(record=10, reason="the image is 120x112, not 112x112; align and crop it first")])
    assert listed["labels"] == (2, [dict(record=7, label=9.0), dict(record=8, label=1.5)])
    assert listed["gaps"] == (2, [2, 4])
    own, other = [dict(record=0, label=0.0), dict(record=11, label=3.0)], [dict(record=3, label=1.0), dict(record=12, label=1.0)]
    assert listed["shared"] == (1, [own]) and listed["duplicates"] == (2, [own, other])
    assert found["identity_sizes"] == dict(classes=3, least=3, median=3.0, mean=3.0, most=3, largest_class=0, smallest_class=0, histogram={"2-4": 3})
    for line in ("13 images, 5 classes", "images an identity: 3 at least, 3 median, 3.0 mean, 3 at most (class 0)", "unreadable records: 2; the first: record 9, 8 bytes that are",
                 "labels that are no class: 2; the first: record 7 with label 9", "label gaps (classes without an image): 2; the first: 2",
                 "images under two identities (same bytes): 1; the first: record 0 with label 0 = record 11 with label 3"):
        assert line in output
    assert error == f"error: {damaged}: 2 unreadable records, 2 labels that are no class, 2 label gaps (classes without an image), 1 images under two identities (same bytes)\n"
    assert cv2.imread(str(tmp_path / "sheet.png")).shape == ((14 + 112) * (2 + 5 + 1), 1120, 3)
    if workers == 2:
        _, error = check(damaged, "--allow", "unreadable", "gaps", "shared", expect=1)
        assert error == f"error: {damaged}: 2 labels that are no class\n"


def test_sound_sets_of_every_kind(tmp_path):
    """The golden sets that MXNet wrote, one whose identity labels only its index records hold, one without index and property, and a folder."""
    (tmp_path / "plain" ).mkdir()
    for style in ("insightface", "plain"):
        folder = copy_set(style, tmp_path / style)
        if style == "plain":
            (folder / "train.idx").unlink()
            (folder / "property").unlink()
        output, _ = check(folder, "--workers", 1, expect=0)
        assert "30 images, 6 classes" in output and "unreadable records: 0" in output
    output, _ = check(write_folder(tmp_path / "faces", {"ann": 3, "bob": 1}), "--workers", 1, expect=0)
    assert "4 images, 2 classes" in output and "1 at least, 2 median, 2.0 mean, 3 at most" in output


def test_a_cut_off_file_and_a_label_beyond_the_property_are_findings(tmp_path):
    folder = copy_set("insightface", tmp_path / "set")
    content = (folder / "train.rec").read_bytes()
    (folder / "property").write_text("4,112,112\n")
    output, error = check(folder, "--workers", 1, expect=1)
    assert "labels that are no class" in error and "label gaps" not in error
    (folder / "train.rec").write_bytes(content[:len(content) // 2])
    assert "train.rec: key 0 at offset" in check(folder, expect=1)[1], "which records are images stands at the end of this layout"
    folder = copy_set("plain", tmp_path / "plain")
    content = (folder / "train.rec").read_bytes()
    (folder / "train.rec").write_bytes(content[:len(content) // 2])
    output, error = check(folder, "--workers", 1, "--allow", "gaps", expect=1)
    assert "truncated" in output and error.endswith(" unreadable records\n")


def test_shards_and_a_label_that_is_no_number(tmp_path):
    for number, labels in enumerate(([0, 1], [float("nan"), 1])):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_set(folder, [(label, jpeg(10 * number + at)) for at, label in enumerate(labels)], "2,112,112\n")
        for ending in ("rec", "idx"):
            (folder / f"train.{ending}").rename(tmp_path / f"train_{number}.{ending}")
        (folder / "property").unlink()
        folder.rmdir()
    output, error = check(tmp_path, "--workers", 1, "--json", tmp_path / "check.json", expect=1)
    assert "4 images, 2 classes" in output and "labels that are no class: 1; the first: record train_1.rec:0 with label nan" in output
    assert error.endswith(f"error: {tmp_path}: 1 labels that are no class\n")
    assert json.loads((tmp_path / "check.json").read_text())["labels"]["listed"] == [dict(record="train_1.rec:0", label=None)]


def test_wrong_input_is_one_line(tmp_path):
    for arguments, message in (([tmp_path / "none"], "no folder"), ([tmp_path], "it should hold one sub-folder of images per identity"),
                               ([tmp_path, "--json", tmp_path / "none" / "x.json"], "--json: "),
                               ([tmp_path, "--sheet", "sheet.jpg"], "sheet.jpg must end in .png")):
        output, error = check(*arguments, expect=1)
        assert message in error and error.startswith("error: ") and error.count("\n") == 1 and not output
    (tmp_path / "property").write_text("3,112,112")
    assert "no record file" in check(tmp_path, expect=1)[1]


def test_groups_and_sizes_against_plain_counting():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 400, 1000)
    digests = np.array([np.void(int(value).to_bytes(16, "big")) for value in values])
    chosen = np.flatnonzero(rng.random(1000) < 0.9)
    wanted = {}
    for index in chosen:
        wanted.setdefault(values[index], []).append(int(index))
    wanted = sorted(group for group in wanted.values() if len(group) > 1)
    assert [group.tolist() for group in group_equal(digests, chosen)] == wanted
    assert group_equal(digests, chosen[:1]) == []
    sizes = describe_sizes(np.array([0, 1, 1, 2, 4, 5, 1000, 999, 7000]))
    assert sizes["histogram"] == {"1": 2, "2-4": 2, "5-9": 1, "500-999": 1, "1000 and more": 2} and (sizes["least"], sizes["most"], sizes["largest_class"]) == (1, 7000, 8)
    assert describe_sizes(np.zeros(3, int)) == dict(classes=0)
