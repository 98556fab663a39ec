"""Weights and resume states on disk: read without running code, loaded strictly, written by write-then-rename."""

import hashlib
import logging
import pickle
import re
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from backbones import NAMES, build_backbone
from utils.errors import InputError
from utils.recordio import replacing

# what torch.load raises for files that are cut off, no checkpoints at all, made by another program, or not readable from the disk
UNREADABLE = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError, OverflowError, struct.error, OSError, SafetensorError)
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")      # DistributedDataParallel's and torch.compile's
ADAFACE_PREFIX = "model."                               # of AdaFace's releases, whose networks see BGR images
PUBLISHED_PREFIXES = ("model.net.", ADAFACE_PREFIX, "")       # CVLFace, AdaFace, everybody else
FRAMEWORK = re.compile(r"argparse\.Namespace$|(pytorch_)?lightning(_fabric)?\.")     # of which published .ckpt files mention classes


def read_tensors(path: str | Path, what: str, hint: str = "") -> dict:
    """A checkpoint file (.pth, .ckpt, .safetensors) as a dict on the CPU; nothing in it can run.

    what and hint go into the message: what the file was wanted for and how to get it.
    Errors: InputError if it is missing, no checkpoint, cut off, or holds anything but tensors and plain values.
    """
    if not str(path):
        raise InputError(f"{what}: no path is set" + (f"; {hint}" if hint else ""))
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{what}: no file at {path.absolute()}" + (f"; {hint}" if hint else ""))
    try:
        content = load_file(path) if path.suffix == ".safetensors" else load_pickled(path)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks to load {name[1]}, which is code and no tensor" if name else "it holds more than tensors, or is no checkpoint"
        raise InputError(f"{what}: {path} was refused: {reason}") from error
    except UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{what}: {path} is no readable checkpoint ({reason[:120]})") from error
    if not isinstance(content, dict):
        raise InputError(f"{what}: {path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def load_pickled(path: Path):
    """What ``torch.save`` wrote; classes of the training framework, which PyTorch Lightning's .ckpt files mention, become empty stand-ins."""
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"         # else by torch before 1.6: plain weights only
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    stand_ins = [(dict if name.endswith(".AttributeDict") else StandIn, name) for name in names if FRAMEWORK.match(name)]
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True)


class StandIn:
    """Takes whatever a pickle gives to an object of the training framework, keeps nothing and does nothing."""

    __slots__ = ()

    def __new__(cls, *_arguments):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def network_weights(content: dict) -> tuple[dict, str]:
    """Bare network weights in a published checkpoint's dict, and the prefix their keys had ("model." AdaFace, "model.net." CVLFace, "").

    Keys without the prefix stay as they are, so that a strict load refuses them, but for the class centres (``head.``) of AdaFace's files.
    """
    state = content.get("state_dict", content)
    if not isinstance(state, dict):
        return {}, ""
    state = {WRAPPERS.sub("", str(key)): value for key, value in state.items()}
    prefix = next((prefix for prefix in PUBLISHED_PREFIXES if any(key.startswith(prefix) for key in state)), "")
    return {key.removeprefix(prefix): value for key, value in state.items() if not (prefix == ADAFACE_PREFIX and key.startswith("head."))}, prefix


def load_backbone(network: torch.nn.Module, path: str | Path, what: str, hint: str = "") -> str:
    """Load a network's weights strictly from any published format; returns the prefix of its keys.

    Errors: as ``read_tensors``, and InputError naming the first differing keys or shapes and which network they look like.
    """
    weights, prefix = network_weights(read_tensors(path, what, hint))
    expected = network.state_dict()
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    shapes = [f"{key} is {shape_of(weights[key])} instead of {shape_of(expected[key])}" for key in expected
              if key in weights and shape_of(weights[key]) != shape_of(expected[key])]
    differences = [f"{len(keys)} {name} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                   for name, keys in (("missing keys", missing), ("unexpected keys", unexpected), ("other shapes", shapes)) if keys]
    if differences:
        look = looks_like(weights)
        raise InputError(f"{what}: {path} does not fit: {'; '.join(differences)}" + (f"; it looks like {look}" if look else ""))
    network.load_state_dict(weights)
    return prefix


def shape_of(value):
    """A tensor's shape as a tuple; the type's name of anything else."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def looks_like(weights: dict) -> str:
    """Which network has exactly these keys and shapes, in words; "" if none of ours."""
    linear = [value for key, value in weights.items() if isinstance(value, torch.Tensor) and value.dim() == 2 and "weight" in key]
    if "kernel" in weights:
        return "a header (class centres), not a network"
    if not linear:
        return ""
    size = linear[-1].shape[0]
    shapes = {key: tuple(value.shape) for key, value in weights.items() if isinstance(value, torch.Tensor)}
    for name in NAMES:
        for use_se in (False, True) if name.startswith("iresnet") else (False,):
            with torch.device("meta"):
                state = build_backbone(name, size, use_se=use_se).state_dict()
            if {key: tuple(value.shape) for key, value in state.items()} == shapes:
                return f"{name}{' with SE=True' if use_se else ''}, embedding_size={size}"
    return ""


def read_kernel(path: str | Path, what: str, embedding_size: int, num_classes: int, hint: str = "") -> torch.Tensor:
    """The (D, C) class centres of a ``header.pth``. Errors: as ``read_tensors``, and InputError for another key or shape."""
    content = read_tensors(path, what, hint)
    if not isinstance(content.get("kernel"), torch.Tensor):
        raise InputError(f"{what}: {path} has no tensor 'kernel'; its keys are {', '.join(map(str, list(content)[:5]))}")
    if tuple(content["kernel"].shape) != (embedding_size, num_classes):
        raise InputError(f"{what}: {path} holds class centres {tuple(content['kernel'].shape)}, but (embedding_size, num_classes) "
                         f"of this run is {(embedding_size, num_classes)}")
    return content["kernel"].float()


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()


def save(content: dict, path: Path) -> None:
    """Write under a temporary name, flush to the disk, rename: ``path`` is whole or it is not there.

    Errors: InputError if the disk is full or the folder not writable; the temporary file is gone then.
    """
    try:
        with replacing(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:        # torch reports a failed write as RuntimeError
        raise InputError(f"cannot save {path} ({error}); earlier checkpoints are untouched, go on with --resume") from error


class RunFolder:
    """The checkpoints of one run: ``<step>backbone.pth``, ``<step>header.pth`` (weights), ``<step>state.pth`` (the rest), ``best_backbone.pth``.

    A step is complete once its state is there, which is written last.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def file(self, step: int, part: str) -> Path:
        return self.path / f"{step}{part}.pth"

    def steps(self, part: str) -> list[int]:
        return sorted(int(found[1]) for file in self.path.glob(f"*{part}.pth") if (found := re.fullmatch(rf"(\d+){part}", file.stem)))

    def complete_steps(self) -> list[int]:
        """Steps from which a run can go on, oldest first."""
        return [step for step in self.steps("state") if self.file(step, "backbone").is_file() and self.file(step, "header").is_file()]

    def prepare(self) -> None:
        """Make the folder. Errors: InputError if it cannot be made or written to."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "training.log").touch()
        except OSError as error:
            raise InputError(f"output: cannot write to {self.path} ({error.strerror}); choose another folder with output=") from error

    def sweep(self) -> None:
        """Remove what a killed run left half written."""
        for leftover in self.path.glob("*.tmp-*"):
            if re.fullmatch(r"(\d+(backbone|header|state)\.pth|best_backbone\.pth|config\.json|metrics\.jsonl)\.tmp-\d+", leftover.name):
                leftover.unlink()

    def rewind(self, step: int) -> list[int]:
        """Forget the states after ``step``, from which a run that goes on from there turns away; their weights stay. Returns those steps."""
        later = [other for other in self.steps("state") if other > step]
        for other in later:
            self.file(other, "state").unlink()
        return later

    def save(self, step: int, backbone: dict, header: dict, state: dict, keep_states: int) -> None:
        """Write one step, then drop states beyond the newest ``keep_states`` (and the weights of those that were no epoch's end)."""
        save(backbone, self.file(step, "backbone"))
        save(header, self.file(step, "header"))
        save(state, self.file(step, "state"))
        for old in self.complete_steps()[:-keep_states]:
            try:
                epoch_end = read_tensors(self.file(old, "state"), "old state")["samples"] == 0
            except InputError as error:         # damaged on the disk since: the step just saved is what counts, the old weights stay
                logging.warning("%s", error)
                epoch_end = True
            self.file(old, "state").unlink()
            if not epoch_end:
                self.file(old, "backbone").unlink()
                self.file(old, "header").unlink()

    def load(self, step: int, network: torch.nn.Module) -> tuple[dict, dict]:
        """Load the student's weights of a step; returns (header state, resume state)."""
        load_backbone(network, self.file(step, "backbone"), "resume")
        return read_tensors(self.file(step, "header"), "resume"), read_tensors(self.file(step, "state"), "resume")


