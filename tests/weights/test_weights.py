"""Files of weights as people have them: entries, prefixes, averages, colour orders, other kinds."""

import re
import warnings
from functools import lru_cache
from itertools import cycle

import pytest
import torch

from tests import rounding
from tests.teachers import IMAGES, config, network, prefixed, save
from utils.errors import InputError
from utils.teacher.load import load_teacher
from utils.weights.class_centers import read_kernel
from utils.weights.load import empty_backbone, load_backbone, read_weights, recognise
from utils.weights.read import digest_of, sha256

SIZE = 16
OPTIMIZER = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
HEAD = {
    "head.kernel": torch.zeros(SIZE, 3),
    "head.t": torch.zeros(1),
    "head.batch_mean": torch.ones(1),
}
COUNTER = "num_batches_tracked"


@pytest.fixture(scope="module")
def weights():
    return network("mobilefacenet", seed=1).state_dict()


@lru_cache
def made(name):
    return network(name, seed=3)


def empty(name="mobilefacenet"):
    return empty_backbone(name, SIZE, False)


def others(weights, value=0.5):
    """Other weights of the same network."""
    return {key: torch.full_like(tensor, value) for key, tensor in weights.items()}


def assert_holds(student: torch.nn.Module, weights) -> None:
    for key, value in student.state_dict().items():
        assert torch.equal(value, weights[key]), key


def refused(content, message, path, name="mobilefacenet", **options) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_backbone(empty(name), save(content, path), "checkpoint", **options)
    assert "\n" not in str(caught.value)


# --- entries and prefixes

NAMES = ["mobilefacenet", "iresnet18", "mbf"]
PREFIXES = [
    "features.module.",
    "backbone.",
    "feat_net.",
    "encoder.",
    "net.",
    "model._orig_mod.",
    "module.backbone.module.",
    "student.",
    "a.b.c.",
]
ENTRIES = [
    "model",
    "model_state_dict",
    "net_state_dict",
    "backbone",
    "state_dict",
    "state_dict_ema",
    "state_dict_backbone",
    "whatever",
]


@pytest.mark.parametrize("prefix, name", list(zip(PREFIXES, cycle(NAMES))))
def test_any_common_prefix(tmp_path, prefix, name):
    plain = made(name)
    path = save(prefixed(plain.state_dict(), prefix), tmp_path / "x.pth")
    student = empty(name)
    assert load_backbone(student, path, "test").place == f"under {prefix}"
    assert_holds(student, plain.state_dict())
    known = recognise(read_weights(path, "test"))
    assert (known.name, known.embedding_size, known.match.prefix) == (name, SIZE, prefix)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_any_entry_beside_an_optimizer(tmp_path, weights, entry, prefix):
    content = {"epoch": 3, "best": 0.9, "optimizer": OPTIMIZER, entry: prefixed(weights, prefix)}
    path, student = save(content, tmp_path / "x.pth"), empty()
    place = f"{entry} under {prefix}" if prefix else entry
    assert load_backbone(student, path, "test").describe() == f"RGB images, weights of {place}"
    assert_holds(student, weights)
    assert recognise(read_weights(path, "test")).match.entry == entry


def test_entries_in_entries(tmp_path, weights):
    path = save({"state": {"model": {"state_dict": prefixed(weights, "net.")}}}, tmp_path / "x.pth")
    student = empty()
    assert load_backbone(student, path, "test").place == "state.model.state_dict under net."
    assert_holds(student, weights)


def test_the_log_says_what_was_taken(tmp_path, caplog, weights):
    content = {"model": prefixed(weights, "encoder."), "optimizer": OPTIMIZER}
    path = save(content, tmp_path / "x.pth")
    with caplog.at_level("INFO"):
        load_teacher(config("mobilefacenet", path), SIZE)
    assert f"{path} (model under encoder.), SHA-256" in caplog.text


BESIDE = {
    "AdaFace's head": HEAD,
    "a classifier": {"fc.weight": torch.zeros(7, SIZE), "fc.bias": torch.zeros(7)},
    "centres": {"kernel": torch.zeros(SIZE, 7)},
    "a margin": {"arc_face.weight": torch.zeros(7, SIZE)},
    "a loss": {"loss.weight": torch.zeros(7, SIZE)},
    "plain values": {"epoch": 3, "names": ["a"]},
    "an averaged model's counter": {"n_averaged": torch.tensor(5)},
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("prefix", ["backbone.", "module."])
def test_class_centres_may_lie_beside_a_network(tmp_path, weights, beside, prefix):
    path, student = save(prefixed(weights, prefix, **beside), tmp_path / "x.pth"), empty()
    load_backbone(student, path, "test")
    assert_holds(student, weights)


def test_nothing_else_may(tmp_path, weights):
    path = tmp_path / "x.pth"
    for key in ("decoder.weight", "backbone.extra.weight", "loss.weight"):
        content = prefixed(weights, "backbone.", **{key: torch.zeros(3, 5)})
        refused(content, rf"1 unexpected keys \({key}\) beside the network under backbone\.", path)
    first = next(iter(weights))
    content = prefixed({key: value for key, value in weights.items() if key != first}, "encoder.")
    refused(content, rf"1 missing keys \({first}\)$", path)
    content = prefixed(weights | {first: torch.zeros(3)}, "encoder.")
    refused(content, rf"1 other shapes \({first} is \(3,\) instead", path)
    larger = network("iresnet34").state_dict()
    message = "unexpected keys .*; it looks like iresnet34, .*: set network=iresnet34"
    refused(prefixed(larger, "net."), message, path, "iresnet18")


# --- an average beside the plain weights

AVERAGES = {
    "entries": lambda plain, average: {
        "state_dict": plain,
        "state_dict_ema": average,
        "optimizer": OPTIMIZER,
    },
    "the average first": lambda plain, average: {"model_ema": average, "model": plain},
    "prefixes": lambda plain, average: {
        **prefixed(plain, "model."),
        **prefixed(average, "model_ema.module."),
        **HEAD,
    },
}


@pytest.mark.parametrize("wrap", AVERAGES.values(), ids=AVERAGES)
def test_the_plain_weights_are_taken_unless_the_path_ends_in_ema(tmp_path, weights, wrap):
    average = others(weights)
    path = save(wrap(weights, average), tmp_path / "x.pth")
    for name, expected in ((path, weights), (f"{path}#ema", average)):
        student = empty()
        assert ("ema" in load_backbone(student, name, "test").place) == (expected is average)
        assert_holds(student, expected)
        teacher = load_teacher(config("mobilefacenet", name), SIZE)
        assert_holds(teacher.network, expected)
        assert teacher.sha256 == digest_of(name)
    assert digest_of(path) == sha256(path) != digest_of(f"{path}#ema")


def test_an_average_alone_is_taken_and_one_that_is_not_there_is_missed(tmp_path, weights):
    path, student = save({"state_dict_ema": weights}, tmp_path / "x.pth"), empty()
    for name in (path, f"{path}#ema"):
        assert load_backbone(student, name, "test").place == "state_dict_ema"
    assert_holds(student, weights)
    path = save({"state_dict": weights}, tmp_path / "y.pth")
    message = r"y.pth holds no exponential average .*only state_dict: leave #ema out"
    with pytest.raises(InputError, match=message):
        load_backbone(student, f"{path}#ema", "test")
    with pytest.raises(InputError, match=rf"test: no file at {tmp_path}/none\.pth"):
        load_backbone(student, tmp_path / "none.pth#ema", "test")


def test_which_of_two_networks_is_meant_is_not_guessed(tmp_path, weights):
    path = tmp_path / "x.pth"
    message = r"holds 2 networks of this kind with different weights \(student, teacher\)"
    refused({"student": weights, "teacher": others(weights)}, message, path)
    student = empty()
    load_backbone(student, save({"state_dict": weights, "backbone": dict(weights)}, path), "test")
    assert_holds(student, weights)


# --- counters of old PyTorch and of converters


def without_counters(weights):
    return {key: value for key, value in weights.items() if not key.endswith(COUNTER)}


@pytest.mark.parametrize("name", ["mobilefacenet", "iresnet18", "ir18", "mbf"])
def test_batchnorms_counters_may_be_missing(tmp_path, name):
    plain = made(name)
    path = save(without_counters(plain.state_dict()), tmp_path / "old.pth")
    expected = {
        key: torch.zeros_like(value) if key.endswith(COUNTER) else value
        for key, value in plain.state_dict().items()
    }
    student = empty(name)
    load_backbone(student, path, "test")
    assert_holds(student, expected)
    teacher = load_teacher(config(name, path), SIZE)
    assert_holds(teacher.network, expected)
    with torch.no_grad():
        assert torch.equal(teacher(IMAGES), plain(IMAGES))
    assert recognise(read_weights(path, "test")).name == name
    with pytest.raises(InputError, match="a network: train/class_centers.py computes"):
        read_kernel(path, "teacher header", SIZE, 5)


def test_no_other_key_may_be(tmp_path, weights):
    content = without_counters(weights)
    last = [key for key in content if key.endswith("running_var")][-1]
    del content[last]
    refused(content, rf"does not fit: 1 missing keys \({last}\)$", tmp_path / "x.pth")


# --- colour orders

LIGHTNING = {"epoch": 3, "global_step": 7, "pytorch-lightning_version": "1.4.0", "callbacks": {}}
OTHERS_HEAD = {"head.weight": torch.zeros(5, SIZE)}
ORDERS = {  # network, content of its weights, the order; "": not known
    "AdaFace's head": ("ir18", lambda w: {"state_dict": prefixed(w, "model.", **HEAD)}, "BGR"),
    "AdaFace's head, compiled": ("ir18", lambda w: prefixed(w, "model._orig_mod.", **HEAD), "BGR"),
    "AdaFace's head, wrapped": (
        "ir18",
        lambda w: prefixed(prefixed(w, "model.", **HEAD), "module."),
        "BGR",
    ),
    "Lightning's own keys": (
        "ir18",
        lambda w: {**LIGHTNING, "state_dict": prefixed(w, "model.")},
        "BGR",
    ),
    "neither": (
        "ir18",
        lambda w: {"epoch": 3, "optimizer": OPTIMIZER, "state_dict": prefixed(w, "model.")},
        "",
    ),
    "neither, compiled": ("ir18", lambda w: prefixed(w, "model._orig_mod."), ""),
    "another's head": ("ir18", lambda w: prefixed(w, "model.", **OTHERS_HEAD), ""),
    "plain": ("ir18", lambda w: w, "RGB"),
    "an entry of that name": ("ir18", lambda w: {"model": w}, "RGB"),
    "another prefix": ("ir18", lambda w: prefixed(w, "backbone."), "RGB"),
    "iresnet, head": (
        "iresnet18",
        lambda w: {**LIGHTNING, "state_dict": prefixed(w, "model.", **HEAD)},
        "RGB",
    ),
    "iresnet": ("iresnet18", lambda w: prefixed(w, "model."), "RGB"),
    "mobilefacenet": (
        "mobilefacenet",
        lambda w: {**LIGHTNING, "state_dict": prefixed(w, "model.")},
        "RGB",
    ),
}


@pytest.mark.parametrize("name, wrap, order", ORDERS.values(), ids=ORDERS)
def test_colour_orders(tmp_path, name, wrap, order):
    plain = made(name)
    path = save(wrap(plain.state_dict()), tmp_path / "x.pth")
    if not order:
        message = r"test: .*x\.pth is an IR network under model\.: .*set color_space=BGR or"
        with pytest.raises(InputError, match=message):
            load_backbone(empty(name), path, "test")
        with pytest.raises(InputError, match="teacher: .*is an IR network under"):
            load_teacher(config(name, path), SIZE)
    for asked, expected in (("auto", order), ("RGB", "RGB"), ("BGR", "BGR")):
        if not expected:
            continue
        student = empty(name)
        loaded = load_backbone(student, path, "test", color_space=asked)
        assert (loaded.color_space, loaded.own_color_space) == (expected, order)
        # the first convolution's channels are exchanged, nothing else changes
        (key, first), *rest = plain.state_dict().items()
        assert torch.equal(student.state_dict()[key], first.flip(1) if expected == "BGR" else first)
        assert all(torch.equal(student.state_dict()[other], value) for other, value in rest)


# --- other kinds of files


def test_programs_are_to_be_exported_to_onnx(tmp_path, weights):
    plain = network("mobilefacenet")
    path = tmp_path / "face.pt"
    with warnings.catch_warnings():
        # PyTorch's own advice not to make such files any more
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(plain, torch.zeros(1, 3, 112, 112)), path)
    message = r"face.pt is a TorchScript model, which is code: export it to ONNX .*\(python -c"
    with pytest.raises(InputError, match=message) as caught:
        load_backbone(plain, path, "checkpoint")
    assert "\n" not in str(caught.value)
    pytest.importorskip("onnx")
    from utils.teacher.onnx import OnnxNetwork

    line = re.search(r'python -c "(.*)"\)', str(caught.value))[1]
    code = line.replace("'face.onnx'", repr(str(tmp_path / "face.onnx")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "advice", "exec"), {})
    exported = OnnxNetwork(tmp_path / "face.onnx")
    with torch.no_grad():
        expected = plain(IMAGES)
    # onnxruntime adds in another order
    atol = 2 * rounding.network(50) * float(expected.abs().max())
    torch.testing.assert_close(exported(IMAGES), expected, rtol=0, atol=atol)
    assert exported.batch == 0
    path.rename(tmp_path / "face.safetensors")
    with pytest.raises(InputError, match="is a TorchScript model"):
        load_backbone(plain, tmp_path / "face.safetensors", "checkpoint")
    with pytest.raises(InputError, match="it looks like a TorchScript model, which is code"):
        load_teacher(config(f"onnx:{tmp_path / 'face.safetensors'}"))
