"""data/align_faces.py: crops against those that the photographs were made of, what is dropped and
why, and the way on to make_rec.py.
"""

import csv
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

from data import align_faces
from tests.commands import ROOT, environment, run
from tests.saved_sets import encode, smooth
from tests.yunet import POINTS, advised, photograph, write_detector
from utils.dataset.records import MXFaceDataset
from utils.errors import InputError
from utils.images import decode_bgr

SCRIPT = ROOT / "data" / "align_faces.py"
CROPS = [crop // 2 + 40 for crop in smooth(4)]
HEADER = ",".join(align_faces.COLUMNS)


@pytest.fixture
def photos(tmp_path):
    """Two people with usable photographs, one without, and everything that can be wrong with a
    file.
    """
    folder = tmp_path / "photos"
    pictures = {
        "ann/a.jpg": photograph(CROPS[:1], [(160, 160)]),
        "ann/a.png": photograph(CROPS[1:2], [(320, 160)]),
        "ann/two.png": photograph(CROPS[:2], [(160, 160), (480, 160)]),
        "bob x/b.png": photograph(CROPS[2:3], [(400, 160)]),
        "bob x/none.png": photograph([], []),
        "bob x/faint.png": photograph(CROPS[:1], [(160, 160)], blue=200),
        "cid/none.png": photograph([], []),
    }
    for name, picture in pictures.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture, path.suffix))
    (folder / "ann" / "broken.jpg").write_text("no image")
    (folder / "ann" / "notes.txt").write_text("no image")
    (folder / "ann" / "dir.jpg").mkdir()
    (folder / "loose.png").write_bytes(encode(photograph(CROPS[:1], [(160, 160)])))
    return folder


def report(folder) -> dict:
    return {
        row["photo"]: (row["crop"], row["reason"])
        for row in csv.DictReader((folder / "report.csv").open())
    }


def main(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["align_faces.py", *map(str, arguments)])
    align_faces.main()


@pytest.mark.processes
def test_with_a_detector_in_two_processes_and_on_to_records(photos, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed (requirements/onnx.txt)")
    output = run(
        SCRIPT,
        "--photos",
        photos,
        "--output",
        tmp_path / "faces",
        "--detector",
        write_detector(tmp_path / "yunet.onnx"),
        "--png",
        "--workers",
        2,
    )
    assert report(tmp_path / "faces") == {
        "ann/a.jpg": ("ann/a.png", ""),
        "ann/a.png": ("ann/a.png.png", ""),
        "ann/broken.jpg": ("", "unreadable"),
        "ann/dir.jpg": ("", "unreadable"),
        "ann/notes.txt": ("", "not an image"),
        "ann/two.png": ("", "several faces"),
        "bob x/b.png": ("bob x/b.png", ""),
        "bob x/faint.png": ("", "low score"),
        "bob x/none.png": ("", "no face"),
        "cid/none.png": ("", "no face"),
        "loose.png": ("", "no person"),
    }
    assert (
        "3 crops of 2 people from 11 files of 3\n" in output and "nothing left of cid\n" in output
    )
    assert (
        "dropped: 2 unreadable, 2 no face, 1 not an image, 1 several faces, 1 low score, 1 no "
        "person\n"
    ) in output
    for name, expected in (
        ("ann/a.png", CROPS[0]),
        ("ann/a.png.png", CROPS[1]),
        ("bob x/b.png", CROPS[2]),
    ):
        crop = cv2.cvtColor(decode_bgr((tmp_path / "faces" / name).read_bytes()), cv2.COLOR_BGR2RGB)
        assert crop.shape == (112, 112, 3) and np.abs(crop.astype(int) - expected).mean() < (
            6 if name == "ann/a.png" else 1
        ), "a.jpg lost more"
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "faces", "yunet.onnx"}
    run(ROOT / "data" / "make_rec.py", "--images", tmp_path / "faces", "--output", tmp_path / "rec")
    assert len(MXFaceDataset(str(tmp_path / "rec"))) == 3


def test_with_points_from_elsewhere(photos, tmp_path, monkeypatch, capsys):
    """The same points as the detector's, of several faces the largest, and limits of score and
    size.
    """

    def line(photo, place, scale=1.0, score=""):
        return ",".join(
            [photo, *(f"{value:.3f}" for value in (POINTS * scale + place).ravel()), str(score)]
        )

    points = tmp_path / "points.csv"
    points.write_text(
        "\n".join(
            [
                HEADER + ",score",
                line("ann/a.jpg", (160, 160), score=0.99),
                line("ann/two.png", (480, 160)),
                line("ann/two.png", (160, 160), 0.5),
                line("bob x/b.png", (400, 160), score=0.3),
                line("bob x/none.png", (300, 160), 0.1),
                line("cid/none.png", (0, 0), 0),
                line("nobody/x.png", (0, 0)),
                line("ann/a.png", (5000, 160)),
            ]
        )
    )
    main(
        monkeypatch,
        "--photos",
        photos,
        "--output",
        tmp_path / "faces",
        "--points",
        points,
        "--several",
        "largest",
        "--workers",
        1,
        "--quality",
        100,
    )
    reported = report(tmp_path / "faces")
    assert {photo: outcome for photo, outcome in reported.items() if outcome[0]} == {
        "ann/a.jpg": ("ann/a.jpg", ""),
        "ann/two.png": ("ann/two.jpg", ""),
    }
    assert (
        reported["bob x/b.png"][1],
        reported["bob x/none.png"][1],
        reported["cid/none.png"][1],
        reported["ann/a.png"][1],
    ) == ("low score", "too small", "unusable points", "unusable points")
    crop = cv2.cvtColor(
        decode_bgr((tmp_path / "faces" / "ann" / "two.jpg").read_bytes()), cv2.COLOR_BGR2RGB
    )
    assert np.abs(crop.astype(int) - CROPS[1]).mean() < 3
    output = capsys.readouterr().out
    assert (
        "2 crops of 1 people" in output
        and ("points of 1 files that are not there, the first: nobody/x.png\n") in output
    )
    assert "outside the photograph of 640x320" in (tmp_path / "faces" / "report.csv").read_text()


def test_wrong_input_is_one_line_and_leaves_nothing(photos, tmp_path, monkeypatch):
    points = tmp_path / "points.csv"
    there = {"photos", "points.csv", "faces"}
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "old.jpg").write_text("")

    def refuses(message, text, *arguments, output=tmp_path / "new"):
        points.write_text(text)
        with pytest.raises(InputError, match=message) as caught:
            main(
                monkeypatch,
                "--photos",
                photos,
                "--output",
                output,
                "--points",
                points,
                "--workers",
                1,
                *arguments,
            )
        assert "\n" not in str(caught.value) and {path.name for path in tmp_path.iterdir()} == there

    good = HEADER + "\nann/a.jpg" + ",1,2,30,2,15,20,5,40,25,40"
    refuses("no column y5: its first line must be photo,x1,y1", HEADER.removesuffix(",y5"))
    refuses("line 3: ten numbers are needed for 'bob x/b.png'", good + "\nbob x/b.png,1,2,3")
    refuses("lists no photograph", HEADER)
    refuses(
        "none of its photographs .*zoe/1.png, .* is in",
        HEADER + "\nzoe/1.png,1,2,30,2,15,20,5,40,25,40",
    )
    refuses("is there and not an empty folder", good, output=tmp_path / "faces")
    refuses(
        r"none of 11 files in .* could be used \(6 no face, 2 unreadable, .*\); the first: "
        r"ann/a.jpg: too small",
        good,
        "--min-size",
        "500",
    )
    refuses("--quality is 1 ... 100", good, "--quality", "0")
    for arguments, message in (
        (["--photos", tmp_path / "none"], "--photos: no folder"),
        (["--photos", tmp_path / "faces"], "no photographs in the sub-folders"),
    ):
        with pytest.raises(InputError, match=message):
            main(monkeypatch, "--output", tmp_path / "new", "--points", points, *arguments)


@pytest.mark.parametrize(
    "encode_text",
    [lambda text: b"\xef\xbb\xbf" + text.encode(), lambda text: text.encode("utf-16")],
)
def test_points_as_windows_saves_them(tmp_path, encode_text):
    rows = [
        HEADER,
        "ann/a.jpg" + ",1,2,30,2,15,20,5,40,25,40",
        "bob x/b.png" + ",1,2,30,2,15,20,5,40,25,40",
    ]
    (tmp_path / "points.csv").write_bytes(encode_text("\r\n".join(rows)))
    assert list(align_faces.read_points(tmp_path / "points.csv")) == ["ann/a.jpg", "bob x/b.png"]


@pytest.mark.processes
def test_a_missing_detector_is_one_line(photos, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            "--photos",
            str(photos),
            "--output",
            "new",
            "--detector",
            "none.onnx",
        ],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
    )
    assert (
        done.returncode == 1
        and not done.stdout
        and done.stderr.count("\n") == 1
        and os.listdir(tmp_path) == ["photos"]
    )
    assert done.stderr.startswith(
        f"error: --detector: no file {tmp_path}/none.onnx: fetch "
        f"{advised()} from https://github.com/opencv/opencv_zoo/"
    )
