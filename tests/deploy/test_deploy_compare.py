"""deploy/compare_faces.py: cosines, decisions and searches against features computed by hand, with
a detector of YuNet's form; thresholds of a report; what is refused.
"""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from backbones import build_backbone
from deploy import compare_faces
from deploy.gallery import FaceReader
from deploy.model import embed_faces, load_model
from eval.report.html_report import PairExhibit
from eval.report.thresholds import read_threshold, threshold_at, write_thresholds
from eval.roc import roc_curve
from tests import rounding
from tests.backbones.test_backbones import fill
from tests.commands import ROOT, environment
from tests.rounding import printed
from tests.saved_sets import encode, smooth
from tests.warm_python import python
from tests.yunet import advised, photograph, write_detector
from utils import detect
from utils.align import align
from utils.detect import Detector, Face, choose
from utils.errors import InputError
from utils.inputs import to_input
from utils.weights.read import sha256

pytest.importorskip("onnx", reason="onnx is not installed (requirements/onnx.txt)")
pytestmark = pytest.mark.usefixtures("one_thread")

CROPS = [crop // 2 + 40 for crop in smooth(5)]

# A cosine of two features of mobilefacenet, printed with four digits.
PRINTED = 0.5e-4 + 2 * rounding.network(layers=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a detector, aligned crops 0.png ... and photographs of one, two and no faces."""
    folder = tmp_path_factory.mktemp("compare")
    network = build_backbone("mobilefacenet", 16)
    fill.fill_state_dict(network)
    # BatchNorm's statistics become those of the crops, so that faces differ in all layers. Taking
    # the features' common part away at the end would do as well, but what is left of them is a
    # thousandth, and rounding a thousand times as large.
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        network.train()(to_input(torch.from_numpy(np.stack(CROPS))))
    torch.save(network.state_dict(), folder / "7backbone.pth")
    write_detector(folder / "yunet.onnx")
    for number, crop in enumerate(CROPS):
        (folder / f"{number}.png").write_bytes(encode(crop))
    pictures = {
        "one": photograph(CROPS[:1], [(160, 160)]),
        "again": photograph(CROPS[:1], [(480, 152)]),
        "other": photograph(CROPS[1:2], [(320, 160)]),
        "two": photograph(CROPS[:2], [(480, 160), (160, 160)]),
        "none": photograph([], []),
        "faint": photograph(CROPS[:1], [(160, 160)], blue=200),
    }
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(encode(picture))
    (folder / "text.jpg").write_text("no image")
    return folder


def features(folder, crops) -> np.ndarray:
    """By hand: image and mirror image added, unit length."""
    network = build_backbone("mobilefacenet", 16).eval()
    network.load_state_dict(torch.load(folder / "7backbone.pth"))
    x = to_input(torch.from_numpy(np.stack(crops)))
    with torch.inference_mode():
        found = (network(x) + network(x.flip(-1))).numpy().astype(np.float64)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def compare(monkeypatch, capsys, folder, *arguments) -> str:
    """What the command prints, run in this process."""
    monkeypatch.setattr(
        sys,
        "argv",
        ["compare_faces.py", "--model", str(folder / "7backbone.pth"), *map(str, arguments)],
    )
    compare_faces.main()
    return capsys.readouterr().out


def test_aligned_crops(folder, monkeypatch, capsys):
    cosine = float(np.prod(features(folder, CROPS[:2]), axis=0).sum())
    arguments = folder / "0.png", folder / "1.png", "--aligned"
    for threshold, decision in (
        (cosine - 0.001, "the same person"),
        (cosine + 0.001, "different people"),
    ):
        output = compare(monkeypatch, capsys, folder, *arguments, "--threshold", threshold)
        assert printed(output, "cosine") == pytest.approx(cosine, abs=PRINTED)
        assert f": {decision}\n" in output and f"threshold {threshold:.4f}, as given" in output
    output = compare(monkeypatch, capsys, folder, *arguments)
    assert printed(output, "cosine") == pytest.approx(cosine, abs=PRINTED)
    assert re.search(r"cosine \S+\nno decision", output)


@pytest.mark.processes
def test_photographs_are_detected_and_aligned(folder, monkeypatch, capsys):
    """As a process: the same face at two places of two photographs."""
    done = subprocess.run(
        [
            python(),
            str(ROOT / "deploy" / "compare_faces.py"),
            "one.png",
            "again.png",
            "--model",
            "7backbone.pth",
            "--detector",
            "yunet.onnx",
            "--threshold",
            "0.9",
        ],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=folder,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == [
        "one.png: face of 100x100 at (110, 110), score 1.00",
        "again.png: face of 100x100 at (430, 102), score 1.00",
    ]
    assert printed(lines[2], "cosine") > 0.98 and lines[2].endswith(": the same person")
    read = FaceReader(Detector(folder / "yunet.onnx"), "only", 0.8)
    assert np.abs(read(folder / "one.png").astype(int) - CROPS[0]).mean() < 1


def test_several_faces_are_chosen_among(folder):
    detector = Detector(folder / "yunet.onnx")
    path = folder / "two.png"
    with pytest.raises(
        InputError,
        match=r"two.png: several faces: 2, from left to right 100x100 "
        r"at \(110, 110\), score 1.00; 100x100 at \(430, 110\), score 1.00; choose one with --face",
    ):
        FaceReader(detector, "only", 0.8)(path)
    for which, crop in (("1", CROPS[1]), ("2", CROPS[0])):
        assert np.abs(FaceReader(detector, which, 0.8)(path).astype(int) - crop).mean() < 1
    assert (
        np.abs(FaceReader(detector, "2", 0.8)(folder / "one.png").astype(int) - CROPS[0]).mean() < 1
    ), "with one face there is nothing to choose"
    with pytest.raises(InputError, match="several faces: 2"):
        FaceReader(detector, "3", 0.8)(path)


@pytest.mark.parametrize(
    "version, first, second",
    [
        ("4.11.0", "face_detection_yunet_2023mar.onnx", "face_detection_yunet_2026may.onnx"),
        ("5.0.0", "face_detection_yunet_2026may.onnx", "face_detection_yunet_2023mar.onnx"),
        ("10.1.0", "face_detection_yunet_2026may.onnx", "face_detection_yunet_2023mar.onnx"),
    ],
)
def test_either_file_of_yunet_is_found_the_recommended_one_first(
    tmp_path, monkeypatch, version, first, second
):
    monkeypatch.setattr(detect.cv2, "__version__", version)
    monkeypatch.setattr(detect, "FOLDER", tmp_path)
    with pytest.raises(
        InputError,
        match=rf"no file {re.escape(str(tmp_path / first))}: fetch "
        rf"{first} \(for OpenCV {version}; {second} works, too\)",
    ):
        Detector()
    for name in (second, first):
        write_detector(tmp_path / name)
        assert Detector().path == tmp_path / name


def test_a_photograph_is_shrunk_for_the_detector_and_aligned_at_full_size(folder):
    large = np.kron(photograph(CROPS[:1], [(160, 160)]), np.ones((3, 3, 1), np.uint8))
    (face,) = Detector(folder / "yunet.onnx", 640)(large)
    np.testing.assert_allclose(face.box, (330, 330, 300, 300), atol=1)
    assert face.size == pytest.approx(112 * 2 * 3, rel=1e-3)
    assert np.abs(align(large, face.points).astype(int) - CROPS[0]).mean() < 2


def test_the_largest_face_and_those_that_do_not_count():
    template = np.array([[38.3, 51.7], [73.5, 51.5], [56, 71.7], [41.5, 92.4], [70.7, 92.2]])
    small, large = (
        Face((0, 0, 9, 9), template * scale, score) for scale, score in ((0.5, 0.95), (2, 0.85))
    )
    assert (
        choose([small, large], "largest") is large
        and choose([small, large], min_score=0.9) is small
        and choose([small, large], min_size=100) is large
    )
    for faces, message in (
        ([], "no face"),
        ([small._replace(score=0.6)], "low score: 0.60, below 0.8"),
        ([small], "too small: 56 pixels, below 60"),
    ):
        with pytest.raises(InputError, match=message):
            choose(faces, min_size=60)
    with pytest.raises(InputError, match="in one place"):
        choose([Face((0, 0, 9, 9), np.ones((5, 2)), 1.0)])


def test_gallery(folder, tmp_path, monkeypatch, capsys):
    """A person's feature is the mean of the images', a photograph in the folder itself is a person;
    what cannot be used is said.
    """
    gallery = tmp_path / "people"
    for name, numbers in {"ann": (0, 2), "bob": (1,)}.items():
        (gallery / name).mkdir(parents=True)
        for number in numbers:
            (gallery / name / f"{number}.png").write_bytes(encode(CROPS[number]))
    (gallery / "cid.png").write_bytes(encode(CROPS[3]))
    (gallery / "bob" / "broken.jpg").write_text("no image")
    (gallery / "dan").mkdir()
    (gallery / "dan" / "all.jpg").write_text("no image")
    vectors = features(folder, CROPS)
    people = {"ann": vectors[0] + vectors[2], "bob": vectors[1], "cid.png": vectors[3]}
    cosines = {
        name: float(vectors[4] @ vector / np.linalg.norm(vector)) for name, vector in people.items()
    }
    ranked = sorted(cosines, key=cosines.get, reverse=True)
    output = compare(
        monkeypatch,
        capsys,
        folder,
        folder / "4.png",
        "--gallery",
        gallery,
        "--aligned",
        "--top",
        2,
        "--threshold",
        cosines[ranked[0]] - 5e-4,
    )
    assert (
        f"{gallery}: 3 people, 4 images\n  left out: {gallery / 'bob' / 'broken.jpg'}: no image"
        in output
    )
    assert (
        cosines[ranked[0]] - cosines[ranked[1]] > 1e-3
        and cosines[ranked[1]] - cosines[ranked[2]] > 1e-3
    ), "the order must not hang on rounding"
    table = [line.split() for line in output.split("rank")[1].splitlines()]
    for rank, name, decision in (
        (1, ranked[0], "the same person"),
        (2, ranked[1], "different people"),
    ):
        assert table[rank][:2] == [str(rank), name] and " ".join(table[rank][3:]) == decision
        assert float(table[rank][2]) == pytest.approx(cosines[name], abs=PRINTED)
    assert ranked[2] not in output.split("rank")[1]


def test_thresholds_of_a_report(tmp_path, folder, monkeypatch, capsys):
    """At the threshold no more impostor pairs are accepted than the rate says, and with the next
    lower score one would be too many.
    """
    rng = np.random.default_rng(0)
    scores, same = (
        np.concatenate([rng.normal(0, 0.2, 1000), rng.normal(0.6, 0.2, 400)]),
        np.repeat([False, True], [1000, 400]),
    )
    roc = roc_curve(scores, same)
    for far in (1e-3, 5e-3, 1e-2, 0.1):
        threshold, tar = threshold_at(roc, far)
        assert (
            np.mean(scores[~same] >= threshold) <= far and np.mean(scores[same] >= threshold) == tar
        )
        # one impostor more than the rate allows
        allowed = np.sort(scores[~same])[-int(round(far * 1000)) - 1]
        assert tar == np.mean(scores[same] > allowed)
    exhibit = PairExhibit("lfw", {"cosine": roc}, None, None, None, "cosine", None)
    write_thresholds(
        tmp_path / "thresholds.json",
        folder / "7backbone.pth",
        sha256(folder / "7backbone.pth"),
        "RGB",
        [exhibit],
    )
    found = read_threshold(tmp_path, 1e-2, None, {sha256(folder / "7backbone.pth"): "RGB"})
    assert found[:2] == ("lfw", 0.01) and found[2:] == pytest.approx(threshold_at(roc, 1e-2))
    output = compare(
        monkeypatch,
        capsys,
        folder,
        folder / "0.png",
        folder / "0.png",
        "--aligned",
        "--report",
        tmp_path,
        "--far",
        "0.01",
    )
    assert (
        printed(output, "cosine") == pytest.approx(1, abs=PRINTED)
        and ": the same person\n" in output
    )
    assert (
        f"threshold {found.cosine:.4f}: on lfw it accepts at most 1% of different people (FAR "
        f"0.01) and {100 * found.tar:.2f}% of pairs of the same person"
    ) in output
    assert output.endswith(f"{folder / '7backbone.pth'}: mobilefacenet, RGB images\n")
    with pytest.raises(
        InputError,
        match="was measured as a network trained on RGB images, this "
        "one is taken for one of BGR images",
    ):
        compare(
            monkeypatch,
            capsys,
            folder,
            folder / "0.png",
            folder / "0.png",
            "--aligned",
            "--report",
            tmp_path,
            "--far",
            "0.01",
            "--color-space",
            "BGR",
        )


def test_features_that_are_zero_have_no_cosine(folder, tmp_path):
    weights = torch.load(folder / "7backbone.pth")
    torch.save(
        {key: torch.zeros_like(value) for key, value in weights.items()}, tmp_path / "zero.pth"
    )
    with pytest.raises(InputError, match="zero.pth: the feature of image 0 is zero"):
        embed_faces(load_model(tmp_path / "zero.pth", "--model"), np.stack(CROPS[:2]))


def test_reports_that_do_not_fit(tmp_path):
    roc = roc_curve(np.array([0.1, 0.9, 0.5, 0.3]), np.array([0, 1, 1, 0]))
    for names in (["a"], ["a", "b"]):
        write_thresholds(
            tmp_path / f"{len(names)}.json",
            tmp_path / "x.pth",
            "abc",
            "RGB",
            [PairExhibit(name, {"cosine": roc}, None, None, None, "", None) for name in names],
        )
    (tmp_path / "results.json").write_text('{"verification": {}}')
    for path, far, name, digests, message in (
        (
            tmp_path / "none",
            0.5,
            None,
            ["abc"],
            "--report: no .*none; eval/run_full_eval.py --report-dir writes it",
        ),
        (tmp_path / "1.json", 0.5, None, ["other", ""], "was measured with another network"),
        (tmp_path / "1.json", 1e-3, None, ["abc"], "has no threshold of a at 0.001, only at 0.5"),
        (tmp_path / "2.json", 0.5, None, ["abc"], r"has 2 sets \(a, b\): choose one with --set"),
        (tmp_path / "2.json", 0.5, "c", ["abc"], "has no set c, only a, b"),
        (tmp_path / "results.json", 0.5, None, ["abc"], "holds no thresholds"),
    ):
        with pytest.raises(InputError, match=message):
            read_threshold(path, far, name, dict.fromkeys(digests, ""))
    assert read_threshold(tmp_path / "2.json", 0.5, "b", {"x": "", "abc": "RGB"}).cosine == 0.5
    assert json.loads((tmp_path / "1.json").read_text())["sets"]["a"]["impostor_pairs"] == 2


def test_wrong_input_is_said(folder, tmp_path, monkeypatch, capsys):
    def refuses(message, *arguments, detector=folder / "yunet.onnx"):
        with pytest.raises(InputError, match=message) as caught:
            compare(
                monkeypatch,
                capsys,
                folder,
                *arguments,
                *(["--detector", detector] if detector else []),
            )
        assert "\n" not in str(caught.value)

    one = folder / "one.png"
    refuses("nowhere.jpg: cannot be read: No such file", one, folder / "nowhere.jpg")
    refuses("text.jpg: no image", one, folder / "text.jpg")
    refuses("none.png: no face", one, folder / "none.png")
    refuses("faint.png: low score: 0.62, below 0.8", one, folder / "faint.png")
    refuses("one.png: 640x320 is no aligned crop of 112x112", one, one, "--aligned")
    refuses("name two photographs to compare, not 1", one)
    refuses("--gallery: no folder", one, "--gallery", tmp_path / "none")
    refuses("--gallery: no face in .*: it holds no image", one, "--gallery", tmp_path)
    refuses("--face huge: largest, or a number", one, one, "--face", "huge")
    refuses("--far is of --report", one, one, "--far", "0.01")
    refuses("--set is of --report", one, one, "--set", "lfw", "--threshold", "0.5")
    refuses("--threshold is a cosine", one, one, "--threshold", "2")
    refuses(
        rf"--detector: no file .*none.onnx: fetch {re.escape(advised())} from "
        r"https://github.com/opencv/opencv_zoo/",
        one,
        one,
        detector=tmp_path / "none.onnx",
    )
    (tmp_path / "pointer.onnx").write_text("version https://git-lfs.github.com/spec/v1\n")
    refuses(
        r"is no YuNet face detector .*; it looks like a Git LFS pointer.*; fetch "
        rf"{re.escape(advised())}",
        one,
        one,
        detector=tmp_path / "pointer.onnx",
    )
    refuses(
        rf"is no YuNet face detector .* fetch {re.escape(advised())}",
        one,
        one,
        detector=folder / "7backbone.pth",
    )
