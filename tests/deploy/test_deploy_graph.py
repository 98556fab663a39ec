"""Exported graphs: every network against the outputs of an independent implementation, no BatchNorm
left, borders exact, uint8 and float16. Needs requirements/onnx.txt.
"""

import numpy as np
import pytest
import torch

from backbones import build_backbone
from deploy.graph import operators, to_fp16, to_onnx
from deploy.measure import agreement
from tests import rounding
from tests.backbones.test_backbones import (
    STATES,
    assert_near,
    build,
    fill,
)
from utils.inputs import to_input

onnx = pytest.importorskip("onnx", reason="onnx is not installed (requirements/onnx.txt)")
onnxruntime = pytest.importorskip(
    "onnxruntime", reason="onnxruntime is not installed (requirements/onnx.txt)"
)
pytestmark = pytest.mark.usefixtures("one_thread")


def session(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def infer(model, array) -> np.ndarray:
    return session(model).run(None, {"input": np.asarray(array)})[0]


@pytest.mark.parametrize("entry", STATES)
def test_every_network_is_the_published_one(entry, images, outputs):
    network = build(entry)
    fill.fill_state_dict(network)
    model = to_onnx(network)
    assert not operators(model)["BatchNormalization"] and not operators(model)["Identity"]
    onnx_session = session(model)
    (given,), (made,) = onnx_session.get_inputs(), onnx_session.get_outputs()
    assert (given.name, given.shape, given.type, made.name, made.shape) == (
        "input",
        ["N", 3, 112, 112],
        "tensor(float)",
        "embedding",
        ["N", 512],
    )
    computed = onnx_session.run(None, {"input": images.numpy()})[0]
    assert_near(computed, outputs[entry])
    assert agreement(computed, outputs[entry]).least_cosine > 0.999999


@pytest.mark.parametrize("name", ["iresnet18", "ir18"])
def test_shifts_before_a_convolution_are_exact_at_the_border(name):
    """With means far from zero the zeros beyond the border matter: a constant bias in their place
    would be far off.
    """
    torch.manual_seed(0)
    network = build_backbone(name, 32, use_se=name == "iresnet18").eval()
    for module in network.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.running_mean.normal_(0, 3)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                torch.nn.init.normal_(module.bias, 0, 3)
                torch.nn.init.uniform_(module.weight, -1, 1)
    x = torch.rand(3, 3, 112, 112) * 2 - 1
    model = to_onnx(network)
    with torch.inference_mode():
        agreed = agreement(infer(model, x), network(x).numpy())
    # 20 convolutions of up to 9 * 512 terms, both ways in float32; shifts of 3 before them leave a
    # tenth of the numbers' size to tell images apart
    assert (
        agreed.difference < 10 * 2 * rounding.network(20, 9 * 512) * agreed.largest
        and agreed.least_cosine > 0.999999
    )


def test_uint8_and_float16_give_the_same_features():
    network = build_backbone("mobilefacenet", 32).eval()
    fill.fill_state_dict(network)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), np.uint8)
    x = to_input(torch.from_numpy(pixels)).numpy()
    with torch.inference_mode():
        expected = network(torch.from_numpy(x)).numpy()
    for uint8, given in ((False, x), (True, pixels)):
        model = to_onnx(network, uint8=uint8)
        half = to_fp16(model)
        assert (
            agreement(infer(model, given), expected).difference
            < 2 * rounding.network(50) * np.abs(expected).max()
        )
        agreed = agreement(infer(half, given), expected)
        # float16 rounds weights and numbers of 50 layers by U16: an angle of sqrt(2 * 50) U16 =
        # 0.005
        assert 1e-7 < agreed.difference and agreed.least_cosine > 0.9999
        assert half.ByteSize() < 0.55 * model.ByteSize()
        (name,) = session(half).get_inputs()
        assert (name.type, name.shape) == (
            ("tensor(uint8)", ["N", 112, 112, 3])
            if uint8
            else ("tensor(float)", ["N", 3, 112, 112])
        )
        assert infer(half, given).dtype == np.float32


@pytest.mark.parametrize("opset", [11, 12, 13])
@pytest.mark.parametrize(
    "name, use_se", [("mobilefacenet", False), ("mbf", False), ("iresnet18", True), ("ir18", False)]
)
def test_older_operator_sets(name, use_se, opset):
    """Each network family, float and uint8 input, and float16, against PyTorch."""
    network = build_backbone(name, 16, use_se=use_se).eval()
    fill.fill_state_dict(network)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 112, 112, 3), np.uint8)
    x = to_input(torch.from_numpy(pixels)).numpy()
    with torch.inference_mode():
        expected = network(torch.from_numpy(x)).numpy()
    for uint8, given in ((False, x), (True, pixels)):
        model = to_onnx(network, uint8=uint8, opset=opset)
        assert [entry.version for entry in model.opset_import if not entry.domain] == [opset]
        assert not operators(model)["BatchNormalization"]
        onnx.checker.check_model(model, full_check=True)
        assert agreement(infer(model, given), expected).difference < 1e-4 * np.abs(expected).max()
        assert agreement(infer(to_fp16(model), given), expected).least_cosine > 0.999


def test_a_weight_that_float16_cannot_hold_is_seen():
    torch.manual_seed(2)
    network = build_backbone("mobilefacenet", 8).eval()
    with torch.no_grad():
        network.conv1.conv.weight.mul_(1e6)
    assert not np.isfinite(
        infer(to_fp16(to_onnx(network)), np.ones((1, 3, 112, 112), np.float32))
    ).all()
