"""data/make_rec.py as people call it: from the command line."""

import csv
import os
import pickle
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest

from data.pair_list import read_pairs
from tests.dataset.test_dataset import jpeg, write_folder
from tests.recordio.test_recordio import ROOT
from utils.dataset.folder import FaceDatasetFolder
from utils.dataset.records import MXFaceDataset
from utils.errors import InputError


def make_rec(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, ROOT / "data" / "make_rec.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


@pytest.fixture
def faces(tmp_path):
    return write_folder(tmp_path / "faces", {"ann": 3, "bob x": 1, "cid": 4})


def assert_fails(result, message, folder):
    """One clear line, exit status 1, and nothing in ``folder`` but what was there."""
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert set(os.listdir(folder)) <= {"faces", "pairs.txt"}


@pytest.mark.processes
def test_folder_and_its_records_are_the_same_set(faces, tmp_path):
    result = make_rec(
        "--images", "faces", "--output", "out", "--layout", "insightface", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "8 images of 3 identities" in result.stdout
    assert sorted(os.listdir(tmp_path / "out")) == [
        "property",
        "train.idx",
        "train.lst",
        "train.rec",
    ]
    folder, records = FaceDatasetFolder(faces), MXFaceDataset(tmp_path / "out")
    assert len(folder) == len(records) == 8 and folder.num_classes == records.num_classes == 3
    for index in range(8):
        (left, left_label), (right, right_label) = folder[index], records[index]
        assert np.array_equal(left, right) and left_label == right_label


@pytest.mark.processes
def test_plain_layout_is_shuffled_by_seed(faces, tmp_path):
    common = "--images", faces, "--output"  # plain and shuffled is the default
    for name, arguments in {
        "a": (),
        "b": (),
        "other": ("--seed", 1),
        "sorted": ("--no-shuffle",),
    }.items():
        assert make_rec(*common, tmp_path / name, *arguments).returncode == 0
    lists = {
        name: (tmp_path / name / "train.lst").read_text() for name in ("a", "b", "other", "sorted")
    }
    assert lists["a"] == lists["b"] and len(set(lists.values())) == 3
    folder, records = FaceDatasetFolder(faces), MXFaceDataset(tmp_path / "a")
    position = {folder.name_of(index): index for index in range(8)}
    for line in lists["a"].splitlines():
        key, label, path = line.split("\t")
        image, record_label = records[int(key)]
        assert (
            np.array_equal(image, folder[position[path]][0])
            and record_label == int(label) == folder[position[path]][1]
        )
    assert [line.split("\t")[2] for line in lists["sorted"].splitlines()] == sorted(position)


@pytest.mark.processes
def test_other_formats_are_encoded_and_other_sizes_refused(tmp_path):
    folder = tmp_path / "faces" / "ann"
    folder.mkdir(parents=True)
    smooth = cv2.resize(
        np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8),
        (112, 112),
        interpolation=cv2.INTER_CUBIC,
    )
    cv2.imwrite(str(folder / "a.png"), smooth)
    write_folder(tmp_path / "faces", {"bob": 1})
    images = "--images", tmp_path / "faces", "--no-shuffle"
    assert make_rec(*images, "--output", tmp_path / "out").returncode == 0
    stored, _ = MXFaceDataset(tmp_path / "out")[0]
    assert np.abs(stored[..., ::-1].astype(int) - smooth).mean() < 2
    (folder / "b.jpg").write_bytes(jpeg(0, size=(100, 120)))
    common = "--images", tmp_path / "faces", "--output", tmp_path / "new"
    result = make_rec(*common)
    assert result.returncode == 1 and "b.jpg is 100x120, not 112x112" in result.stderr
    assert not (tmp_path / "new").exists()
    assert make_rec(*common, "--resize").returncode == 0
    records = MXFaceDataset(tmp_path / "new")
    assert len(records) == 3
    # once for all what training does with the folder
    (tmp_path / "faces" / "ann" / "a.png").unlink()
    cv2.imwrite(str(folder / "b.png"), cv2.resize(smooth, (64, 64)))
    (folder / "b.jpg").unlink()
    assert make_rec(*common, "--resize", "--quality", "100", "--no-shuffle").returncode == 0
    stored, _ = MXFaceDataset(tmp_path / "new")[0]
    resized, _ = FaceDatasetFolder(tmp_path / "faces")[0]
    assert np.abs(stored.astype(int) - resized).mean() < 1


@pytest.mark.processes
@pytest.mark.parametrize("layout", ["insightface", "plain"])
def test_unreadable_image(layout, faces, tmp_path):
    (faces / "cid" / "02.jpg").write_bytes(jpeg(0)[:200])
    result = make_rec("--images", faces, "--output", tmp_path / "out", "--layout", layout)
    assert_fails(result, f"cannot read the image {faces}/cid/02.jpg", tmp_path)


@pytest.mark.processes
def test_jpegs_that_end_early(faces, tmp_path):
    """Zeros in place of the rest, as damaged disks give: decoders fill it with grey."""
    whole = (faces / "cid" / "02.jpg").read_bytes()
    (faces / "cid" / "02.jpg").write_bytes(whole[: len(whole) * 2 // 3] + bytes(4096))
    (faces / "cid" / "03.jpg").write_bytes(whole + b"what some cameras write behind it")
    result = make_rec("--images", faces, "--output", tmp_path / "out")
    message = (
        f"cannot read the image {faces}/cid/02.jpg: the JPEG ends early (no end marker); --skip-bad"
    )
    assert_fails(result, message, tmp_path)


@pytest.mark.processes
@pytest.mark.parametrize("layout", ["insightface", "plain"])
def test_skip_bad_leaves_unreadable_files_out_and_lists_them(layout, faces, tmp_path):
    (faces / "ann" / "01.jpg").write_bytes(b"junk")
    (faces / "cid" / "00.jpg").write_bytes(jpeg(0)[:-2])
    (faces / "bob x" / "00.jpg").write_bytes(b"")
    command = "--images", faces, "--output", tmp_path / "out", "--layout", layout, "--skip-bad"
    result = make_rec(*command)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(
        "5 images of 2 identities, read back and equal; 3 bad files left out\n"
    )
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == [
        f"cannot read the image {faces}/ann/01.jpg",
        f"cannot read the image {faces}/bob x/00.jpg",
        "identity bob x, all images of it",
        f"cannot read the image {faces}/cid/00.jpg",
    ]
    records = MXFaceDataset(tmp_path / "out")
    assert records.num_classes == 2 and sorted(records.labels(range(5))) == [0, 0, 1, 1, 1]
    listed = (tmp_path / "out" / "train.lst").read_text()
    assert (
        "cid/01.jpg" in listed
        and "01.jpg" not in listed.replace("cid/01.jpg", "")
        and "bob" not in listed
    )
    (faces / "cid" / "01.jpg").write_bytes(jpeg(0, size=(100, 120)))
    result = make_rec(*command[:3], tmp_path / "new", *command[4:])
    assert result.returncode == 1 and "01.jpg is 100x120, not 112x112" in result.stderr


@pytest.mark.processes
def test_folders_that_are_no_training_set(faces, tmp_path):
    for name in ("ann", "cid"):
        for path in (faces / name).iterdir():
            path.write_bytes(b"junk")
    common = "--images", faces, "--output", tmp_path / "out"
    result = make_rec(*common, "--skip-bad")
    assert result.returncode == 1 and "error: " in result.stderr
    assert "has images of one identity only: training needs two or more" in result.stderr
    (faces / "bob x" / "00.jpg").write_bytes(b"junk")
    assert "not one image can be read" in make_rec(*common, "--skip-bad").stderr
    assert not (tmp_path / "out").exists()
    pairs = make_rec(*common, "--pairs", tmp_path / "pairs.txt", "--skip-bad")
    assert_fails(pairs, "--skip-bad is for records", tmp_path)


@pytest.mark.processes
def test_wrong_arguments(faces, tmp_path):
    assert_fails(
        make_rec("--images", tmp_path / "none", "--output", tmp_path / "out"),
        f"no folder {tmp_path}/none",
        tmp_path,
    )
    assert_fails(
        make_rec(
            "--images", faces, "--output", tmp_path / "out", "--layout", "insightface", "--shuffle"
        ),
        "--layout plain",
        tmp_path,
    )
    assert_fails(
        make_rec("--images", faces, "--output", tmp_path / "out", "--quality", 0),
        "--quality",
        tmp_path,
    )


@pytest.mark.processes
def test_failure_keeps_the_set_that_was_there(faces, tmp_path):
    assert make_rec("--images", faces, "--output", tmp_path / "out").returncode == 0
    before = (tmp_path / "out" / "train.rec").read_bytes()
    (faces / "dan").mkdir()
    (faces / "dan" / "0.jpg").write_bytes(b"junk")
    assert make_rec("--images", faces, "--output", tmp_path / "out").returncode == 1
    assert (tmp_path / "out" / "train.rec").read_bytes() == before
    (faces / "dan" / "0.jpg").write_bytes(jpeg(9))
    assert make_rec("--images", faces, "--output", tmp_path / "out").returncode == 0
    assert MXFaceDataset(tmp_path / "out").num_classes == 4
    assert sorted(os.listdir(tmp_path / "out")) == [
        "property",
        "train.idx",
        "train.lst",
        "train.rec",
    ]


@pytest.mark.processes
def test_pairs(faces, tmp_path):
    (tmp_path / "pairs.txt").write_text(
        "# path path same\nann/00.jpg ann/01.jpg 1\n\nbob "
        "x/00.jpg\tcid/03.jpg\t0\nann/00.jpg cid/00.jpg 0\n"
    )
    result = make_rec(
        "--pairs", tmp_path / "pairs.txt", "--images", faces, "--output", tmp_path / "lfw.bin"
    )
    assert result.returncode == 0, result.stderr
    images, same = pickle.loads((tmp_path / "lfw.bin").read_bytes())
    paths = ("ann/00.jpg", "ann/01.jpg", "bob x/00.jpg", "cid/03.jpg", "ann/00.jpg", "cid/00.jpg")
    assert images == [(faces / path).read_bytes() for path in paths] and same == [
        True,
        False,
        False,
    ]


UTF16 = "\ufeffann/00.jpg ann/01.jpg 1\r\nann/00.jpg cid/00.jpg 0\r\n".encode("utf-16-le")


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfann/00.jpg ann/01.jpg 1\r\nann/00.jpg cid/00.jpg 0\r\n",
        b"\xef\xbb\xbf# with a remark\nann/00.jpg ann/01.jpg 1\nann/00.jpg cid/00.jpg 0",
        UTF16,
    ],
)
def test_pairs_as_windows_saves_them(faces, tmp_path, content):
    (tmp_path / "pairs.txt").write_bytes(content)
    assert [pair[:3] for pair in read_pairs([tmp_path / "pairs.txt"], faces)] == [
        ("ann/00.jpg", "ann/01.jpg", True),
        ("ann/00.jpg", "cid/00.jpg", False),
    ]


def test_damaged_utf16_is_one_line(faces, tmp_path):
    (tmp_path / "pairs.txt").write_bytes(UTF16[:-1])
    with pytest.raises(InputError, match=r"pairs\.txt begins as UTF-16 text and is not"):
        read_pairs([tmp_path / "pairs.txt"], faces)


@pytest.mark.processes
@pytest.mark.parametrize("same", [0, 1])
def test_pairs_of_one_kind_are_not_packed(faces, tmp_path, same):
    (tmp_path / "pairs.txt").write_text(f"ann/00.jpg ann/01.jpg {same}\n" * 12)
    result = make_rec(
        "--pairs", tmp_path / "pairs.txt", "--images", faces, "--output", tmp_path / "lfw.bin"
    )
    assert_fails(
        result, f"all 12 pairs are of {'the same person' if same else 'different people'}", tmp_path
    )


# --- LFW's own lists


@pytest.fixture
def lfw(tmp_path):
    """Six people with three photographs each, named as LFW's are; of one of them PNG files."""
    for person in range(6):
        folder = tmp_path / "faces" / f"Name_{person}"
        folder.mkdir(parents=True)
        for number in (1, 2, 3):
            encoded = jpeg(10 * person + number)
            suffix = ".png" if person == 5 else ".jpg"
            if person == 5:
                encoded = cv2.imencode(".png", cv2.imdecode(np.frombuffer(encoded, np.uint8), 1))[
                    1
                ].tobytes()
            (folder / f"Name_{person}_{number:04d}{suffix}").write_bytes(encoded)
    return tmp_path / "faces"


def lfw_folds(folds: int, pairs: int) -> tuple[list[str], list[tuple[str, str, bool]]]:
    """Lines of LFW's list below its first, and the pairs that they are."""
    lines, expected = [], []
    path = "Name_{0}/Name_{0}_{1:04d}.jpg".format
    for fold in range(folds):
        for number in range(pairs):
            person = (fold + number) % 5
            lines.append(f"Name_{person}\t1\t{2 + number % 2}")
            expected.append((path(person, 1), path(person, 2 + number % 2), True))
        for number in range(pairs):
            first, second = (fold + number) % 5, (fold + number + 1) % 5
            lines.append(f"Name_{first}\t3\tName_{second}\t{1 + number % 3}")
            expected.append((path(first, 3), path(second, 1 + number % 3), False))
    return lines, expected


@pytest.mark.processes
@pytest.mark.parametrize(
    "header, folds, pairs, ends",
    [
        ("10\t3", 10, 3, "\n"),
        ("10 3", 10, 3, "\r\n"),
        ("7", 1, 7, "\n"),
        ("\ufeff2\t4", 2, 4, "\r\n"),
    ],
)
def test_lfws_own_lists_keep_their_order(lfw, tmp_path, header, folds, pairs, ends):
    lines, expected = lfw_folds(folds, pairs)
    (tmp_path / "pairs.txt").write_bytes((ends.join([header, *lines]) + ends).encode())
    result = make_rec(
        "--pairs", tmp_path / "pairs.txt", "--images", lfw, "--output", tmp_path / "lfw.bin"
    )
    assert result.returncode == 0, result.stderr
    images, same = pickle.loads((tmp_path / "lfw.bin").read_bytes())
    assert same == [pair[2] for pair in expected]
    assert images == [(lfw / path).read_bytes() for pair in expected for path in pair[:2]]
    with open(tmp_path / "lfw.names.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["first", "second"],
            *map(list, (p[:2] for p in expected)),
        ]
    assert not (tmp_path / "lfw.groups.csv").exists()
    # so that InsightFace's contiguous folds are those of the list
    for part in np.split(np.array(same), folds):
        assert part.sum() == pairs == len(part) // 2


def test_lfws_lists_find_other_suffixes(lfw, tmp_path):
    (tmp_path / "pairs.txt").write_text("1\nName_5\t1\t3\nName_5\t2\tName_0\t1\n")
    images = shutil.copytree(lfw, tmp_path / "large")
    (images / "Name_0/Name_0_0001.jpg").rename(images / "Name_0/Name_0_0001.JPG")
    assert read_pairs([tmp_path / "pairs.txt"], images)[1][1] == "Name_0/Name_0_0001.JPG"
    assert [pair[:3] for pair in read_pairs([tmp_path / "pairs.txt"], lfw)] == [
        ("Name_5/Name_5_0001.png", "Name_5/Name_5_0003.png", True),
        ("Name_5/Name_5_0002.png", "Name_0/Name_0_0001.jpg", False),
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "10 1\nName_0 1 2\nName_0 1 Name_1 1\n",
            r"first line, '10 1', says 10 pairs .* there are 1 "
            r"and 1",
        ),
        (
            "1\nName_0 1 2\nName_0 1 Name_0 2\n",
            "line 3: two images of Name_0 as a pair of different people",
        ),
        ("1\nName_0 1 2\nName_0 1\n", "line 3: expected 'name n1 n2' or 'name1 n1 name2 n2'"),
        ("1\nName_0 1 2\nName_0\n", "line 3: expected 'name n1 n2' or 'name1 n1 name2 n2'"),
        ("1\nName_0 one 2\nName_0 1 Name_1 1\n", "line 2: expected 'name n1 n2'"),
        (
            "1\nName_0 1 9\nName_0 1 Name_1 1\n",
            r"line 2: no image .*Name_0_0009\.jpg, nor with .*\.png",
        ),
        (
            "Name_0 one Name_1 1\n",
            r"line 1: expected 'path1 path2 0\|1'.* begin with a line such as '10 "
            r"300'",
        ),
    ],
)
def test_wrong_lines_of_lfws_lists(lfw, tmp_path, text, message):
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        read_pairs([tmp_path / "pairs.txt"], lfw)


@pytest.fixture
def rfw(tmp_path):
    """Two groups of four people with two photographs each, and their lists as RFW publishes them:
    tabs, no first line, ten folds in each of which two pairs of one person come first.
    """
    lines = {}
    for group in ("African", "Asian"):
        for person in range(4):
            folder = tmp_path / "faces" / group / f"m.{group[:2]}{person}"
            folder.mkdir(parents=True)
            for number in (1, 2):
                (folder / f"{folder.name}_{number:04d}.jpg").write_bytes(
                    jpeg(len(group) * 100 + 10 * person + number)
                )
        names = [f"m.{group[:2]}{person}" for person in range(4)]
        lines[group] = []
        for fold in range(10):
            lines[group] += [f"{names[(fold + i) % 4]}\t1\t2" for i in range(2)]
            lines[group] += [
                f"{names[(fold + i) % 4]}\t1\t{names[(fold + i + 1) % 4]}\t2" for i in range(2)
            ]
        (tmp_path / f"{group}_pairs.txt").write_text("\n".join(lines[group]) + "\n")
    return tmp_path


@pytest.mark.processes
def test_rfws_lists_become_one_set_with_groups(rfw):
    lists = [rfw / "African_pairs.txt", rfw / "Asian_pairs.txt"]
    common = "--images", rfw / "faces", "--output", rfw / "rfw.bin"
    result = make_rec("--pairs", *lists, *common)
    assert result.returncode == 0, result.stderr
    images, same = pickle.loads((rfw / "rfw.bin").read_bytes())
    # every fold has that of each list, in its order
    assert same == [True, True, False, False] * 20
    with open(rfw / "rfw.names.csv", newline="") as file:
        header, *names = csv.reader(file)
    assert header == ["first", "second"]
    assert images == [(rfw / "faces" / name).read_bytes() for row in names for name in row]
    assert names[:5:2] == [
        ["African/m.Af0/m.Af0_0001.jpg", "African/m.Af0/m.Af0_0002.jpg"],
        ["African/m.Af0/m.Af0_0001.jpg", "African/m.Af1/m.Af1_0002.jpg"],
        ["Asian/m.As0/m.As0_0001.jpg", "Asian/m.As0/m.As0_0002.jpg"],
    ]
    assert [row[0].split("/")[0] for row in names] == (["African"] * 4 + ["Asian"] * 4) * 10
    with open(rfw / "rfw.groups.csv", newline="") as file:
        header, *groups = csv.reader(file)
    assert header == ["name", "group"] and len(groups) == 8
    assert all(name.startswith(f"{group}/m.") for name, group in groups)
    # a list alone, with the people right in the folder: no group
    alone = make_rec("--pairs", lists[0], "--images", rfw / "faces/African", *common[2:])
    assert alone.returncode == 0, alone.stderr
    assert pickle.loads((rfw / "rfw.bin").read_bytes())[1] == same[:40]
    assert not (rfw / "rfw.groups.csv").exists()


def test_rfws_people_must_be_found(rfw):
    with pytest.raises(InputError, match="m.Af0, the first person of the list, has no folder"):
        read_pairs([rfw / "African_pairs.txt"], rfw / "faces" / "Asian")
    (rfw / "faces" / "Indian" / "m.Af0").mkdir(parents=True)
    with pytest.raises(InputError, match=r"2 of its sub-folders have one \(African, Indian\)"):
        read_pairs([rfw / "African_pairs.txt"], rfw / "faces")
    (rfw / "faces" / "Asian" / "m.As2" / "m.As2_0002.jpg").unlink()
    with pytest.raises(InputError, match=r"Asian_pairs.txt, line \d+: no image .*m.As2_0002.jpg"):
        read_pairs([rfw / "Asian_pairs.txt"], rfw / "faces")


@pytest.mark.processes
def test_wrong_pairs(faces, tmp_path):
    pairs = tmp_path / "pairs.txt"
    common = "--pairs", pairs, "--images", faces, "--output", tmp_path / "lfw.bin"
    assert_fails(make_rec(*common), f"no pair list {pairs}", tmp_path)
    pairs.write_text("ann/00.jpg ann/01.jpg 1\nann/00.jpg cid/09.jpg 0\n")
    assert_fails(
        make_rec(*common), f"cannot read the image {faces}/cid/09.jpg: No such file", tmp_path
    )
    pairs.write_text("ann/00.jpg ann/01.jpg yes\n")
    assert_fails(make_rec(*common), "line 1: expected 'path1 path2 0|1'", tmp_path)
