"""Teachers of every published kind, from files and folders, and everything that is refused and
how.
"""

import logging

import pytest
import torch

from backbones import build_backbone
from tests.teachers import (
    IMAGES,
    SIZE,
    STATED,
    config,
    network,
    prefixed,
    refused,
    repository,
    save,
)
from utils.teacher.load import load_teacher
from utils.teacher.names import TEACHERS
from utils.weights.cvlface import read_configuration
from utils.weights.read import sha256
from utils.weights.recognise import looks_like


@pytest.fixture(scope="module")
def ir18():
    return network()


@pytest.fixture(scope="module")
def features(ir18):
    """What it makes of the images, by the order of its channels."""
    with torch.no_grad():
        return {"RGB": ir18(IMAGES), "BGR": ir18(IMAGES.flip(1))}


# --- what people have
# --------------------------------------------------

# teacher, the file and how its keys are wrapped, is it BGR, where the weights are in the file
KINDS = {
    "this project's, AdaDistill's": ("mobilefacenet", "600backbone.pth", lambda w: w, False, ""),
    "InsightFace": ("iresnet18", "backbone.pth", lambda w: w, False, ""),
    "InsightFace, DistributedDataParallel": (
        "mbf",
        "backbone.pth",
        lambda w: prefixed(w, "module."),
        False,
        " (under module.)",
    ),
    "with SE": ("iresnet18_se", "600backbone.pth", lambda w: w, False, ""),
    "AdaFace": (
        "ir18",
        "adaface_ir18_casia.ckpt",
        lambda w: {"state_dict": prefixed(w, "model.", **{"head.kernel": torch.zeros(SIZE, 3)})},
        True,
        " (state_dict under model.)",
    ),
    "CVLFace's file": (
        "ir18",
        "model.safetensors",
        lambda w: prefixed(w, "model.net."),
        False,
        " (under model.net.)",
    ),
}


def assert_same(features: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the order in which the first convolution adds the three colours: some roundings
    of float32.
    """
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name, file, wrap, bgr, place", KINDS.values(), ids=KINDS)
def test_published_files(tmp_path, caplog, name, file, wrap, bgr, place):
    entry = TEACHERS[name]
    plain = network(entry.network, use_se=entry.use_se)
    path = save(wrap(plain.state_dict()), tmp_path / file)
    with caplog.at_level(logging.INFO):
        teacher = load_teacher(config(name, path), SIZE)
    with torch.no_grad():
        assert_same(teacher(IMAGES), plain(IMAGES.flip(1) if bgr else IMAGES))
    order = "BGR" if bgr else "RGB"
    assert (
        teacher.name,
        teacher.path,
        teacher.sha256,
        teacher.color_space,
        teacher.embedding_size,
    ) == (name, str(path), sha256(path), order, SIZE)
    assert teacher.normalisation == "(x / 255 - 0.5) / 0.5"
    count = f"{sum(parameter.numel() for parameter in plain.parameters()):,}"
    full = f"{name} (iresnet18 with SE)" if entry.use_se else name
    assert caplog.messages == [
        f"Teacher {full}: {count} parameters, 16-d features, 112x112 "
        f"{order} input, (x / 255 - 0.5) / 0.5, {path}{place}, SHA-256 {sha256(path)}"
    ]


LAYOUTS = {
    "published": {},
    "config.json": dict(yaml=None),
    "model.yaml": dict(conf=None),
    "model.pt": dict(file="pretrained_model/model.pt"),
    "other details": dict(conf=STATED | {"start_from": "elsewhere"}),
}


@pytest.mark.parametrize("file", ["config.json", "pretrained_model/model.yaml"])
def test_a_configuration_with_a_byte_order_mark(tmp_path, file):
    other = dict(yaml=None) if file == "config.json" else dict(conf=None)
    folder = repository(tmp_path, {}, **other)
    published = read_configuration(folder)
    (folder / file).write_bytes(b"\xef\xbb\xbf" + (folder / file).read_bytes())
    assert published is not None and read_configuration(folder) == published


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_local_folders(tmp_path, caplog, ir18, features, options):
    folder, file = (
        repository(tmp_path, ir18.state_dict(), **options),
        tmp_path / options.get("file", "model.safetensors"),
    )
    for path in (folder, file):
        teacher = load_teacher(config(path=path))
        assert (
            torch.equal(teacher(IMAGES), features["RGB"])
            and teacher.path == str(file)
            and teacher.color_space == "RGB"
        )
    assert not caplog.messages


@pytest.mark.parametrize("file", ["model.safetensors", "pretrained_model/model.pt"])
def test_a_folder_that_states_bgr(tmp_path, ir18, features, file):
    stated = STATED | {"color_space": "BGR"}
    folder = repository(tmp_path, ir18.state_dict(), file, yaml=stated, conf=stated)
    for path in (folder, folder / file):
        teacher = load_teacher(config(path=path))
        assert_same(teacher(IMAGES), features["BGR"])
        assert teacher.color_space == "BGR"


def test_a_folder_of_insightfaces_network(tmp_path):
    stated = STATED | {"yaml_path": "models/iresnet_insightface/configs/v1_ir18.yaml"}
    plain = network("iresnet18")
    folder = repository(tmp_path, plain.state_dict(), yaml=stated, conf=stated)
    with torch.no_grad():
        assert torch.equal(load_teacher(config("iresnet18", folder))(IMAGES), plain(IMAGES))


def test_the_yaml_counts_as_for_cvlface(tmp_path, caplog, ir18):
    folder = repository(tmp_path, ir18.state_dict(), conf=STATED | {"color_space": "BGR"})
    assert load_teacher(config(path=folder)).color_space == "RGB"
    assert (
        "model.yaml states" in caplog.text
        and "config.json states" not in caplog.text
        and ("the former counts") in caplog.text
    )


def test_color_space_can_be_said(tmp_path, caplog, ir18, features):
    plain, folder = (
        save(ir18.state_dict(), tmp_path / "plain.pth"),
        repository(tmp_path / "folder", ir18.state_dict()),
    )
    adaface = save(
        {"state_dict": prefixed(ir18.state_dict(), "model."), "pytorch-lightning_version": "1.4.0"},
        tmp_path / "x.ckpt",
    )
    teacher = load_teacher(config(path=plain, color_space="BGR"))
    assert_same(teacher(IMAGES), features["BGR"])
    assert teacher.color_space == "BGR"
    assert (
        load_teacher(config(path=adaface, color_space="BGR")).color_space == "BGR"
        and load_teacher(config(path=folder, color_space="RGB")).color_space == "RGB"
    )
    assert not caplog.messages
    assert load_teacher(config(path=adaface, color_space="RGB")).color_space == "RGB"
    assert load_teacher(config(path=folder, color_space="BGR")).color_space == "BGR"
    assert caplog.messages == [
        "color_space=RGB goes against AdaFace's files, which are BGR: the teacher gets RGB",
        "color_space=BGR goes against "
        f"{folder}/pretrained_model/model.yaml, which states RGB: the teacher gets BGR",
    ]


def test_teacher_stays_frozen_and_in_eval_mode(tmp_path, ir18):
    teacher = load_teacher(config(path=save(ir18.state_dict(), tmp_path / "t.pth")), SIZE)
    torch.nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules()) and not any(
        p.requires_grad for p in teacher.parameters()
    )
    assert not teacher.train()(IMAGES.clone().requires_grad_()).requires_grad
    assert all(
        torch.equal(value, ir18.state_dict()[key])
        for key, value in teacher.network.state_dict().items()
    )


def test_loading_draws_no_random_numbers(tmp_path, ir18):
    """A run that has a teacher's features on disk instead goes the same way."""
    path, before = save(ir18.state_dict(), tmp_path / "t.pth"), torch.get_rng_state()
    load_teacher(config(path=path))
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_weights_are_used_in_float32(tmp_path, ir18):
    half = {
        key: value.half() if value.is_floating_point() else value
        for key, value in ir18.state_dict().items()
    }
    teacher = load_teacher(config(path=save(half, tmp_path / "half.pth")))
    assert teacher(IMAGES).dtype == torch.float32 and all(
        p.dtype == torch.float32 for p in teacher.parameters()
    )


# --- what does not fit
# --------------------------------------------------

PUBLISHED_AS = {"ir": ("model.", "AdaFace IR-"), "cvlface": ("model.net.", "CVLFace IR-")}


@pytest.mark.parametrize("name", TEACHERS)
def test_the_weights_of_every_teacher_are_recognised(name):
    entry = TEACHERS[name]
    prefix, likeness = PUBLISHED_AS.get(
        name.rstrip("0123456789").partition("_")[0], ("", name.removesuffix("_se"))
    )
    with torch.device("meta"):
        published = prefixed(
            build_backbone(entry.network, 512, use_se=entry.use_se).state_dict(), prefix
        )
    look = looks_like({"state_dict": published}, "teacher")
    assert likeness in look and "embedding_size=512" in look, look
    assert look.endswith(f": set teacher={entry.network}{'_se' if entry.use_se else ''}")


def test_another_network_is_named_with_its_setting(tmp_path, ir18):
    def wrong(content, file, message, teacher="mobilefacenet"):
        refused(
            rf"teacher: .*{file} does not fit: .*{message}$",
            config(teacher, save(content, tmp_path / file)),
            512,
        )

    w = ir18.state_dict()
    wrong(
        prefixed(w, "model."),
        "ada.ckpt",
        r"it looks like an AdaFace IR-18 checkpoint \(ir18, "
        r"embedding_size=16\): set teacher=ir18",
    )
    wrong(
        prefixed(w, "model.net."),
        "cvl.safetensors",
        r"it looks like a CVLFace IR-18 checkpoint "
        r"\(ir18, embedding_size=16\): set teacher=ir18",
    )
    wrong(w, "ir.pth", "it looks like ir18, embedding_size=16: set teacher=ir18")
    wrong(
        network("iresnet18", use_se=True).state_dict(),
        "se.pth",
        "it looks like iresnet18 with SE=True, embedding_size=16: set teacher=iresnet18_se",
    )
    wrong(
        network("iresnet18").state_dict(),
        "backbone.pth",
        "it looks like iresnet18, embedding_size=16: set teacher=iresnet18",
        "iresnet18_se",
    )
    wrong(
        {"kernel": torch.zeros(SIZE, 5)},
        "header.pth",
        r"it looks like a header \(class "
        r"centres\), not a network: .* pretrained_teacher_header_path .*",
    )
    wrong({"weight": torch.zeros(5000, 512)}, "softmax_fc_gpu_0.pt", "it looks like a header .*")
    wrong(
        {"step": 7, "epoch": 1, "samples": 0, "optimizer": {}, "rng": []},
        "7state.pth",
        r"it "
        r"looks like the state of a run .* in <step>backbone\.pth and .*",
    )
    wrong(
        {key: value for key, value in w.items() if key != "input_layer.0.weight"},
        "part.pth",
        r"1 "
        r"missing keys \(input_layer\.0\.weight\)",
        "ir18",
    )


def test_other_files_are_told_apart(tmp_path, ir18):
    path = save(torch.zeros(7, SIZE), tmp_path / "rank_0_softmax_weight.pt")
    refused("holds a Tensor, not a dict of tensors; it looks like a header", config(path=path))
    path = tmp_path / "w600k_r50.pth"
    path.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:" + bytes(100))
    refused(
        "it looks like an ONNX model: named .onnx it can be evaluated; training takes one only "
        "as a teacher, by teacher=onnx:PATH",
        config("iresnet50", path),
    )


def test_which_weights_are_meant(tmp_path, ir18):
    refused(
        "pretrained_teacher_path=x.pth and teacher_repo_id=someone/teachers both name the "
        "teacher's weights: keep the one that is meant",
        config("ir18", "x.pth", teacher_repo_id="someone/teachers"),
    )
    refused(
        "teacher=onnx:x.onnx names its file itself: empty pretrained_teacher_path",
        config("onnx:x.onnx", "x.pth"),
    )
    refused(
        "teacher=onnx:x.onnx names its file itself: empty teacher_repo_id",
        config("onnx:x.onnx", teacher_repo_id="someone/teachers"),
    )
    refused("teacher: no path is set; train one with run_standalone.sh", config())
    refused(
        f"teacher: no file at {tmp_path}/no.pth; train one with run_standalone.sh",
        config(path=tmp_path / "no.pth"),
    )
    folder = repository(
        tmp_path / "local", ir18.state_dict(), yaml=STATED | {"name": "ir50"}, conf=None
    )
    # before the hub is asked, a path was set
    refused(
        "states the network ir50, not that of teacher=ir18: set teacher=ir50", config(path=folder)
    )
    refused(
        "ir18, not that of teacher=cvlface_ir50",
        config("cvlface_ir50", repository(tmp_path / "other", ir18.state_dict())),
    )


def test_folders_that_are_refused(tmp_path, ir18):
    def wrong(message, teacher="ir18", **options):
        refused(message, config(teacher, repository(tmp_path, {}, **options)))

    refused(
        "teacher: the folder .* has no model.safetensors and no pretrained_model/model.pt$",
        config(path=tmp_path),
    )
    (tmp_path / "600backbone.pth").touch()
    refused(
        "has no model.safetensors .*; name one of its files, 600backbone.pth$",
        config(path=tmp_path),
    )
    wrong("has no configuration of CVLFace's", yaml=None, conf=None)
    (tmp_path / "config.json").write_text('{"network": "ir18"}')
    refused("has no configuration of CVLFace's", config(path=tmp_path))
    wrong(
        "states the network ir18, not that of teacher=iresnet18_se: set teacher=ir18",
        "iresnet18_se",
    )
    wrong(
        "model.yaml states output_dim 16, but teacher=cvlface_ir50 has 512: set teacher=ir50",
        "cvlface_ir50",
        yaml=STATED | {"name": "ir50"},
    )
    wrong(
        "states color_space BGR, but teacher=cvlface_ir50 has RGB: set teacher=ir50, which goes "
        "by the configuration",
        "cvlface_ir50",
        yaml=STATED | {"name": "ir50", "color_space": "BGR", "output_dim": 512},
    )
    wrong(
        "states the network vit_kprpe base, which cannot be built here .*: export it to ONNX",
        yaml=STATED | {"name": "base", "yaml_path": "models/vit_kprpe/configs/v1_base.yaml"},
    )
    wrong(
        r"states input_size \[3, 224, 224\], but images here are \[3, 112, 112\]",
        yaml=STATED | {"input_size": [3, 224, 224]},
    )
    wrong("states color_space 'GRB', which is neither", yaml=STATED | {"color_space": "GRB"})
    wrong("states output_dim 'many'", yaml=STATED | {"output_dim": "many"})
    wrong("does not state name, color_space, input_size, output_dim", yaml={"name": "ir18"})
    (tmp_path / "pretrained_model" / "model.yaml").write_text("a: [")
    refused("model.yaml is unreadable", config(path=tmp_path))
    (tmp_path / "pretrained_model" / "model.yaml").write_text(
        "!!python/object/apply:os.system ['exit 1']"
    )
    refused("model.yaml is unreadable", config(path=tmp_path))
    (tmp_path / "pretrained_model" / "model.yaml").unlink()
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    refused("config.json is unreadable", config(path=tmp_path))
    folder = repository(tmp_path / "size", ir18.state_dict(), yaml=STATED | {"output_dim": 512})
    refused(
        "model.yaml states output_dim 512, but the features of .*model.safetensors have 16 "
        "dimensions",
        config(path=folder),
    )


def test_another_embedding_size(tmp_path, ir18):
    path = save(ir18.state_dict(), tmp_path / "t.pth")
    refused(
        r"teacher: ir18 \(.*t.pth\) has 16-d features, but embedding_size=512: the student "
        r"learns in the teacher's space: set embedding_size=16, "
        "or choose a teacher of 512 dimensions",
        config(path=path),
        512,
    )
    assert load_teacher(config(path=path)).embedding_size == 16
