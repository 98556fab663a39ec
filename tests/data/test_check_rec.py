"""data/check_rec.py: every kind of finding in sets that were damaged on purpose, in one process and
in two, and what counts as an error.
"""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest

from data.check_rec import describe_sizes, group_equal
from tests.commands import ROOT, environment
from tests.dataset.test_dataset import copy_set, jpeg, write_folder, write_set
from utils.jpeg import ends_early

SCRIPT = ROOT / "data" / "check_rec.py"


def check(*arguments, expect):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        cwd="/",
    )
    assert done.returncode == expect and "Traceback" not in done.stderr, done.stderr + done.stdout
    return done.stdout, done.stderr


@pytest.fixture
def damaged(tmp_path):
    """Keys 0 ... 11: labels 0, 0, 0, 1, 1, 3, 3, 9 (no class), 1.5 (no class), no image, too large,
    a copy of key 0 under label 3, a copy of key 3 under its own.
    """
    folder = tmp_path / "set"
    folder.mkdir()
    images = [
        (0, jpeg(1)),
        (0, jpeg(2)),
        (0, jpeg(3)),
        (1, jpeg(4)),
        (1, jpeg(5)),
        (3, jpeg(6)),
        (3, jpeg(7)),
        (9, jpeg(8)),
        (1.5, jpeg(9)),
        (1, b"no image"),
        (1, jpeg(10, (120, 112))),
        (3, jpeg(1)),
        (1, jpeg(4)),
    ]
    return write_set(folder, images, "5,112,112\n")


@pytest.mark.processes
@pytest.mark.parametrize("workers", [1, 2])
def test_every_finding(damaged, tmp_path, workers):
    output, error = check(
        damaged,
        "--json",
        tmp_path / "check.json",
        "--sheet",
        tmp_path / "sheet.png",
        "--workers",
        workers,
        expect=1,
    )
    findings = json.loads((tmp_path / "check.json").read_text())
    assert (findings["images"], findings["classes"]) == (13, 5)
    listed = {
        name: (findings[name]["count"], findings[name]["listed"])
        for name in ("unreadable", "labels", "gaps", "shared", "duplicates")
    }
    assert listed["unreadable"] == (
        2,
        [
            dict(record=9, reason="8 bytes that are no image OpenCV can read"),
            dict(record=10, reason="the image is 120x112, not 112x112; align and crop it first"),
        ],
    )
    assert listed["labels"] == (2, [dict(record=7, label=9.0), dict(record=8, label=1.5)])
    assert listed["gaps"] == (2, [2, 4])
    own, other = (
        [dict(record=0, label=0.0), dict(record=11, label=3.0)],
        [dict(record=3, label=1.0), dict(record=12, label=1.0)],
    )
    assert listed["shared"] == (1, [own]) and listed["duplicates"] == (2, [own, other])
    assert findings["identity_sizes"] == dict(
        classes=3,
        least=3,
        median=3.0,
        mean=3.0,
        most=3,
        largest_class=0,
        smallest_class=0,
        histogram={"2-4": 3},
    )
    for line in (
        "13 images, 5 classes",
        "images an identity: 3 at least, 3 median, 3.0 mean, 3 at most (class 0)",
        "unreadable records: 2; the first: record 9, 8 bytes that are",
        "labels that are no class: 2; the first: record 7 with label 9",
        "label gaps (classes without an image): 2; the first: 2",
        "images under two identities (same bytes): 1; the first: record 0 with label 0 = "
        "record 11 with label 3",
    ):
        assert line in output
    assert error == (
        f"error: {damaged}: 2 unreadable records, 2 labels that are no class, 2 label "
        "gaps (classes without an image), 1 images under two identities (same bytes)\n"
    )
    assert cv2.imread(str(tmp_path / "sheet.png")).shape == ((14 + 112) * (2 + 5 + 1), 1120, 3)
    if workers == 2:
        _, error = check(damaged, "--allow", "unreadable", "gaps", "shared", expect=1)
        assert error == f"error: {damaged}: 2 labels that are no class\n"


@pytest.mark.processes
def test_sound_sets_of_every_kind(tmp_path):
    """The golden sets that MXNet wrote, one whose identity labels only its index records hold, one
    without index and property, and a folder.
    """
    (tmp_path / "plain").mkdir()
    for style in ("insightface", "plain"):
        folder = copy_set(style, tmp_path / style)
        if style == "plain":
            (folder / "train.idx").unlink()
            (folder / "property").unlink()
        output, _ = check(folder, "--workers", 1, expect=0)
        assert "30 images, 6 classes" in output and "unreadable records: 0" in output
    output, _ = check(
        write_folder(tmp_path / "faces", {"ann": 3, "bob": 1}), "--workers", 1, expect=0
    )
    assert "4 images, 2 classes" in output and "1 at least, 2 median, 2.0 mean, 3 at most" in output


@pytest.mark.processes
def test_a_cut_off_file_and_a_label_beyond_the_property_are_findings(tmp_path):
    folder = copy_set("insightface", tmp_path / "set")
    content = (folder / "train.rec").read_bytes()
    (folder / "property").write_text("4,112,112\n")
    output, error = check(folder, "--workers", 1, expect=1)
    assert "labels that are no class" in error and "label gaps" not in error
    (folder / "train.rec").write_bytes(content[: len(content) // 2])
    assert "train.rec: key 0 at offset" in check(folder, expect=1)[1], (
        "which records are images stands at the end of this layout"
    )
    folder = copy_set("plain", tmp_path / "plain")
    content = (folder / "train.rec").read_bytes()
    (folder / "train.rec").write_bytes(content[: len(content) // 2])
    output, error = check(folder, "--workers", 1, "--allow", "gaps", expect=1)
    assert "truncated" in output and error.endswith(" unreadable records\n")


@pytest.mark.processes
def test_shards_and_a_label_that_is_no_number(tmp_path):
    for number, labels in enumerate(([0, 1], [float("nan"), 1])):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_set(
            folder,
            [(label, jpeg(10 * number + at)) for at, label in enumerate(labels)],
            "2,112,112\n",
        )
        for ending in ("rec", "idx"):
            (folder / f"train.{ending}").rename(tmp_path / f"train_{number}.{ending}")
        (folder / "property").unlink()
        folder.rmdir()
    output, error = check(tmp_path, "--workers", 1, "--json", tmp_path / "check.json", expect=1)
    assert (
        "4 images, 2 classes" in output
        and ("labels that are no class: 1; the first: record train_1.rec:0 with label nan")
        in output
    )
    assert error.endswith(f"error: {tmp_path}: 1 labels that are no class\n")
    assert json.loads((tmp_path / "check.json").read_text())["labels"]["listed"] == [
        dict(record="train_1.rec:0", label=None)
    ]


@pytest.mark.processes
def test_jpegs_without_their_end_are_named(tmp_path):
    """Whether OpenCV decodes them (with a grey rest) or not; other formats have no such marker."""
    images = [jpeg(seed) for seed in range(8)]
    images[1] = images[1][: len(images[1]) * 2 // 3] + bytes(4096)
    images[3] = images[3][:-2]
    images[4] += b"behind the end"
    pixels = cv2.imdecode(np.frombuffer(images[5], np.uint8), cv2.IMREAD_COLOR)
    images[5:7] = [cv2.imencode(suffix, pixels)[1].tobytes() for suffix in (".png", ".webp")]
    folder = write_set(
        tmp_path, [(float(at % 2), image) for at, image in enumerate(images)], "2,112,112"
    )
    allowed = "--allow", "unreadable"
    _, error = check(folder, "--workers", 1, *allowed, "--json", tmp_path / "check.json", expect=1)
    assert "2 JPEGs that end early (no end marker: " in error
    cut = json.loads((tmp_path / "check.json").read_text())["cut"]
    assert [entry["record"] for entry in cut["listed"]] == [1, 3]
    check(folder, "--workers", 1, *allowed, "cut", expect=0)


@pytest.mark.parametrize(
    "options", [[], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1], [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]]
)
def test_ends_early(options):
    """At every length, of each kind of JPEG, and behind a thumbnail with an end of its own."""
    pixels = np.random.default_rng(1).integers(0, 256, (24, 24, 3), np.uint8)
    whole = cv2.imencode(".jpg", pixels, options)[1].tobytes()
    segment = b"\xff\xe1" + (len(whole) + 2).to_bytes(2, "big") + whole
    for image, thumbnail in ((whole, 0), (whole[:2] + segment + whole[2:], 2 + len(segment))):
        assert not any(ends_early(image + tail) for tail in (b"", bytes(9), b"\xff", image[:99]))
        # up to the thumbnail's own end there is no image yet, which no decoder takes for one
        lengths = range(max(thumbnail + 1, 4), len(image))
        assert all(
            ends_early(image[:end]) and ends_early(image[: end - 1] + bytes(9)) for end in lengths
        )
        assert ends_early(memoryview(image)[:-2])
    for suffix in (".png", ".webp", ".bmp"):
        assert not ends_early(cv2.imencode(suffix, pixels)[1].tobytes()[:200])


@pytest.mark.processes
def test_whatever_rec_names(tmp_path):
    """A .rec of another name, lists with commas or spaces, the words of the training scripts."""
    for name, seed in (("a", 0), ("b", 10)):
        (tmp_path / name).mkdir()
        write_set(
            tmp_path / name, [(float(at % 2), jpeg(seed + at)) for at in range(4)], "2,112,112"
        )
    a, b = tmp_path / "a", tmp_path / "b"
    for ending in ("rec", "idx"):
        (b / f"train.{ending}").rename(b / f"faces.{ending}")
    for arguments in ([a / "train.rec"], [f"rec={b / 'faces.rec'}"]):
        assert "4 images, 2 classes" in check(*arguments, "--workers", 1, expect=0)[0]
    for arguments in ([f"{a},{b / 'faces.rec'}"], [a, b / "faces.rec"]):
        output, _ = check(*arguments, "rec_labels=separate", "--workers", 1, expect=0)
        assert "8 images, 4 classes" in output and "2 at least" in output
    assert (
        "8 images, 2 classes"
        in check(f"rec={a},{b / 'faces.rec'}", "rec_labels=shared", "--workers", 1, expect=0)[0]
    )
    (b / "property").unlink()
    for arguments, message in (
        ([b], f"rec={b / 'faces.rec'}"),
        ([a, b / "faces.rec"], "set rec_labels=shared"),
        ([a, a / "train.rec"], "twice"),
        ([b / "gone.rec"], f"no record file {b / 'gone.rec'}"),
        ([a, b / "faces.rec", "rec_labels=x"], "rec_labels='x' is unknown"),
    ):
        output, error = check(*arguments, expect=1)
        assert message in error and error.count("\n") == 1 and not output


@pytest.mark.processes
def test_the_same_image_in_two_sets_of_different_people(tmp_path):
    """Its label is 0 in both, its class is not."""
    for name in "ab":
        (tmp_path / name).mkdir()
        write_set(tmp_path / name, [(0.0, jpeg(0)), (1.0, jpeg(ord(name)))], "2,112,112")
    sets = tmp_path / "a", tmp_path / "b"
    _, error = check(*sets, "rec_labels=separate", "--workers", 1, expect=1)
    assert error.endswith(": 1 images under two identities (same bytes)\n")
    check(*sets, "rec_labels=shared", "--workers", 1, expect=0)


@pytest.mark.processes
def test_what_would_train_to_nothing(tmp_path):
    for name, labels, classes, message in (
        (
            "one",
            [0.0] * 4,
            None,
            "1 class only: all labels are 0: training needs two classes or more",
        ),
        ("said", [5.0] * 4, 12, "1 class only: all labels are 5: "),
        (
            "from1",
            [1.0, 2.0, 3.0],
            3,
            "1 labels that are no class (labels run from 1 to 3; let the property file say 4",
        ),
        (
            "gap",
            [1.0, 2.0, 3.0],
            None,
            "1 label gaps (classes without an image; labels run from 1, and class 0",
        ),
    ):
        (tmp_path / name).mkdir()
        folder = write_set(
            tmp_path / name,
            [(label, jpeg(at)) for at, label in enumerate(labels)],
            f"{classes},112,112",
        )
        if classes is None:
            (folder / "property").unlink()
        assert message in check(folder, "--workers", 1, expect=1)[1]
    assert not (tmp_path / "one" / "property").exists()
    root = write_folder(tmp_path / "faces", {"ann": 3})
    assert (
        "1 class only: all images are of one identity (ann)"
        in check(root, "--workers", 1, expect=1)[1]
    )


@pytest.mark.processes
def test_identities_without_images_are_listed(tmp_path):
    root = write_folder(tmp_path / "faces", {"ann": 1, "bob": 2})
    for name in ("q1", "q2", "q3", "q4/session"):
        (root / name).mkdir(parents=True)
    (root / "q4" / "session" / "a.jpg").write_bytes(jpeg(0))
    output, error = check(root, "--workers", 1, "--json", tmp_path / "check.json", expect=1)
    assert (
        "3 images, 6 classes" in output
        and "4 identities without a readable image (the images of q4 lie in sub-folders (session)"
        in error
    )
    assert json.loads((tmp_path / "check.json").read_text())["gaps"]["listed"] == [
        "q1",
        "q2",
        "q3",
        "q4",
    ]


@pytest.mark.processes
def test_an_index_that_names_records_wrongly(tmp_path):
    folder = copy_set("plain", tmp_path)
    lines = (folder / "train.idx").read_text().splitlines()
    for changed, message in (
        (["0\t" + line.split()[1] for line in lines], "train.idx lists keys several times"),
        (
            [*lines[:29], "29\t18446744073709551615"],
            "offset 18446744073709551615 of key 29 lies beyond",
        ),
    ):
        (folder / "train.idx").write_text("\n".join(changed))
        output, error = check(folder, expect=1)
        assert message in error and error.count("\n") == 1 and not output


@pytest.mark.processes
def test_wrong_input_is_one_line(tmp_path):
    for arguments, message in (
        ([tmp_path / "none"], "no folder"),
        ([tmp_path], "it should hold one sub-folder of images per identity"),
        ([tmp_path, "--json", tmp_path / "none" / "x.json"], "--json: "),
        ([tmp_path, "--sheet", "sheet.jpg"], "sheet.jpg must end in .png"),
    ):
        output, error = check(*arguments, expect=1)
        assert (
            message in error
            and error.startswith("error: ")
            and error.count("\n") == 1
            and not output
        )
    (tmp_path / "property").write_text("3,112,112")
    assert "no record file" in check(tmp_path, expect=1)[1]


def test_groups_and_sizes_against_plain_counting():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 400, 1000)
    digests = np.array([np.void(int(value).to_bytes(16, "big")) for value in values])
    chosen = np.flatnonzero(rng.random(1000) < 0.9)
    expected = {}
    for index in chosen:
        expected.setdefault(values[index], []).append(int(index))
    expected = sorted(group for group in expected.values() if len(group) > 1)
    assert [group.tolist() for group in group_equal(digests, chosen)] == expected
    assert group_equal(digests, chosen[:1]) == []
    sizes = describe_sizes(np.array([0, 1, 1, 2, 4, 5, 1000, 999, 7000]))
    assert sizes["histogram"] == {
        "1": 2,
        "2-4": 2,
        "5-9": 1,
        "500-999": 1,
        "1000 and more": 2,
    } and (sizes["least"], sizes["most"], sizes["largest_class"]) == (1, 7000, 8)
    assert describe_sizes(np.zeros(3, int)) == dict(classes=0)
