"""Checkpoints of every published format, everything that is refused and how, and what a run's
folder keeps.
"""

import os
import pickle
import shutil
import subprocess
import sys
import types
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from backbones import build_backbone
from tests.commands import LIMIT
from utils.errors import InputError
from utils.run import folder as run_folder
from utils.run.folder import RunFolder
from utils.weights.class_centers import read_kernel
from utils.weights.load import load_backbone
from utils.weights.read import read_tensors

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
ROOT = Path(__file__).resolve().parents[2]
SIZE = 16


def network(name="mobilefacenet", size=SIZE, seed=0, **options):
    torch.manual_seed(seed)
    return build_backbone(name, size, **options)


@pytest.fixture(scope="module")
def weights():
    return network(seed=1).state_dict()


def prefixed(weights, prefix, **others):
    return {prefix + key: value for key, value in weights.items()} | others


def save(content, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in content.items()}, path)
    else:
        torch.save(content, path)
    return path


def assert_holds(student: torch.nn.Module, weights) -> None:
    for key, value in student.state_dict().items():
        assert torch.equal(value, weights[key]), key


# --- published formats
# --------------------------------------------------

HEAD = {
    "head.kernel": torch.zeros(SIZE, 3),
    "head.t": torch.zeros(1),
    "head.batch_mean": torch.ones(1),
}
FORMATS = {
    "AdaDistill, InsightFace": ("600backbone.pth", lambda w: w, ""),
    "arcface_torch's state": (
        "checkpoint_gpu_0.pt",
        lambda w: {
            "epoch": 3,
            "state_dict_backbone": w,
            "state_dict_softmax_fc": {"weight": torch.zeros(5, SIZE)},
            "state_optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        },
        "state_dict_backbone",
    ),
    "DistributedDataParallel": ("backbone.pth", lambda w: prefixed(w, "module."), "under module."),
    "torch.compile": (
        "backbone.pth",
        lambda w: prefixed(w, "_orig_mod.module."),
        "under _orig_mod.module.",
    ),
    "AdaFace": (
        "adaface.ckpt",
        lambda w: {"epoch": 25, "state_dict": prefixed(w, "model.", **HEAD)},
        "state_dict under model.",
    ),
    "CVLFace": ("model.safetensors", lambda w: prefixed(w, "model.net."), "under model.net."),
    "CVLFace as .pth": ("model.pth", lambda w: prefixed(w, "model.net."), "under model.net."),
    "CVLFace's model.pt": ("model.pt", lambda w: prefixed(w, "net."), "under net."),
}


@pytest.mark.parametrize("file, wrap, place", FORMATS.values(), ids=FORMATS)
def test_published_formats(weights, tmp_path, file, wrap, place):
    path, student = save(wrap(weights), tmp_path / file), network()
    assert load_backbone(student, path, "test").place == place
    assert_holds(student, weights)


@pytest.fixture
def lightning(monkeypatch):
    """Modules named as PyTorch Lightning's, while a checkpoint is written; gone when it is read, as
    where Lightning is not installed.
    """
    callbacks, parsing = (
        types.ModuleType("pytorch_lightning.callbacks.model_checkpoint"),
        types.ModuleType("pytorch_lightning.utilities.parsing"),
    )
    callbacks.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": callbacks.__name__})
    parsing.AttributeDict = type("AttributeDict", (dict,), {"__module__": parsing.__name__})
    with monkeypatch.context() as patch:
        for name in (
            "pytorch_lightning",
            "pytorch_lightning.callbacks",
            "pytorch_lightning.utilities",
        ):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, callbacks.__name__, callbacks)
        patch.setitem(sys.modules, parsing.__name__, parsing)
        yield callbacks.ModelCheckpoint, parsing.AttributeDict, patch


def test_lightning_checkpoint_without_lightning(weights, tmp_path, lightning):
    model_checkpoint, attributes, patch = lightning
    keeper = model_checkpoint()
    keeper.best_model_path, keeper.hook = "epoch=24.ckpt", print
    content = {
        "epoch": 25,
        "callbacks": {
            model_checkpoint: {"best_model_score": torch.tensor(0.9)},
            "kept": model_checkpoint(),
        },
        "hyper_parameters": attributes(arch="ir_50", m=0.4),
        "hparams": Namespace(head="adaface", lr=0.1),
        "lr_schedulers": [{"milestones": Counter([12, 20])}],
        "state_dict": prefixed(weights, "model.", **HEAD),
    }
    path = save(content, tmp_path / "adaface_ir50.ckpt")
    save(content | {"callbacks": keeper}, tmp_path / "hook.ckpt")
    patch.undo()
    safe = set(torch.serialization.get_safe_globals())
    assert "pytorch_lightning" not in sys.modules
    assert load_backbone(network(), path, "test").place == "state_dict under model."
    kept = read_tensors(path, "test")
    assert kept["hyper_parameters"] == {"arch": "ir_50", "m": 0.4}, "plain values stay"
    assert not hasattr(kept["hparams"], "lr"), "objects are empty"
    with pytest.raises(InputError, match="it asks to load print"):
        read_tensors(tmp_path / "hook.ckpt", "test")
    assert set(torch.serialization.get_safe_globals()) == safe, (
        "the stand-ins count for one file only"
    )


# --- what is refused
# --------------------------------------------------


class Payload:
    """Unpickles as a call; the file must not appear."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "write",
    [
        torch.save,
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda content, path: path.write_bytes(pickle.dumps(content, 2)),
        lambda content, path: path.write_bytes(pickle.dumps(content)),
    ],
    ids=["zip", "legacy", "pickle", "new pickle"],
)
@pytest.mark.parametrize(
    "function, name",
    [(os.system, "posix.system"), (eval, "eval"), (shutil.copyfile, "shutil.copyfile")],
)
def test_a_pickle_that_runs_code_is_refused(weights, tmp_path, write, function, name):
    target, path = tmp_path / "executed", tmp_path / "600backbone.pth"
    arguments = {
        eval: [f"open({str(target)!r}, 'w')"],
        os.system: [f"touch {target}"],
        shutil.copyfile: [str(path), str(target)],
    }[function]
    write({**weights, "x": Payload(function, *arguments)}, path)
    with pytest.raises(
        InputError, match=r"teacher: .*600backbone\.pth (was refused|is no readable)"
    ):
        load_backbone(network(), path, "teacher")
    assert not target.exists()
    if write is torch.save:
        with pytest.raises(InputError, match=rf"asks to load {name}, which is code"):
            load_backbone(network(), path, "teacher")


DAMAGED = {
    "empty": (b"", r"\)"),
    "text": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 174664256\n",
        r"; "
        r"it looks like a Git LFS pointer .*\(git lfs pull\)",
    ),
    "html": (
        b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>",
        "; it looks like a web page .*download it again",
    ),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(100), ""),
    "end of a pickle": (b"\x80\x02}q\x00.", ""),
    "onnx": (
        b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:" + bytes(100),
        "; it looks like an ONNX "
        "model: named .onnx it can be evaluated; training takes one only as a teacher, by "
        "teacher=onnx:PATH",
    ),
}


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("content, look", DAMAGED.values(), ids=DAMAGED)
def test_what_is_no_checkpoint(tmp_path, content, look, suffix):
    path = tmp_path / f"teacher{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"teacher: .*teacher.*{look}$") as caught:
        load_backbone(network(), path, "teacher")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_cut_off_and_damaged_files_are_one_line(tmp_path, legacy):
    whole, path = tmp_path / "whole.pth", tmp_path / "part.pth"
    torch.save(
        {"kernel": torch.rand(4, 5), "step": 7, "names": ["a", "b"]},
        whole,
        _use_new_zipfile_serialization=not legacy,
    )
    data, random = whole.read_bytes(), np.random.default_rng(0)
    for length in range(0, len(data) - 1, 7):
        path.write_bytes(data[:length])
        with pytest.raises(InputError) as caught:
            read_tensors(path, "test")
        assert "it looks like a PyTorch checkpoint" not in str(caught.value)
    # a flipped byte may also go unnoticed, but nothing else may come out
    for _ in range(300):
        damaged = bytearray(data)
        damaged[random.integers(len(data))] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        try:
            read_tensors(path, "test")
        except InputError as error:
            assert "\n" not in str(error)


def test_cut_off_safetensors(weights, tmp_path):
    path = save(weights, tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"no readable checkpoint \([^;]*\)$"):
        load_backbone(network(), path, "teacher")


def test_files_under_another_formats_name(weights, tmp_path):
    save(weights, tmp_path / "model.safetensors").rename(tmp_path / "model.pth")
    with pytest.raises(
        InputError,
        match=r"model\.pth .*; it looks like a safetensors file: name "
        r"it \*\.safetensors",
    ):
        load_backbone(network(), tmp_path / "model.pth", "teacher")
    save(weights, tmp_path / "backbone.pth").rename(tmp_path / "backbone.safetensors")
    with pytest.raises(
        InputError,
        match=r"backbone\.safetensors .*; it looks like a PyTorch "
        r"checkpoint: name it \*\.pth",
    ):
        load_backbone(network(), tmp_path / "backbone.safetensors", "teacher")


def test_missing_file_says_where_and_how(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"teacher: no file at {tmp_path}/no\.pth; train one"):
        load_backbone(network(), "no.pth", "teacher", "train one")
    with pytest.raises(InputError, match="teacher: no path is set; train one"):
        load_backbone(network(), "", "teacher", "train one")
    with pytest.raises(InputError, match="no file at"):
        load_backbone(network(), tmp_path, "teacher")


@pytest.mark.parametrize(
    "made, look",
    [
        (
            dict(name="iresnet18"),
            "iresnet18, embedding_size=16: set network=iresnet18 embedding_size=16",
        ),
        (
            dict(name="iresnet18", use_se=True),
            "iresnet18 with SE=True, embedding_size=16: set "
            "network=iresnet18 SE=True embedding_size=16",
        ),
        (dict(name="ir18"), "ir18, embedding_size=16: set network=ir18 embedding_size=16"),
        (dict(name="mbf", size=32), "mbf, embedding_size=32: set network=mbf embedding_size=32"),
        (
            dict(name="mobilefacenet", size=32),
            "mobilefacenet, embedding_size=32: set network=mobilefacenet embedding_size=32",
        ),
    ],
)
def test_another_network_is_named(tmp_path, made, look):
    path, student = save(network(**made).state_dict(), tmp_path / "600backbone.pth"), network()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    with pytest.raises(
        InputError,
        match=r"does not fit: .*(missing keys|other shapes).*it looks "
        rf"like {look}$",
    ):
        load_backbone(student, path, "teacher")
    assert_holds(student, before)


def test_other_contents_are_named(weights, tmp_path):
    first = next(iter(weights))
    for content, message in [
        (
            {"kernel": torch.zeros(SIZE, 3)},
            "it looks like a header .* belongs to "
            "pretrained_teacher_header_path or pretrained_header_path",
        ),
        ({"weight": torch.zeros(3, SIZE)}, "it looks like a header"),
        ({"state_dict_softmax_fc": {"weight": torch.zeros(3, SIZE)}}, "it looks like a header"),
        (
            {
                "method": "AdaDistill",
                "step": 9,
                "epoch": 1,
                "samples": 0,
                "optimizer": {},
                "rng": [],
            },
            r"it "
            r"looks like the state of a run .*backbone\.pth",
        ),
        (
            prefixed(network("ir18").state_dict(), "model."),
            r"it looks like an AdaFace IR-18 "
            r"checkpoint \(ir18, embedding_size=16\): set network=ir18",
        ),
        (
            prefixed(network("ir18").state_dict(), "net."),
            "it looks like a CVLFace IR-18 checkpoint",
        ),
        ({**weights, first: 3}, f"1 other shapes \\({first} is int instead of"),
        (
            {key: value for key, value in weights.items() if key != first},
            f"1 missing keys \\({first}\\)",
        ),
        ({**weights, "extra.weight": torch.zeros(1)}, r"1 unexpected keys \(extra\.weight\)"),
        (
            prefixed(weights, "model.", **{"loss.weight": torch.zeros(1)}),
            r"1 unexpected keys "
            r"\(loss\.weight\)",
        ),
        ({1: torch.zeros(1)}, r"1 unexpected keys \(1\)"),
        ({}, "missing keys"),
        ([torch.zeros(1)], "holds a list, not a dict of tensors$"),
        (torch.zeros(1), "holds a Tensor, not a dict of tensors$"),
        (torch.zeros(3, SIZE), "holds a Tensor, not a dict of tensors; it looks like a header"),
    ]:
        with pytest.raises(InputError, match=message):
            load_backbone(network(), save(content, tmp_path / "x.pth"), "teacher")


# --- class centres
# --------------------------------------------------

CENTERS = torch.rand(SIZE, 5, generator=torch.Generator().manual_seed(3))
HEADERS = {
    "AdaDistill": ("600header.pth", {"kernel": CENTERS.half(), "batch_mean": torch.zeros(1)}),
    "AdaFace": (
        "adaface.ckpt",
        {
            "state_dict": {
                "model.input_layer.0.weight": torch.zeros(2),
                "head.kernel": CENTERS.half(),
            }
        },
    ),
    "arcface_torch, one process": ("softmax_fc_gpu_0.pt", {"weight": CENTERS.half().t()}),
    "arcface_torch, AdamW": ("header.pt", {"weight_activated": CENTERS.half().t()}),
    "arcface_torch, state": (
        "checkpoint_gpu_0.pt",
        {
            "epoch": 1,
            "state_dict_backbone": {"fc.weight": torch.zeros(SIZE, 5)},
            "state_dict_softmax_fc": {"weight": CENTERS.half().t()},
        },
    ),
    "arcface_torch, 2021": ("rank_0_softmax_weight.pt", CENTERS.half().t().contiguous()),
    "CVLFace": ("classifier_rank0.pt", {"partial_fc.weight": CENTERS.half().t()}),
    "CVLFace, one process": ("classifier.pt", {"classifier.weight": CENTERS.half().t()}),
    "DistributedDataParallel": ("header.pth", {"module.kernel": CENTERS.half()}),
    "safetensors": ("header.safetensors", {"kernel": CENTERS.half()}),
}


@pytest.mark.parametrize("file, content", HEADERS.values(), ids=HEADERS)
def test_class_centres(tmp_path, file, content):
    kernel = read_kernel(save(content, tmp_path / file), "teacher header", SIZE, 5)
    assert kernel.dtype == torch.float32 and torch.equal(kernel, CENTERS.half().float())


def test_the_key_decides_which_axis_the_classes_are(tmp_path):
    square = torch.rand(SIZE, SIZE)
    for content, expected in [
        ({"kernel": square}, square),
        ({"weight": square}, square.t()),
        (square, square.t()),
        ({"head.kernel": square}, square),
    ]:
        assert torch.equal(
            read_kernel(save(content, tmp_path / "header.pth"), "test", SIZE, SIZE), expected
        )


@pytest.mark.parametrize(
    "content, message",
    [
        (
            {"kernel": torch.zeros(SIZE, 7)},
            r"teacher header: .*class centres \(16, 7\), but "
            r"\(embedding_size, num_classes\) of this run is \(16, 5\)$",
        ),
        ({"kernel": torch.zeros(5, SIZE)}, r"class centres \(5, 16\), but .* is \(16, 5\)$"),
        (
            {"kernel": torch.zeros(8, 5)},
            r"class centres \(8, 5\), but .* is \(16, 5\); the student "
            r"learns in the space of these centres: set embedding_size=8",
        ),
        ({"weight": torch.zeros(SIZE, 5)}, r"class centres \(5, 16\), but"),
        ({"kernel": torch.full((SIZE, 5), torch.nan)}, "holds class centres that are not finite"),
        ({"weight": torch.zeros(5)}, "has no class centres .*its keys are weight$"),
        ({"kernel": 3}, "has no class centres .*its keys are kernel$"),
        (
            {"optimizer": {}, "rng": [], "step": 1, "epoch": 1, "samples": 0},
            r"its keys are optimizer, "
            r".*; it looks like the state of a run .*header\.pth",
        ),
        ([CENTERS], "holds a list, not class centres"),
        (torch.zeros(5), "holds a Tensor, not class centres"),
    ],
)
def test_other_class_centres_are_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_kernel(save(content, tmp_path / "header.pth"), "teacher header", SIZE, 5)


def test_a_network_holds_no_class_centres(tmp_path, weights):
    for content in (weights, {"state_dict": prefixed(weights, "model.")}):
        with pytest.raises(
            InputError,
            match="looks like mobilefacenet, a network: "
            "train/class_centers.py computes the class centres of one",
        ):
            read_kernel(save(content, tmp_path / "600backbone.pth"), "teacher header", SIZE, 5)
    with pytest.raises(InputError, match="teacher header: no file at .*no.pth; train one"):
        read_kernel(tmp_path / "no.pth", "teacher header", SIZE, 5, "train one")
    with pytest.raises(InputError, match="teacher header: no path is set; train one"):
        read_kernel("", "teacher header", SIZE, 5, "train one")


# 11 ranks: an order of names would put 10 before 2; 27: the first five ranks hold three classes,
# the others two
CLASSES, RANKS = 27, 11
SHARES = {
    "checkpoint_gpu_{}.pt": lambda weight: {
        "epoch": 1,
        "state_dict_backbone": {},
        "state_dict_softmax_fc": {"weight": weight},
    },
    "softmax_fc_gpu_{}.pt": lambda weight: {"weight": weight},
    "rank_{}_softmax_weight.pt": lambda weight: weight,
    "rank:{}_softmax_weight.pt": lambda weight: weight,
    "classifier_rank{}.pt": lambda weight: {"partial_fc.weight": weight},
}


def write_shares(
    folder: Path, name="softmax_fc_gpu_{}.pt", ranks=RANKS, classes=CLASSES
) -> torch.Tensor:
    """The shares of all ranks, as Partial FC deals the classes out, and another file; returns the
    whole (D, C).
    """
    weight = torch.rand(classes, SIZE)
    start = 0
    for rank in range(ranks):
        count = classes // ranks + int(rank < classes % ranks)
        save(SHARES[name](weight[start : start + count].clone()), folder / name.format(rank))
        start += count
    save({"x": 1}, folder / "backbone.pth")
    return weight.t()


@pytest.mark.parametrize("name", SHARES)
def test_shares_of_all_ranks(tmp_path, name):
    whole = write_shares(tmp_path, name)
    if name.startswith("rank_"):
        save(torch.zeros(3, SIZE), tmp_path / "rank_0_softmax_weight_mom.pt")
    for path in (tmp_path, tmp_path / name.format("*"), str(tmp_path / name.format("*"))):
        assert torch.equal(read_kernel(path, "teacher header", SIZE, CLASSES), whole)


def test_shares_may_have_other_names(tmp_path):
    whole = write_shares(tmp_path)
    for file in tmp_path.glob("softmax*"):
        file.rename(tmp_path / f"v2_fc-{file.stem.rpartition('_')[2]}.pth")
    assert torch.equal(read_kernel(tmp_path / "v2_fc-*.pth", "test", SIZE, CLASSES), whole)


def test_shares_that_do_not_make_a_whole(tmp_path):
    def refused(message, path=tmp_path, size=SIZE, classes=CLASSES):
        with pytest.raises(InputError, match=message):
            read_kernel(path, "teacher header", size, classes)

    refused(
        r"teacher header: .* holds no checkpoint_gpu_\*\.pt, .*name the header's file, or a "
        r"pattern such as"
    )
    refused("matches no file", tmp_path / "softmax_fc_gpu_*.pt")
    write_shares(tmp_path)
    refused(
        r"\(16, 3\), but .* is \(16, 27\); softmax_fc_gpu_0.pt looks like one rank's share: "
        r"name its folder",
        tmp_path / "softmax_fc_gpu_0.pt",
    )
    refused(
        r"gpu_4.pt holds 3 classes, but rank 4 of 11 has 2 of num_classes=26: files of other "
        r"ranks are missing, or .*another training set",
        classes=26,
    )
    refused(r"class centres \(16, 27\), but .* \(8, 27\); .*set embedding_size=16", size=8)
    (tmp_path / "softmax_fc_gpu_10.pt").unlink()
    refused(
        "softmax_fc_gpu_5.pt holds 2 classes, but rank 5 of 10 has 3 of num_classes=27: files "
        "of other ranks are missing"
    )
    save({"weight": torch.zeros(3, 8)}, tmp_path / "softmax_fc_gpu_1.pt")
    refused(r"gpu_1.pt holds 8-d class centres, softmax_fc_gpu_0.pt 16-d ones")
    (tmp_path / "softmax_fc_gpu_4.pt").unlink()
    refused("no file of rank 4 beside .*softmax_fc_gpu_9.pt")
    save(torch.zeros(3, SIZE), tmp_path / "rank_0_softmax_weight.pt")
    refused(
        r"matches files of several kinds: name one, rank_\*_softmax_weight.pt or "
        r"softmax_fc_gpu_\*.pt"
    )
    save(torch.zeros(3, SIZE), tmp_path / "rank_0_softmax_weight_mom.pt")
    refused(
        r"are momenta of the optimizer, the class centres are in rank_\*_softmax_weight.pt",
        tmp_path / "rank_*_mom.pt",
    )


# --- writing
# --------------------------------------------------


@pytest.mark.processes
def test_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A file size limit stands for the full disk: the write fails half-way."""
    path = tmp_path / "600backbone.pth"
    run_folder.save({"weight": torch.ones(3)}, path)
    code = f"""
import resource, sys, torch
from pathlib import Path
from utils.run.folder import save
from utils.errors import run
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
run(lambda: save({{"weight": torch.ones(1_000_000)}}, Path({str(path)!r})))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=LIMIT
    )
    assert (
        done.returncode == 1
        and done.stderr.startswith(f"error: cannot save {path}")
        and done.stderr.count("\n") == 1
    ), done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["600backbone.pth"]
    assert torch.equal(read_tensors(path, "test")["weight"], torch.ones(3))


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="output: cannot write to .*choose another folder"):
        RunFolder(tmp_path / "file" / "run").prepare()


def test_half_written_files_are_swept(tmp_path):
    for name in ("5backbone.pth", "10ema.pth.tmp-77", "somebody's.pth.tmp-77"):
        (tmp_path / name).touch()
    RunFolder(tmp_path).sweep()
    assert files(tmp_path) == {"5backbone.pth", "somebody's.pth.tmp-77"}


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def whole(step: int) -> set[str]:
    return {f"{step}{part}.pth" for part in ("backbone", "header", "state")}


def test_which_files_a_run_keeps(tmp_path):
    """Epochs end at steps 4 and 8 (samples 0); the states between them go with their weights, those
    of epoch ends go alone.
    """
    folder = RunFolder(tmp_path)
    run_folder.save({}, tmp_path / "best_backbone.pth")
    for step in (2, 4, 6, 8, 10):
        folder.save(
            step,
            {"w": torch.ones(1)},
            {"kernel": torch.ones(1)},
            {"step": step, "samples": step % 4},
            keep_states=2,
        )
    assert files(tmp_path) == {"best_backbone.pth"} | {"4backbone.pth", "4header.pth"} | whole(
        8
    ) | whole(10)
    assert folder.complete_steps() == [8, 10] and folder.steps("backbone") == [4, 8, 10]


def test_an_average_of_the_weights_goes_with_them(tmp_path):
    """Kept with an epoch's end (step 4), gone with step 2; one of an earlier try of step 8 goes."""
    folder, weights = RunFolder(tmp_path), {"w": torch.ones(1)}
    for step, average in ((2, weights), (4, weights), (6, weights), (8, weights), (8, None)):
        state = {"step": step, "samples": step % 4}
        folder.save(step, weights, {"kernel": torch.ones(1)}, state, 2, average)
    assert {"4ema.pth", "6ema.pth"} == {name for name in files(tmp_path) if "ema" in name}
    folder.file(6, "ema").write_bytes(b"cut off")
    assert str(folder.file(6, "ema")) in folder.damage(6) and not folder.damage(8)


def test_a_step_is_complete_with_all_its_files(tmp_path, weights):
    folder = RunFolder(tmp_path)
    folder.save(100, weights, {"kernel": torch.ones(2)}, {"step": 100, "samples": 0}, keep_states=2)
    folder.save(20, weights, {"kernel": torch.ones(1)}, {"step": 20, "samples": 0}, keep_states=2)
    assert folder.complete_steps() == [20, 100]
    student = network()
    header, state = folder.load(20, student), folder.load_state(20)
    assert_holds(student, weights)
    assert state["step"] == 20 and torch.equal(header["kernel"], torch.ones(1))
    folder.file(100, "header").unlink()
    assert folder.complete_steps() == [20]


def test_a_step_has_its_header_in_one_form(tmp_path):
    """A run that went back and changed header_format leaves no older header of the step behind."""
    folder, state = RunFolder(tmp_path), {"samples": 0}
    for header in (None, {"kernel": torch.ones(2, 3)}, None):
        if header is None:
            (tmp_path / "4header.tmp").mkdir()
            (tmp_path / "4header.tmp" / "shares").touch()
        folder.save(4, {"weight": torch.ones(1)}, header, state, 2)
        assert folder.complete_steps() == [4]
        assert files(tmp_path) == {
            "4backbone.pth",
            "4state.pth",
            "4header.pth" if header else "4header",
        }
