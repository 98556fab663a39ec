"""Checkpoints of every published format, everything that is refused and how, and what a run's folder keeps."""

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
from utils import checkpoint
from utils.checkpoint import RunFolder, load_backbone, network_weights, read_kernel, read_tensors
from utils.errors import InputError
from utils.teacher import load_teacher

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
ROOT = Path(checkpoint.__file__).resolve().parents[1]
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


def assert_holds(found: torch.nn.Module, weights) -> None:
    for key, value in found.state_dict().items():
        assert torch.equal(value, weights[key]), key


# --- published formats --------------------------------------------------------------------------------------------------------------

HEAD = {"head.kernel": torch.zeros(SIZE, 3), "head.t": torch.zeros(1), "head.batch_mean": torch.ones(1)}
FORMATS = {
    "AdaDistill, InsightFace": ("600backbone.pth", lambda w: w, "", False),
    "DistributedDataParallel": ("backbone.pth", lambda w: prefixed(w, "module."), "", False),
    "torch.compile": ("backbone.pth", lambda w: prefixed(w, "_orig_mod.module."), "", False),
    "AdaFace": ("adaface.ckpt", lambda w: {"epoch": 25, "state_dict": prefixed(w, "model.", **HEAD)}, "model.", True),
    "CVLFace": ("model.safetensors", lambda w: prefixed(w, "model.net."), "model.net.", False),
    "CVLFace as .pth": ("model.pth", lambda w: prefixed(w, "model.net."), "model.net.", False),
}


@pytest.mark.parametrize("file, wrap, prefix, bgr", FORMATS.values(), ids=FORMATS)
def test_published_formats(weights, tmp_path, file, wrap, prefix, bgr):
    path, student = save(wrap(weights), tmp_path / file), network()
    assert load_backbone(student, path, "test") == prefix
    assert_holds(student, weights)
    teacher = load_teacher("mobilefacenet", path, SIZE)
    assert_holds(teacher.network, weights)
    images = torch.rand(2, 3, 112, 112)
    torch.testing.assert_close(teacher(images), student.eval()(images.flip(1) if bgr else images))


def test_color_space_can_be_said(weights, tmp_path):
    path = save(weights, tmp_path / "converted.pth")
    assert load_teacher("mobilefacenet", path, SIZE, "BGR").bgr and not load_teacher("mobilefacenet", path, SIZE, "auto").bgr
    assert not load_teacher("mobilefacenet", save(FORMATS["AdaFace"][1](weights), tmp_path / "x.ckpt"), SIZE, "RGB").bgr


def test_only_adafaces_class_centres_may_stand_beside_the_network():
    assert network_weights({"state_dict": {"model.a": 1, "head.kernel": 2, "other.b": 3}}) == ({"a": 1, "other.b": 3}, "model.")
    assert network_weights({"a": 1, "head.b": 2}) == ({"a": 1, "head.b": 2}, "")
    assert network_weights({}) == ({}, "") and network_weights({"state_dict": 3}) == ({}, "")


@pytest.fixture
def lightning(monkeypatch):
    """Modules named as PyTorch Lightning's, while a checkpoint is written; gone when it is read, as where Lightning is not installed."""
    callbacks, parsing = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint"), types.ModuleType("pytorch_lightning.utilities.parsing")
    callbacks.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": callbacks.__name__})
    parsing.AttributeDict = type("AttributeDict", (dict,), {"__module__": parsing.__name__})
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.utilities"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, callbacks.__name__, callbacks)
        patch.setitem(sys.modules, parsing.__name__, parsing)
        yield callbacks.ModelCheckpoint, parsing.AttributeDict, patch


def test_lightning_checkpoint_without_lightning(weights, tmp_path, lightning):
    model_checkpoint, attributes, patch = lightning
    keeper = model_checkpoint()
    keeper.best_model_path, keeper.hook = "epoch=24.ckpt", print
    content = {"epoch": 25, "callbacks": {model_checkpoint: {"best_model_score": torch.tensor(0.9)}, "kept": model_checkpoint()},
               "hyper_parameters": attributes(arch="ir_50", m=0.4), "hparams": Namespace(head="adaface", lr=0.1),
               "lr_schedulers": [{"milestones": Counter([12, 20])}],
               "state_dict": prefixed(weights, "model.", **HEAD)}
    path = save(content, tmp_path / "adaface_ir50.ckpt")
    save(content | {"callbacks": keeper}, tmp_path / "hook.ckpt")
    patch.undo()
    safe = set(torch.serialization.get_safe_globals())
    assert "pytorch_lightning" not in sys.modules
    assert load_teacher("mobilefacenet", path, SIZE).bgr
    found = read_tensors(path, "test")
    assert found["hyper_parameters"] == {"arch": "ir_50", "m": 0.4} and not hasattr(found["hparams"], "lr"), "plain values stay, objects are empty"
    with pytest.raises(InputError, match="it asks to load print"):
        read_tensors(tmp_path / "hook.ckpt", "test")
    assert set(torch.serialization.get_safe_globals()) == safe, "the stand-ins count for one file only"


# --- what is refused ------------------------------------------------------------------------------------------------------------------

class Payload:
    """Unpickles as a call; the file must not appear."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("write", [torch.save, lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
                                   lambda content, path: path.write_bytes(pickle.dumps(content, 2)), lambda content, path: path.write_bytes(pickle.dumps(content))],
                         ids=["zip", "legacy", "pickle", "new pickle"])
@pytest.mark.parametrize("function, name", [(os.system, "posix.system"), (eval, "eval"), (shutil.copyfile, "shutil.copyfile")])
def test_a_pickle_that_runs_code_is_refused(weights, tmp_path, write, function, name):
    target, path = tmp_path / "executed", tmp_path / "600backbone.pth"
    arguments = {eval: [f"open({str(target)!r}, 'w')"], os.system: [f"touch {target}"], shutil.copyfile: [str(path), str(target)]}[function]
    write({**weights, "x": Payload(function, *arguments)}, path)
    with pytest.raises(InputError, match=r"teacher: .*600backbone\.pth (was refused|is no readable)"):
        load_backbone(network(), path, "teacher")
    assert not target.exists()
    if write is torch.save:
        with pytest.raises(InputError, match=rf"asks to load {name}, which is code"):
            load_backbone(network(), path, "teacher")


DAMAGED = {
    "empty": b"",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 174664256\n",
    "html": b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>",
    "image": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "end of a pickle": b"\x80\x02}q\x00.",
}


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_what_is_no_checkpoint(tmp_path, content, suffix):
    path = tmp_path / f"teacher{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match="teacher: .*teacher") as caught:
        load_backbone(network(), path, "teacher")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_cut_off_and_damaged_files_are_one_line(tmp_path, legacy):
    whole, path = tmp_path / "whole.pth", tmp_path / "part.pth"
    torch.save({"kernel": torch.rand(4, 5), "step": 7, "names": ["a", "b"]}, whole, _use_new_zipfile_serialization=not legacy)
    data, random = whole.read_bytes(), np.random.default_rng(0)
    for length in range(0, len(data) - 1, 7):
        path.write_bytes(data[:length])
        with pytest.raises(InputError):
            read_tensors(path, "test")
    for _ in range(300):        # a flipped byte may also go unnoticed, but nothing else may come out
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
    with pytest.raises(InputError, match="no readable checkpoint"):
        load_backbone(network(), path, "teacher")


def test_missing_file_says_where_and_how(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"teacher: no file at {tmp_path}/no\.pth; train one"):
        load_backbone(network(), "no.pth", "teacher", "train one")
    with pytest.raises(InputError, match="teacher: no path is set; train one"):
        load_backbone(network(), "", "teacher", "train one")
    with pytest.raises(InputError, match="no file at"):
        load_backbone(network(), tmp_path, "teacher")


@pytest.mark.parametrize("made, look", [
    (dict(name="iresnet18"), "iresnet18, embedding_size=16"),
    (dict(name="iresnet18", use_se=True), "iresnet18 with SE=True, embedding_size=16"),
    (dict(name="ir18"), "ir18, embedding_size=16"),
    (dict(name="mbf", size=32), "mbf, embedding_size=32"),
    (dict(name="mobilefacenet", size=32), "mobilefacenet, embedding_size=32"),
])
def test_another_network_is_named(tmp_path, made, look):
    path, student = save(network(**made).state_dict(), tmp_path / "600backbone.pth"), network()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    with pytest.raises(InputError, match=rf"does not fit: .*(missing keys|other shapes).*it looks like {look}$"):
        load_backbone(student, path, "teacher")
    assert_holds(student, before)


def test_other_contents_are_named(weights, tmp_path):
    first = next(iter(weights))
    for content, message in [
        ({"kernel": torch.zeros(SIZE, 3)}, "a header"),
        ({**weights, first: 3}, f"1 other shapes \\({first} is int instead of"),
        ({key: value for key, value in weights.items() if key != first}, f"1 missing keys \\({first}\\)"),
        ({**weights, "extra.weight": torch.zeros(1)}, r"1 unexpected keys \(extra\.weight\)"),
        (prefixed(weights, "model.", **{"loss.weight": torch.zeros(1)}), r"1 unexpected keys \(loss\.weight\)"),
        ({1: torch.zeros(1)}, r"1 unexpected keys \(1\)"),
        ({}, "missing keys"),
        ([torch.zeros(1)], "holds a list, not a dict"),
        (torch.zeros(1), "holds a Tensor, not a dict"),
    ]:
        with pytest.raises(InputError, match=message):
            load_backbone(network(), save(content, tmp_path / "x.pth"), "teacher")


def test_kernel(tmp_path):
    kernel = torch.rand(SIZE, 5)
    path = save({"kernel": kernel.half()}, tmp_path / "600header.pth")
    found = read_kernel(path, "teacher header", SIZE, 5)
    assert found.dtype == torch.float32 and torch.equal(found, kernel.half().float())
    with pytest.raises(InputError, match=r"teacher header: .*class centres \(16, 5\), but .* is \(16, 6\)"):
        read_kernel(path, "teacher header", SIZE, 6)
    with pytest.raises(InputError, match="has no tensor 'kernel'; its keys are weight"):
        read_kernel(save({"weight": kernel}, tmp_path / "x.pth"), "teacher header", SIZE, 5)


# --- the teacher ----------------------------------------------------------------------------------------------------------------------

def test_teacher_stays_frozen_and_in_eval_mode(weights, tmp_path):
    teacher = load_teacher("mobilefacenet", save(weights, tmp_path / "t.pth"), SIZE)
    torch.nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules()) and not any(p.requires_grad for p in teacher.parameters())
    images = torch.rand(4, 3, 112, 112, requires_grad=True)
    assert not teacher.train()(images).requires_grad
    assert_holds(teacher.network, weights)


# --- writing --------------------------------------------------------------------------------------------------------------------------

def test_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A file size limit stands for the full disk: the write fails half-way."""
    path = tmp_path / "600backbone.pth"
    checkpoint.save({"weight": torch.ones(3)}, path)
    code = f"""
import resource, sys, torch
from pathlib import Path
from utils.checkpoint import save
from utils.errors import run
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
run(lambda: save({{"weight": torch.ones(1_000_000)}}, Path({str(path)!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith(f"error: cannot save {path}") and done.stderr.count("\n") == 1, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["600backbone.pth"]
    assert torch.equal(read_tensors(path, "test")["weight"], torch.ones(3))


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="output: cannot write to .*choose another folder"):
        RunFolder(tmp_path / "file" / "run").prepare()


def test_half_written_files_are_swept(tmp_path):
    for name in ("5backbone.pth", "10backbone.pth.tmp-77", "somebody's.pth.tmp-77"):
        (tmp_path / name).touch()
    RunFolder(tmp_path).sweep()
    assert files(tmp_path) == {"5backbone.pth", "somebody's.pth.tmp-77"}


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def whole(step: int) -> set[str]:
    return {f"{step}{part}.pth" for part in ("backbone", "header", "state")}


def test_which_files_a_run_keeps(tmp_path):
    """Epochs end at steps 4 and 8 (samples 0); the states between them go with their weights, those of epoch ends go alone."""
    folder = RunFolder(tmp_path)
    checkpoint.save({}, tmp_path / "best_backbone.pth")
    for step in (2, 4, 6, 8, 10):
        folder.save(step, {"w": torch.ones(1)}, {"kernel": torch.ones(1)}, {"step": step, "samples": step % 4}, keep_states=2)
    assert files(tmp_path) == {"best_backbone.pth"} | {"4backbone.pth", "4header.pth"} | whole(8) | whole(10)
    assert folder.complete_steps() == [8, 10] and folder.steps("backbone") == [4, 8, 10]


def test_a_step_is_complete_with_all_its_files(tmp_path, weights):
    folder = RunFolder(tmp_path)
    folder.save(100, weights, {"kernel": torch.ones(2)}, {"step": 100, "samples": 0}, keep_states=2)
    folder.save(20, weights, {"kernel": torch.ones(1)}, {"step": 20, "samples": 0}, keep_states=2)
    assert folder.complete_steps() == [20, 100]
    student = network()
    header, state = folder.load(20, student)
    assert_holds(student, weights)
    assert state["step"] == 20 and torch.equal(header["kernel"], torch.ones(1))
    folder.file(100, "header").unlink()
    assert folder.complete_steps() == [20]
