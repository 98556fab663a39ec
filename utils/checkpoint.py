"""Weights and resume states on disk: read without running code, loaded strictly, written by write-then-rename."""

import hashlib
import logging
import pickle
import re
import shutil
import struct
import zipfile
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from utils.errors import InputError, first_line
from utils.files import utf8_path
from utils.looks import bytes_look_like, feature_size, looks_like, which_network
from utils.recordio import replacing

# what torch.load raises for files that are cut off, no checkpoints at all, made by another program, or not readable from the disk
UNREADABLE = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError, OverflowError, struct.error, OSError, SafetensorError)
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")      # DistributedDataParallel's and torch.compile's
ADAFACE_PREFIX = "model."                               # of AdaFace's releases, whose networks see BGR images
CVLFACE_PREFIXES = ("model.net.", "net.")                # of CVLFace's model.safetensors and model.pt
PUBLISHED_PREFIXES = ("model.net.", ADAFACE_PREFIX, "net.", "")
STATES = ("state_dict", "state_dict_backbone")          # where PyTorch Lightning and arcface_torch's whole training state keep a network
CENTER_KEYS = {"kernel": False, "head.kernel": False, "weight": True, "partial_fc.weight": True, "classifier.weight": True, "weight_activated": True}    # classes first?
# what the ranks of arcface_torch (three generations) and of CVLFace write
RANK_FILES = ("checkpoint_gpu_*.pt", "softmax_fc_gpu_*.pt", "rank_*_softmax_weight.pt", "rank:*_softmax_weight.pt", "classifier_rank*.pt")
FRAMEWORK = re.compile(r"argparse\.Namespace$|(pytorch_)?lightning(_fabric)?\.")     # of which published .ckpt files mention classes


def read_tensors(path: str | Path, what: str, hint: str = "") -> dict:
    """A checkpoint file (.pth, .ckpt, .safetensors) as a dict on the CPU; nothing in it can run.

    what and hint go into the message: what the file was wanted for and how to get it.
    Errors: InputError if it is missing, no checkpoint, cut off, or holds anything but tensors and plain values.
    """
    content = read_file(path, what, hint)
    if not isinstance(content, dict):
        raise InputError(f"{what}: {path} holds a {type(content).__name__}, not a dict of tensors{advice(looks_like(content))}")
    return content


def read_file(path: str | Path, what: str, hint: str = ""):
    """As ``read_tensors``, whatever the file holds: a dict, a tensor, a list."""
    if not str(path):
        raise InputError(f"{what}: no path is set" + (f"; {hint}" if hint else ""))
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{what}: no file at {path.absolute()}" + (f"; {hint}" if hint else ""))
    kind = "safetensors" if path.suffix == ".safetensors" else "checkpoint"
    try:
        return load_file(utf8_path(path)) if kind == "safetensors" else load_pickled(path)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks to load {name[1]}, which is code and no tensor" if name else "it holds more than tensors, or is no checkpoint"
        raise InputError(f"{what}: {path} was refused: {reason}{advice(bytes_look_like(path, kind))}") from error
    except UNREADABLE as error:
        raise InputError(f"{what}: {path} is no readable checkpoint ({first_line(error, 120)}){advice(bytes_look_like(path, kind))}") from error


def advice(look: str) -> str:
    return f"; it looks like {look}" if look else ""


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
    """Bare network weights in a published checkpoint's dict, and the prefix their keys had ("model." AdaFace, "model.net." or "net." CVLFace, "").

    Keys without the prefix stay as they are, so that a strict load refuses them, but for the class centres (``head.``) of AdaFace's files.
    """
    state = next((content[key] for key in STATES if key in content), content)
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
    check_fit(network.state_dict(), weights, f"{what}: {path}", prefix)
    network.load_state_dict(weights)
    return prefix


def check_fit(expected: dict, weights: dict, subject: str, prefix: str, key: str = "network") -> None:
    """Refuse weights that have other keys or shapes than ``expected``, naming the first of them and the setting that fits.

    subject: the message's first words. prefix: of the weights' keys in the file. key: "network" or "teacher", which the setting is of.
    """
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    shapes = [f"{name} is {shape_of(weights[name])} instead of {shape_of(expected[name])}" for name in expected
              if name in weights and shape_of(weights[name]) != shape_of(expected[name])]
    differences = [f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                   for kind, names in (("missing keys", missing), ("unexpected keys", unexpected), ("other shapes", shapes)) if names]
    if differences:
        raise InputError(f"{subject} does not fit: {'; '.join(differences)}{advice(looks_like(weights, prefix, key))}")


def shape_of(value):
    """A tensor's shape as a tuple; the type's name of anything else."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def read_kernel(path: str | Path, what: str, embedding_size: int, num_classes: int, hint: str = "") -> torch.Tensor:
    """Class centres (D, C) in float32, from whatever a training has left of them.

    path: a file with ``kernel`` (D, C) (AdaDistill's and this project's header.pth), ``head.kernel`` (D, C) (AdaFace's .ckpt), ``weight`` (C, D)
    (arcface_torch) or a bare (C, D) tensor; or what arcface_torch's and CVLFace's ranks wrote, a file each with their share of ``weight``: the
    folder, or a pattern such as "folder/checkpoint_gpu_*.pt".
    Errors: as ``read_tensors``, and InputError for other contents or shapes, and for shares that are missing or not as Partial FC deals classes out.
    """
    files = find_shares(path, what)
    kernel = join_shares(files, what, num_classes) if files else find_centers(read_file(path, what, hint), f"{what}: {path}")
    if tuple(kernel.shape) != (embedding_size, num_classes):
        mend = ""
        if not files and rank_of(Path(path).name)[0] in RANK_FILES:
            mend = f"; {Path(path).name} looks like one rank's share: name its folder, {Path(path).parent}"
        elif kernel.shape[1] == num_classes:
            mend = f"; the student learns in the space of these centres: set embedding_size={kernel.shape[0]}"
        raise InputError(f"{what}: {path} holds class centres {tuple(kernel.shape)}, but (embedding_size, num_classes) "
                         f"of this run is {(embedding_size, num_classes)}{mend}")
    if not torch.isfinite(kernel).all():
        raise InputError(f"{what}: {path} holds class centres that are not finite (NaN or infinite): take the header of an earlier step")
    return kernel.float()


def find_centers(content, subject: str) -> torch.Tensor:
    """The (D, C) class centres among a file's contents; which axis is which is told by the key. Errors: InputError if there are none."""
    if isinstance(content, torch.Tensor) and content.dim() == 2:
        return content.t()      # arcface_torch's rank_0_softmax_weight.pt
    if not isinstance(content, dict):
        raise InputError(f"{subject} holds a {type(content).__name__}, not class centres")
    state = next((content[key] for key in ("state_dict_softmax_fc", "state_dict") if isinstance(content.get(key), dict)), content)
    state = {WRAPPERS.sub("", str(key)): value for key, value in state.items()}
    for key, classes_first in CENTER_KEYS.items():
        if isinstance(state.get(key), torch.Tensor) and state[key].dim() == 2:
            return state[key].t() if classes_first else state[key]
    weights, _ = network_weights(content)
    network, _ = which_network(weights, feature_size(weights))
    look = f"{network}, a network: train/class_centers.py computes the class centres of one" if network else looks_like(weights)
    raise InputError(f"{subject} has no class centres ({', '.join(CENTER_KEYS)}); its keys are {', '.join(list(state)[:5])}{advice(look)}")


def find_shares(path: str | Path, what: str) -> dict[int, Path]:
    """{rank: file} where ``path`` is a folder or a pattern; {} where it is a file's. Errors: InputError if no files are found, or of several kinds."""
    if not str(path):
        return {}
    path = Path(path)
    if path.is_dir():
        found = [file for file in path.iterdir() if rank_of(file.name)[0] in RANK_FILES]
        missing = f"holds no {', '.join(RANK_FILES)}: name the header's file, or a pattern such as {path / RANK_FILES[0]}"
    elif any(letter in path.name for letter in "*?[") and not path.exists():
        found, missing = [file for file in path.parent.glob(path.name) if re.search(r"\d", file.name)], "matches no file with a rank in its name"
    else:
        return {}
    kinds = sorted({rank_of(file.name)[0] for file in found})
    if len(kinds) != 1:
        raise InputError(f"{what}: {path} {'matches' if kinds else missing}{' files of several kinds: name one, ' if kinds else ''}{' or '.join(kinds)}")
    if "_mom." in kinds[0]:
        raise InputError(f"{what}: {path} are momenta of the optimizer, the class centres are in {kinds[0].replace('_mom.', '.')}")
    return {rank_of(file.name)[1]: file for file in found}


def rank_of(name: str) -> tuple[str, int]:
    """("checkpoint_gpu_*.pt", 3) of "checkpoint_gpu_3.pt": the last number is the rank; (name, 0) without one."""
    found = re.fullmatch(r"(.*?)(\d+)(\D*)", name)
    return (f"{found[1]}*{found[3]}", int(found[2])) if found else (name, 0)


def join_shares(files: dict[int, Path], what: str, num_classes: int) -> torch.Tensor:
    """The (D, C) class centres of all ranks. Errors: InputError if a rank is missing, or has another number of classes than Partial FC gives it."""
    missing = sorted(set(range(max(files) + 1)) - files.keys())
    if missing:
        raise InputError(f"{what}: no file of rank {', '.join(map(str, missing))} beside {files[max(files)]}")
    shares = []
    for rank, file in sorted(files.items()):
        shares.append(find_centers(read_file(file, what), f"{what}: {file}"))
        expected = num_classes // len(files) + (rank < num_classes % len(files))      # the first ranks take one of the rest each
        if shares[-1].shape[1] != expected:
            raise InputError(f"{what}: {file} holds {shares[-1].shape[1]} classes, but rank {rank} of {len(files)} has {expected} of num_classes={num_classes}: "
                             "files of other ranks are missing, or they are of another training set")
        if shares[-1].shape[0] != shares[0].shape[0]:
            raise InputError(f"{what}: {file} holds {shares[-1].shape[0]}-d class centres, {files[0].name} {shares[0].shape[0]}-d ones")
    return torch.cat(shares, dim=1)


def sha256(*paths: str | Path) -> str:
    """The SHA-256 of a file, or of several one after another, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            for block in iter(partial(file.read, 1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


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
    """The checkpoints of one run: ``<step>backbone.pth``, ``<step>header.pth`` or the folder ``<step>header`` (weights), ``<step>state.pth`` (the rest), ``best_backbone.pth``.

    A step is complete once its state is there, which is written last.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def file(self, step: int, part: str) -> Path:
        return self.path / f"{step}{part}.pth"

    def shards(self, step: int) -> Path:
        """The folder of a header that is in no one file (utils/sharded.py)."""
        return self.path / f"{step}header"

    def header(self, step: int) -> Path:
        """Where the header of a step lies: its file, or its folder of shares."""
        return self.shards(step) if self.shards(step).is_dir() else self.file(step, "header")

    def steps(self, part: str) -> list[int]:
        return sorted(int(found[1]) for file in self.path.glob(f"*{part}.pth") if (found := re.fullmatch(rf"(\d+){part}", file.stem)))

    def complete_steps(self) -> list[int]:
        """Steps from which a run can go on, oldest first."""
        return [step for step in self.steps("state") if self.file(step, "backbone").is_file() and (self.file(step, "header").is_file() or self.shards(step).is_dir())]

    def damage(self, step: int) -> str:
        """What is wrong with the files of a complete step: one line, "" if they can be read to the end."""
        sharded = self.shards(step).is_dir()
        for file in [self.file(step, part) for part in (("backbone", "state") if sharded else ("backbone", "header", "state"))]:
            try:
                with zipfile.ZipFile(file) as archive:
                    wrong = archive.testzip()
                if wrong:
                    return f"{file}: {wrong} does not have the sum it was written with"
            except (*UNREADABLE, zipfile.BadZipFile) as error:
                return f"{file}: {first_line(error, 120)}"
        if sharded:
            from utils.sharded import damage_of     # torch.distributed.checkpoint takes a second to import
            return damage_of(self.shards(step))
        return ""

    def prepare(self) -> None:
        """Make the folder. Errors: InputError if it cannot be made or written to."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "training.log").touch()
        except OSError as error:
            raise InputError(f"output: cannot write to {self.path} ({error.strerror}); choose another folder with output=") from error

    def sweep(self) -> None:
        """Remove what a killed run left half written."""
        for leftover in self.path.glob("*.tmp*"):
            if re.fullmatch(r"(\d+(backbone|header|state)\.pth|best_backbone\.pth|config\.json|metrics\.jsonl)\.tmp-\d+", leftover.name):
                leftover.unlink()
            elif re.fullmatch(r"\d+header\.tmp", leftover.name):
                shutil.rmtree(leftover)

    def rewind(self, step: int) -> list[int]:
        """Forget the states after ``step``, from which a run that goes on from there turns away; their weights stay. Returns those steps."""
        later = [other for other in self.steps("state") if other > step]
        for other in later:
            self.file(other, "state").unlink()
        return later

    def save(self, step: int, backbone: dict, header: dict | None, state: dict, keep_states: int) -> None:
        """Write one step, then drop states beyond the newest ``keep_states`` (and the weights of those that were no epoch's end).

        header None: all ranks have written it to ``shards(step)`` with the suffix .tmp.
        """
        save(backbone, self.file(step, "backbone"))
        # a run that went back may have left the header of this step in the other form
        if self.shards(step).is_dir():
            shutil.rmtree(self.shards(step))
        if header is not None:
            save(header, self.file(step, "header"))
        else:
            self.file(step, "header").unlink(missing_ok=True)
            self.shards(step).with_suffix(".tmp").rename(self.shards(step))
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
                self.file(old, "header").unlink(missing_ok=True)
                shutil.rmtree(self.shards(old), ignore_errors=True)

    def load(self, step: int, network: torch.nn.Module) -> dict | None:
        """Load the student's weights of a step; returns the header's state, None if it lies in ``shards(step)``."""
        load_backbone(network, self.file(step, "backbone"), "resume")
        return None if self.shards(step).is_dir() else read_tensors(self.file(step, "header"), "resume")

    def load_state(self, step: int) -> dict:
        """All else that a run needs to go on from a step."""
        return read_tensors(self.file(step, "state"), "resume")
