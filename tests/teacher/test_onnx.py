"""ONNX teachers: both conventions of normalisation, fixed and open batches, colour order, and what
is refused. Needs requirements/onnx.txt.
"""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.teachers import IMAGES, SIZE, config, refused, save
from utils.teacher.load import load_teacher
from utils.weights.read import sha256

onnxruntime = pytest.importorskip(
    "onnxruntime", reason="onnxruntime is not installed (requirements/onnx.txt)"
)
onnx = pytest.importorskip("onnx", reason="onnx is not installed (requirements/onnx.txt)")

WEIGHT = np.random.default_rng(7).normal(size=(3 * 16 * 16, SIZE)).astype(np.float32)


# Features are sums of 768 products, of 100 at most, in float32: sqrt(768) U of a hundred. A graph's
# own scaling rounds the pixels, too.
NEAR = dict(rtol=1e-4, atol=1e-4)


def reference(pixels: np.ndarray) -> np.ndarray:
    """The tiny face model in float64: every 7 x 7 block's mean of pixels in [-1, 1], a linear
    layer.
    """
    return pixels.astype(np.float64).reshape(-1, 3, 16, 7, 16, 7).mean((3, 5)).reshape(
        -1, 3 * 16 * 16
    ) @ WEIGHT.astype(np.float64)


def onnx_model(
    path: Path,
    before=(),
    batch="N",
    sizes=(3, 112, 112),
    flat=-1,
    inputs=1,
    outputs=("features",),
    dtype=1,
    constant_nodes=False,
    external=False,
    last=False,
    **about,
) -> Path:
    """The tiny face model, after operators (name, constant) on the pixels; flat: the rows its
    reshape gives, as converters leave them fixed.

    outputs: "features", "norm" (their length, (N, 1)), "unit" (of length 1), "pooled" (N, 3, 16,
    16). last: channels last, by a Transpose.
    """
    helper, to_tensor = onnx.helper, onnx.numpy_helper.from_array
    nodes, weights, value = (
        [],
        [to_tensor(WEIGHT, "weight"), to_tensor(np.array([flat, WEIGHT.shape[0]]), "flat")],
        "data",
    )
    for number, (operator, constant) in enumerate(before):
        names = [value]
        if constant is not None:
            tensor = to_tensor(np.array(constant, np.float32), f"c{number}")
            names.append(f"c{number}")
            nodes += (
                [helper.make_node("Constant", [], [f"c{number}"], value=tensor)]
                if constant_nodes
                else []
            )
            weights += [] if constant_nodes else [tensor]
        nodes.append(helper.make_node(operator, names, [f"v{number}"]))
        value = f"v{number}"
    if last:
        nodes.append(helper.make_node("Transpose", [value], ["first"], perm=[0, 3, 1, 2]))
        value = "first"
    nodes += [
        helper.make_node("AveragePool", [value], ["pooled"], kernel_shape=[7, 7], strides=[7, 7]),
        helper.make_node("Reshape", ["pooled", "flat"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weight"], ["features"]),
    ]
    nodes += [
        helper.make_node("ReduceL2", ["features"], ["norm"], axes=[1]),
        helper.make_node("Div", ["features", "norm"], ["unit"]),
    ]
    shapes = {
        "features": [batch, SIZE],
        "pooled": [batch, 3, 16, 16],
        "norm": [batch, 1],
        "unit": [batch, SIZE],
    }
    graph = helper.make_graph(
        nodes,
        "face",
        [
            helper.make_tensor_value_info(name, dtype, [batch, *sizes])
            for name in ("data", "second")[:inputs]
        ],
        [helper.make_tensor_value_info(name, 1, shapes[name]) for name in outputs],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(model, about)
    onnx.save(
        model,
        path,
        save_as_external_data=external,
        location=path.name + ".data",
        size_threshold=1024,
    )
    return path


CONVENTIONS = {  # operators on the pixels, and what they are told to be
    "normalised outside": ((), "(x / 255 - 0.5) / 0.5"),
    "Sub and Mul (MXNet)": (
        (("Sub", 127.5), ("Mul", 1 / 127.5)),
        "x as it is (0 to 255), the graph does the rest",
    ),
    "Identity, Sub and Div": (
        (("Identity", None), ("Sub", [[[127.5]]] * 3), ("Div", 127.5)),
        "x as it is (0 to 255), the graph does the rest",
    ),
    "Div and Sub": (
        (("Div", 127.5), ("Sub", 1.0)),
        "x as it is (0 to 255), the graph does the rest",
    ),
    "0 to 1": ((("Sub", 0.5), ("Mul", 2.0)), "x / 255, the graph does the rest"),
    "Mul and Add": (
        (("Mul", 1 / 127.5), ("Add", -1.0)),
        "x as it is (0 to 255), the graph does the rest",
    ),
    "a batch norm's Mul and Add": ((("Mul", 1.0), ("Add", 0.0)), "(x / 255 - 0.5) / 0.5"),
}


@pytest.mark.parametrize("constant_nodes", [False, True], ids=["initializers", "constants"])
@pytest.mark.parametrize("before, normalisation", CONVENTIONS.values(), ids=CONVENTIONS)
def test_conventions(tmp_path, caplog, before, normalisation, constant_nodes):
    path = onnx_model(tmp_path / "face.onnx", before, constant_nodes=constant_nodes)
    with caplog.at_level(logging.INFO):
        teacher = load_teacher(config(f"onnx:{path}"), SIZE)
    features = teacher(IMAGES)
    assert features.dtype == torch.float32 and not features.requires_grad
    assert features.shape == (2, SIZE)
    np.testing.assert_allclose(features.numpy(), reference(IMAGES.numpy()), **NEAR)
    assert (
        teacher.normalisation,
        teacher.embedding_size,
        teacher.color_space,
        teacher.path,
        teacher.sha256,
    ) == (normalisation, SIZE, "RGB", str(path), sha256(path))
    assert caplog.messages[0].startswith(f"Teacher onnx:{path}: 12,")
    assert caplog.messages[0].endswith(
        f" parameters, 16-d features, 112x112 RGB input, {normalisation}, {path}, "
        f"SHA-256 {sha256(path)}"
    )


@pytest.mark.parametrize(
    "before, normalisation",
    [
        ((("Div", 255.0),), "x as it is (0 to 255), the graph does the rest"),
        ((("Mul", 1 / 128),), "x as it is (0 to 255), the graph does the rest"),
        ((("Sub", 0.5),), "x / 255, the graph does the rest"),
    ],
)
def test_one_operator_tells_as_much(tmp_path, before, normalisation):
    assert (
        load_teacher(
            config(f"onnx:{onnx_model(tmp_path / 'face.onnx', before)}"), SIZE
        ).normalisation
        == normalisation
    )


@pytest.mark.parametrize(
    "options",
    [dict(batch=1), dict(flat=1), dict(batch=1, flat=1)],
    ids=["said", "fixed inside", "both"],
)
def test_models_of_one_image_at_a_time(tmp_path, options):
    teacher = load_teacher(config(f"onnx:{onnx_model(tmp_path / 'face.onnx', **options)}"))
    np.testing.assert_allclose(teacher(IMAGES).numpy(), reference(IMAGES.numpy()), **NEAR)
    assert teacher(IMAGES[:0]).shape == (0, SIZE)


def test_colour_order_autocast_layout_and_compile(tmp_path):
    path = onnx_model(tmp_path / "face.onnx")
    bgr = load_teacher(config(f"onnx:{path}", color_space="BGR"))
    np.testing.assert_allclose(bgr(IMAGES).numpy(), reference(IMAGES.flip(1).numpy()), **NEAR)
    teacher = load_teacher(config(f"onnx:{path}")).to("cpu", memory_format=torch.channels_last)
    expected = teacher(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(IMAGES.contiguous(memory_format=torch.channels_last)), expected)
        assert torch.equal(torch.compile(teacher, backend="eager")(IMAGES), expected)
    assert not list(teacher.parameters()) and not teacher.state_dict()


@pytest.mark.parametrize(
    "outputs, feature",
    [
        (("unit", "norm"), "unit"),
        (("norm", "unit"), "unit"),
        (("features", "pooled"), "features"),
        (("norm", "pooled", "features"), "features"),
    ],
)
@pytest.mark.parametrize("batch", ["N", 1])
def test_a_second_output_is_not_taken_for_the_features(tmp_path, caplog, outputs, feature, batch):
    """AdaFace's models give features of unit length and, beside them, their norm."""
    path = onnx_model(tmp_path / "face.onnx", outputs=outputs, batch=batch)
    with caplog.at_level(logging.INFO):
        teacher = load_teacher(config(f"onnx:{path}"), SIZE)
    assert f"{path}: the features are its output {feature} of {', '.join(outputs)}" in caplog.text
    expected = reference(IMAGES.numpy())
    if feature == "unit":
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(teacher(IMAGES).numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "before, normalisation",
    [CONVENTIONS["normalised outside"], CONVENTIONS["Sub and Mul (MXNet)"], CONVENTIONS["0 to 1"]],
    ids=["normalised outside", "Sub and Mul", "0 to 1"],
)
@pytest.mark.parametrize(
    "sizes", [(112, 112, 3), ("H", "W", 3), ("H", "W", "C")], ids=["fixed", "open", "all open"]
)
def test_channels_last(tmp_path, before, normalisation, sizes):
    """(N, 112, 112, 3) float32, as tf2onnx writes it."""
    teacher = load_teacher(
        config(f"onnx:{onnx_model(tmp_path / 'face.onnx', before, sizes=sizes, last=True)}"), SIZE
    )
    assert teacher.normalisation == normalisation
    np.testing.assert_allclose(
        teacher(IMAGES).numpy(), reference(IMAGES.numpy()), rtol=1e-4, atol=1e-4
    )
    assert teacher(IMAGES[:0]).shape == (0, SIZE)


def test_a_model_may_say_its_colour_order(tmp_path):
    path = onnx_model(tmp_path / "face.onnx", color_space="BGR")
    for asked, order in (("auto", "BGR"), ("RGB", "RGB"), ("BGR", "BGR")):
        teacher = load_teacher(config(f"onnx:{path}", color_space=asked))
        assert (teacher.color_space, teacher.own_color_space) == (order, "BGR")
        images = IMAGES.flip(1) if order == "BGR" else IMAGES
        np.testing.assert_allclose(
            teacher(IMAGES).numpy(), reference(images.numpy()), rtol=1e-4, atol=1e-4
        )


def test_weights_in_a_second_file_count_too(tmp_path):
    path = onnx_model(tmp_path / "face.onnx", external=True)
    teacher = load_teacher(config(f"onnx:{path}"))
    np.testing.assert_allclose(teacher(IMAGES).numpy(), reference(IMAGES.numpy()), **NEAR)
    assert teacher.sha256 == sha256(path, tmp_path / "face.onnx.data") != sha256(path)
    (tmp_path / "face.onnx.data").unlink()
    refused("onnxruntime cannot run", config(f"onnx:{path}"))


def test_models_that_are_refused(tmp_path):
    def wrong(message, size=None, **options):
        refused(message, config(f"onnx:{onnx_model(tmp_path / 'face.onnx', **options)}"), size)

    wrong(r"has 16-d features, but embedding_size=512: .*set embedding_size=16", 512)
    wrong(
        r"takes \(N, 3, 224, 224\) of float, not \(N, 3, 112, 112\) or \(N, 112, 112, 3\) of "
        r"float32",
        sizes=(3, 224, 224),
    )
    wrong(r"takes \(N, 224, 224, 3\) of float, not", sizes=(224, 224, 3))
    wrong(r"takes \(N, 3, 112, 112\) of uint8, not", dtype=2)
    wrong(
        r"gives features \(1, 16\), unit \(1, 16\) for one image: several outputs that may be "
        r"the features; export it with the embedding alone",
        outputs=("features", "unit"),
    )
    wrong(r"gives \(N, 3, 16, 16\) of float, not \(N, D\) features", outputs=("pooled",))
    wrong("takes batches of 8 only", batch=8)
    wrong(r"has 2 inputs \(data, second\): a face network has one", inputs=2)
    wrong("onnxruntime cannot run", before=(("NoSuchOperator", None),))
    wrong("onnxruntime cannot run", flat=5)
    path = tmp_path / "x.onnx"
    refused(
        rf"teacher: no file at {tmp_path}/x\.onnx \(teacher=onnx:PATH\)", config(f"onnx:{path}")
    )
    for content, look in [
        (b"", "$"),
        (b"\x08\x07", "$"),
        (b"junk" * 9, "$"),
        (b"<html>", "; it looks like a web page"),
    ]:
        path.write_bytes(content)
        refused(f"is no ONNX model{look}", config(f"onnx:{path}"))
    path = save({"x": torch.zeros(3)}, tmp_path / "backbone.pth")
    refused(
        "is no ONNX model; it looks like a PyTorch checkpoint: name it .*set teacher to its "
        "network",
        config(f"onnx:{path}"),
    )


def test_without_onnxruntime(tmp_path, monkeypatch):
    path = onnx_model(tmp_path / "face.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(
        "ONNX models need onnxruntime and onnx: pip install -r requirements/onnx.txt",
        config(f"onnx:{path}"),
    )


def test_on_a_device_without_a_provider(tmp_path, caplog):
    """The session is made for the images' device; where onnxruntime has no provider for it, a
    warning says that the CPU computes.
    """
    teacher = load_teacher(config(f"onnx:{onnx_model(tmp_path / 'face.onnx')}"))
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime has a CUDA provider here")
    session = teacher.network.open_session(torch.device("cuda", 0))
    assert (
        session.get_providers() == ["CPUExecutionProvider"]
        and ("onnxruntime has no working CUDA provider here") in caplog.text
    )
