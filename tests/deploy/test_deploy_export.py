"""deploy/export_onnx.py as people call it, and evaluation of what it writes: the same figures as
the checkpoint's. Needs requirements/onnx.txt.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from easydict import EasyDict

from backbones import build_backbone
from data import make_synthetic
from deploy import checks, export_onnx
from deploy.checks import divide
from deploy.graph import to_onnx
from deploy.images import read_images
from deploy.model import load_model
from eval import verification
from eval.embed import embed
from tests import rounding
from tests.backbones.test_backbones import fill
from tests.commands import ROOT, environment, run
from tests.saved_sets import encode, smooth
from tests.warm_python import python
from utils.errors import InputError
from utils.teacher.onnx import OnnxNetwork
from utils.weights.read import sha256

onnx = pytest.importorskip("onnx", reason="onnx is not installed (requirements/onnx.txt)")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (requirements/onnx.txt)")
pytestmark = pytest.mark.usefixtures("one_thread")

EXPORT, FULL, BATCH = (
    ROOT / "deploy" / "export_onnx.py",
    ROOT / "eval" / "run_full_eval.py",
    ROOT / "eval" / "run_batch_eval.py",
)
PIXELS = np.random.default_rng(3).integers(0, 256, (5, 112, 112, 3), np.uint8)


def checkpoint(path, name="mobilefacenet", size=16, prefix="", **state):
    network = build_backbone(name, size)
    fill.fill_state_dict(network)
    weights = {prefix + key: value for key, value in network.state_dict().items()}
    torch.save({"state_dict": weights, **state} if prefix else weights | state, path)
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run as training leaves it: its training set and one of its two pair sets are there."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "set").mkdir()
    with make_synthetic.open_studio(1, seed=0, nuisance=1.0) as studio:
        make_synthetic.write_training_set(folder / "set", studio, 10, 6)
        make_synthetic.write_pair_set(folder / "set", studio, "frontal", 20)
    checkpoint(folder / "12backbone.pth")
    config = dict(
        network="mobilefacenet",
        embedding_size=16,
        rec=str(folder / "set"),
        val_rec=str(folder / "set"),
        val_targets=["frontal", "lowres"],
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def exported(run_folder):
    """Float, float16 and int8 models with uint8 input, and what the command printed and wrote of
    them.
    """
    output = run(
        EXPORT,
        "--checkpoint",
        run_folder / "12backbone.pth",
        "--uint8",
        "--int8",
        "--fp16",
        "--calibration-images",
        20,
        "--threads",
        1,
        "--results-json",
        run_folder / "figures.json",
    )
    return output, json.loads((run_folder / "figures.json").read_text())


def features(network, pixels=PIXELS) -> np.ndarray:
    return embed(network, pixels, 2, flip=False)[0].numpy()


@pytest.mark.processes
def test_what_is_written_and_reported(run_folder, exported):
    output, figures = exported
    names = ["12backbone.pth", "12backbone.onnx", "12backbone.fp16.onnx", "12backbone.int8.onnx"]
    assert list(figures) == names and {path.name for path in run_folder.iterdir()} == {
        *names,
        "config.json",
        "set",
        "figures.json",
    }
    assert output.startswith(
        "mobilefacenet, 945,536 parameters, 16-d features; compared on 26 "
        f"images of {run_folder / 'set'}, CPU with 1 thread\n"
    )
    for name in names[1:]:
        row = figures[name]
        assert (
            row["megabytes"] == pytest.approx((run_folder / name).stat().st_size / 1e6)
            and row["milliseconds"] > 0
        )
        assert (
            f"{row['least_cosine']:.6f}" in output
            and (f"{100 * row['frontal']['Accuracy-Flip']:.2f} ±") in output
        )
    assert (
        figures["12backbone.onnx"]["least_cosine"] > 0.99999
        and figures["12backbone.fp16.onnx"]["least_cosine"] > 0.9999
    )
    assert 0.9 < figures["12backbone.int8.onnx"]["mean_cosine"] < 0.99999
    assert (
        figures["12backbone.int8.onnx"]["megabytes"] < 0.4 * figures["12backbone.onnx"]["megabytes"]
    )


@pytest.mark.processes
def test_metadata(run_folder, exported):
    for name, numbers in (
        ("12backbone.onnx", "float32"),
        ("12backbone.fp16.onnx", "float16"),
        ("12backbone.int8.onnx", "int8"),
    ):
        about = OnnxNetwork(run_folder / name).about
        assert {
            key: about[key]
            for key in (
                "network",
                "embedding_size",
                "parameters",
                "color_space",
                "step",
                "checkpoint",
                "checkpoint_sha256",
                "numbers",
                "normalisation",
            )
        } == {
            "network": "mobilefacenet",
            "embedding_size": "16",
            "parameters": "945536",
            "color_space": "RGB",
            "step": "12",
            "checkpoint": "12backbone.pth",
            "checkpoint_sha256": sha256(run_folder / "12backbone.pth"),
            "numbers": numbers,
            "normalisation": "x as it is (0 to 255, uint8), the graph does the rest",
        }
    model = load_model(run_folder / "12backbone.int8.onnx", "model")
    assert (model.name, model.embedding_size, model.parameters, model.step) == (
        "mobilefacenet",
        16,
        945536,
        "12",
    )
    assert model.checkpoint_sha256 == sha256(run_folder / "12backbone.pth") != model.sha256


@pytest.mark.processes
def test_int8_weights_have_a_scale_for_each_channel(run_folder, exported):
    graph = onnx.load(run_folder / "12backbone.int8.onnx").graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    producers = {node.output[0]: node for node in graph.node}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 49
    for node in convolutions:
        quantised, scale = (weights[name] for name in producers[node.input[1]].input[:2])
        assert quantised.data_type == onnx.TensorProto.INT8 and list(scale.dims) == [
            quantised.dims[0]
        ]
        assert producers[node.input[0]].op_type == "DequantizeLinear"


@pytest.mark.processes
def test_models_give_the_checkpoints_features(run_folder, exported):
    expected = features(load_model(run_folder / "12backbone.pth", "model").network)
    network = OnnxNetwork(run_folder / "12backbone.onnx")
    assert network.takes_bytes and network.embedding_size == 16
    np.testing.assert_allclose(
        features(network), expected, rtol=0, atol=2 * rounding.network(50) * np.abs(expected).max()
    )
    assert features(network, PIXELS[:1]).shape == (1, 16) and network(
        torch.zeros(0, 3, 112, 112)
    ).shape == (0, 16)


@pytest.mark.processes
def test_full_and_batch_evaluation_take_models(run_folder, exported, tmp_path):
    how = ["--device", "cpu", "--val-batch-size", 8]
    expected = verification.test(
        verification.load_bin(run_folder / "set" / "frontal.bin"),
        load_model(run_folder / "12backbone.pth", "model").network,
        8,
    )
    output = run(
        FULL,
        "--checkpoint",
        run_folder / "12backbone.onnx",
        *how,
        "--results-json",
        tmp_path / "r.json",
        "--report-dir",
        tmp_path / "report",
        "--features",
        tmp_path / "features",
    )
    figures = json.loads((tmp_path / "r.json").read_text())["verification"]["frontal"]
    assert {key: figures[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert (
        f"skipped lowres: no {run_folder / 'set' / 'lowres.bin'}" in output
        and ("(ONNX model, onnxruntime on 1 x cpu, RGB images)") in output
    )
    digest = sha256(run_folder / "12backbone.onnx")
    assert (
        json.loads((tmp_path / "report" / "thresholds.json").read_text())["sha256"] == digest
        and (tmp_path / "features" / digest[:16]).is_dir()
    )

    output = run(
        BATCH,
        "--checkpoint-dir",
        run_folder,
        "--checkpoint-suffix",
        ".onnx",
        "--report-dir",
        tmp_path / "reports",
        *how,
        "--save-json",
    )
    assert "3 of 3 checkpoints evaluated" in output
    rows = {}
    for name in ("", "fp16.", "int8."):
        report = tmp_path / "reports" / f"12backbone.{name}onnx_metrics.json"
        rows[name] = json.loads(report.read_text())["verification"]["frontal"]
    assert {key: rows[""][key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert (
        rows["int8."]["Accuracy-Flip"]
        == exported[1]["12backbone.int8.onnx"]["frontal"]["Accuracy-Flip"]
    )


def test_adafaces_bgr_release_becomes_an_rgb_model(tmp_path):
    """Its first layer's channels change places: the model on RGB gives what the release gives on
    BGR.
    """
    path = checkpoint(
        tmp_path / "adaface.ckpt",
        "ir18",
        8,
        prefix="model.",
        **{"pytorch-lightning_version": "1.4.0"},
    )
    network = build_backbone("ir18", 8)
    fill.fill_state_dict(network)
    expected = features(network, PIXELS[..., ::-1].copy())
    assert np.abs(features(network) - expected).max() > 0.01 * np.abs(expected).max()
    model = load_model(path, "model")
    assert model.describe() == f"{path}: ir18, BGR images, weights of state_dict under model."
    onnx.save(to_onnx(model.network), tmp_path / "x.onnx")
    np.testing.assert_allclose(
        features(OnnxNetwork(tmp_path / "x.onnx")),
        expected,
        rtol=0,
        atol=2 * rounding.network(20, 9 * 512) * np.abs(expected).max(),
    )


def test_the_colour_order_may_be_said(tmp_path, monkeypatch, capsys):
    """Of weights under model. that do not tell; and the file says what was taken."""
    path = checkpoint(tmp_path / "whose.pth", "ir18", 8, prefix="model.")
    network = build_backbone("ir18", 8)
    fill.fill_state_dict(network)

    def export(*arguments):
        monkeypatch.setattr(sys, "argv", ["export_onnx.py", "--checkpoint", str(path), *arguments])
        export_onnx.main()
        return capsys.readouterr().out

    with pytest.raises(
        InputError,
        match=r"whose.pth is an IR network under model\.: "
        r".*--color-space",
    ):
        export()
    assert os.listdir(tmp_path) == ["whose.pth"]
    for order, pixels in (("RGB", PIXELS), ("BGR", PIXELS[..., ::-1].copy())):
        assert f"{path}: ir18, {order} images, weights of state_dict under model.\n" in export(
            "--color-space", order
        )
        exported, expected = OnnxNetwork(tmp_path / "whose.onnx"), features(network, pixels)
        assert exported.about["color_space"] == "RGB"
        assert exported.about["checkpoint_color_space"] == order
        np.testing.assert_allclose(
            features(exported),
            expected,
            rtol=0,
            atol=2 * rounding.network(20, 9 * 512) * np.abs(expected).max(),
        )
        assert load_model(path, "model", order).color_space == order


def test_old_operator_sets_an_average_and_a_foreign_config(tmp_path, monkeypatch, capsys):
    """--opset 11 of the exponential average in a file that lies beside a config.json of the Hugging
    Face hub.
    """
    plain = build_backbone("mobilefacenet", 8)
    weights = plain.state_dict()
    fill.fill_state_dict(plain)
    torch.save(
        {"state_dict": weights, "state_dict_ema": plain.state_dict(), "optimizer": {}},
        tmp_path / "x.pth",
    )
    (tmp_path / "config.json").write_text('{"architectures": ["Model"], "conf": {}}')
    monkeypatch.setattr(
        sys,
        "argv",
        ["export_onnx.py", "--checkpoint", f"{tmp_path / 'x.pth'}#ema", "--opset", "11"],
    )
    export_onnx.main()
    assert (
        "x.pth: mobilefacenet, RGB images, weights of state_dict_ema\n" in capsys.readouterr().out
    )
    assert onnx.load(tmp_path / "x.ema.onnx").opset_import[0].version == 11
    expected = features(plain)
    np.testing.assert_allclose(
        features(OnnxNetwork(tmp_path / "x.ema.onnx")),
        expected,
        rtol=0,
        atol=2 * rounding.network(50) * np.abs(expected).max(),
    )
    monkeypatch.setattr(
        sys,
        "argv",
        ["export_onnx.py", "--checkpoint", str(tmp_path / "x.pth"), "--opset", "12", "--int8"],
    )
    with pytest.raises(InputError, match="--int8 needs --opset 13 or newer, not 12"):
        export_onnx.main()


@pytest.mark.processes
def test_a_model_that_disagrees_is_not_written(tmp_path):
    """As a process: one line, exit status 1, and nothing but what was there."""
    weights = torch.load(checkpoint(tmp_path / "nan.pth"))
    weights["conv1.conv.weight"][:] = float("nan")
    torch.save(weights, tmp_path / "nan.pth")
    done = subprocess.run(
        [python(), str(EXPORT), "--checkpoint", str(tmp_path / "nan.pth")],
        capture_output=True,
        text=True,
        env=environment(),
        cwd="/",
    )
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == (
        "error: nan.pth: features are not finite (NaN or infinite) for 33 of 33 "
        "images, first image index 0; nothing was written\n"
    )
    assert os.listdir(tmp_path) == ["nan.pth"]


@pytest.mark.parametrize("blocked", [False, True], ids=["zero features", "a folder in the way"])
def test_nothing_is_written_if_one_of_the_models_cannot_be(
    run_folder, tmp_path, monkeypatch, blocked
):
    weights = torch.load(run_folder / "12backbone.pth")
    torch.save(
        weights if blocked else {key: torch.zeros_like(value) for key, value in weights.items()},
        tmp_path / "x.pth",
    )
    if blocked:
        (tmp_path / "x.fp16.onnx").mkdir()
    there = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(
        sys, "argv", ["export_onnx.py", "--checkpoint", str(tmp_path / "x.pth"), "--fp16"]
    )
    with pytest.raises(
        InputError,
        match="x.fp16.onnx is a folder"
        if blocked
        else "x.pth: the feature of image 0 is zero.*nothing was written",
    ):
        export_onnx.main()
    assert sorted(os.listdir(tmp_path)) == there


def test_the_set_of_a_run_may_be_several_paths(run_folder, tmp_path):
    rec = run_folder / "set" / "train.rec"
    shutil.copy(rec, tmp_path / "train_1.rec")
    shutil.copy(rec.with_suffix(".idx"), tmp_path / "train_1.idx")
    for where, name in (
        ([str(rec), str(tmp_path)], "list"),
        (str(rec), "file"),
        (str(tmp_path), "shards"),
    ):
        cfg = EasyDict(db_file_format="rec", rec=where)
        assert checks.training_set(cfg) == where, name
        assert read_images(checks.training_set(cfg), 6, "rec").shape == (6, 112, 112, 3), name
    assert (
        checks.training_set(EasyDict(db_file_format="rec", rec=[str(rec), "/nowhere"])) is None
        and checks.training_set(None) is None
    )


@pytest.mark.processes
def test_wrong_input_is_said_and_leaves_nothing(run_folder, exported, tmp_path, monkeypatch):
    def refuses(message, *arguments):
        monkeypatch.setattr(sys, "argv", ["export_onnx.py", *map(str, arguments)])
        with pytest.raises(InputError, match=message) as caught:
            export_onnx.main()
        assert "\n" not in str(caught.value) and sorted(os.listdir(tmp_path)) == there

    alone = shutil.copy(run_folder / "12backbone.pth", tmp_path / "12backbone.pth")
    torch.save({"kernel": torch.zeros(16, 10)}, tmp_path / "12header.pth")
    (tmp_path / "broken.pth").write_bytes((run_folder / "12backbone.pth").read_bytes()[:9000])
    there = sorted(os.listdir(tmp_path))
    refuses(f"--checkpoint: no file at {tmp_path}/none.pth", "--checkpoint", tmp_path / "none.pth")
    refuses(
        "holds no network that can be built here .*it looks like a header",
        "--checkpoint",
        tmp_path / "12header.pth",
    )
    refuses("is no readable checkpoint", "--checkpoint", tmp_path / "broken.pth")
    refuses("is an ONNX model already", "--checkpoint", run_folder / "12backbone.onnx")
    refuses("nothing to calibrate on, there is no .*config.json", "--checkpoint", alone, "--int8")
    refuses("no folder /nowhere", "--checkpoint", alone, "--images", "/nowhere")
    refuses("must end in .onnx", "--checkpoint", alone, "--output", tmp_path / "x.pth")
    refuses("is of --int8", "--checkpoint", alone, "--val-data", tmp_path)
    refuses(
        "no pair set",
        "--checkpoint",
        alone,
        "--int8",
        "--calibration-rec",
        run_folder / "set",
        "--val-data",
        tmp_path,
    )
    monkeypatch.setattr(checks, "LEAST_COSINE", {"float32": 1.1})
    refuses(
        r"12backbone.onnx \(float32\) disagrees with 12backbone.pth: cosine 1.000000 on images "
        r"of .*, below 1.1; nothing was written",
        "--checkpoint",
        alone,
        "--images",
        run_folder / "set",
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refuses(
        "ONNX models need onnxruntime and onnx: pip install -r requirements/onnx.txt",
        "--checkpoint",
        alone,
    )


def images_folder(folder, count=3):
    folder.mkdir()
    for number, image in enumerate(smooth(count)):
        (folder / f"{number}.png").write_bytes(encode(image))
    return folder


def test_images_to_check_on_and_to_calibrate_on_are_apart(tmp_path):
    images = np.arange(100)
    checked, others = divide(images, tmp_path)
    assert (
        len(checked) == 33
        and sorted([*checked, *others]) == list(images)
        and {0, 99} <= set(checked)
    )
    with pytest.raises(InputError, match="has a single image"):
        divide(images[:1], tmp_path)
    folder = images_folder(tmp_path / "faces", 4)
    assert read_images(folder, 3, "--images").shape == (3, 112, 112, 3)
    (folder / "9.png").write_bytes(encode(smooth(1, (50, 60))[0]))
    with pytest.raises(InputError, match="9.png: 60x50 is no aligned crop"):
        read_images(folder, 9, "--images")
    with pytest.raises(InputError, match="--images: no folder .*nowhere"):
        read_images(tmp_path / "nowhere", 9, "--images")
