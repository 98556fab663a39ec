"""Every network against keys, shapes, parameter counts and outputs of an independent
implementation.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from backbones import NAMES, build_backbone
from backbones.iresnet import iresnet18, iresnet34, iresnet50, iresnet100, iresnet200
from backbones.mobilefacenet import MobileFaceNet
from tests import rounding
from utils.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden"
STATES = json.loads((GOLDEN / "backbones.json").read_text())

_spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fill)


def build(entry: str) -> torch.nn.Module:
    return build_backbone(entry.removesuffix("_se"), use_se=entry.endswith("_se"))


def assert_near(features, reference):
    """As near as float32 is: iresnet200 has 200 convolutions of up to 9 * 512 terms, 6e-5 of the
    largest number. The reference is float32, too.
    """
    np.testing.assert_allclose(
        features,
        reference,
        rtol=0,
        atol=2 * rounding.network(200, 9 * 512) * np.abs(reference).max(),
    )


@pytest.mark.parametrize("entry", STATES)
def test_matches_the_published_network(entry, images, outputs):
    backbone = build(entry)
    state = {key: list(tensor.shape) for key, tensor in backbone.state_dict().items()}
    assert state == dict(STATES[entry]["state"])
    assert (
        sum(parameter.numel() for parameter in backbone.parameters()) == STATES[entry]["parameters"]
    )

    fill.fill_state_dict(backbone)
    backbone.eval()
    with torch.inference_mode():
        features = backbone(images)
    assert features.dtype == torch.float32
    assert_near(features, outputs[entry])


@pytest.mark.parametrize("entry", ["mobilefacenet", "iresnet18_se", "mbf", "ir18"])
def test_memory_format_and_precision(entry, images, outputs):
    backbone = build(entry)
    fill.fill_state_dict(backbone)
    backbone.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        rounded = backbone(images)
    assert rounded.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(rounded, torch.from_numpy(outputs[entry]))
    # bf16 rounds each of the 50 layers' inputs and weights by up to UBF16 / 2: an angle of sqrt(2 *
    # 50) UBF16 / 2 / sqrt(3) = 0.011, the cosine of which is near 1; ten times that is allowed
    assert cosine.min() > 0.99

    backbone.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        features = backbone(images.contiguous(memory_format=torch.channels_last))
    assert_near(features, outputs[entry])


@pytest.mark.parametrize("entry", ["mobilefacenet", "iresnet18_se", "mbf", "mbf_large", "ir18"])
def test_fresh_weights_train(entry, images):
    torch.manual_seed(0)
    backbone = build(entry)
    features = backbone(images)
    assert features.shape == (2, 512)
    assert torch.isfinite(features).all()
    (features * torch.randn_like(features)).sum().backward()
    trainable = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    assert all(
        parameter.grad is not None and torch.isfinite(parameter.grad).all()
        for parameter in trainable
    )


def test_iresnet_keeps_the_scale_of_the_embedding_fixed():
    backbone = build_backbone("iresnet18", embedding_size=64)
    frozen = [
        name for name, parameter in backbone.named_parameters() if not parameter.requires_grad
    ]
    assert frozen == ["features.weight"]
    assert torch.equal(backbone.features.weight, torch.ones(64))


@pytest.mark.parametrize("name", ["mobilefacenet", "mbf", "iresnet18", "ir18"])
def test_embedding_size(name, images):
    assert build_backbone(name, embedding_size=128).eval()(images).shape == (2, 128)


def test_every_name_has_a_reference():
    assert set(NAMES) == {entry.removesuffix("_se") for entry in STATES}


@pytest.mark.parametrize(
    "name, nearest", [("iresnt50", "iresnet50"), ("MobileFaceNet", "mobilefacenet"), ("vit", None)]
)
def test_unknown_name_lists_the_known(name, nearest):
    with pytest.raises(InputError) as error:
        build_backbone(name)
    assert all(known in str(error.value) for known in NAMES)
    assert (f"did you mean {nearest}?" in str(error.value)) == (nearest is not None)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "mobilefacenet", "use_se": True},
        {"name": "ir50", "use_se": True},
        {"name": "mbf", "dropout": 0.4},
    ],
)
def test_options_a_network_does_not_have(options):
    with pytest.raises(InputError, match=options["name"]):
        build_backbone(**options)


def test_networks_as_the_scripts_of_others_build_them():
    """Keys and shapes of build_backbone's, on the meta device: no weights are drawn."""
    with torch.device("meta"):
        for ours, theirs in (
            (build_backbone("mobilefacenet"), MobileFaceNet(input_size=(112, 112))),
            (
                build_backbone("mobilefacenet", 128),
                MobileFaceNet([112, 112], embedding_size=128, output_name="GDC"),
            ),
            (build_backbone("iresnet18"), iresnet18()),
            (build_backbone("iresnet34", 128), iresnet34(False, True, num_features=128)),
            (build_backbone("iresnet50", use_se=True), iresnet50(num_features=512, use_se=True)),
            (build_backbone("iresnet100"), iresnet100(pretrained=False, dropout=0)),
            (build_backbone("iresnet200", dropout=0.4), iresnet200(False, dropout=0.4)),
        ):
            shapes = [
                {key: value.shape for key, value in network.state_dict().items()}
                for network in (ours, theirs)
            ]
            assert shapes[0] == shapes[1]
        assert iresnet200(False, dropout=0.4).dropout.p == 0.4


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: MobileFaceNet((224, 224)), r"input_size=\(224, 224\), but images are"),
        (lambda: MobileFaceNet((112, 112), output_name="GNAP"), "only 'GDC' is built"),
        (lambda: iresnet50(pretrained=True), r"iresnet50\(pretrained=True\): no weights"),
    ],
)
def test_what_others_networks_cannot_be_here(build, message):
    with pytest.raises(InputError, match=message):
        build()
