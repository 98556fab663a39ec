"""Files of weights as plain tensors: .pth, .pt, .ckpt, .safetensors, of which nothing can run."""

import hashlib
import pickle
import re
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from utils.errors import InputError, first_line
from utils.files import utf8_path
from utils.safe_pickle import Ignored, load_torch, refused_name
from utils.weights.kinds import UNREADABLE, bytes_look_like, program_in
from utils.weights.recognise import looks_like

# of which published .ckpt files mention classes
FRAMEWORK = re.compile(r"argparse\.Namespace$|(pytorch_)?lightning(_fabric)?\.")
# ends a path of which the exponential average is meant, not the plain weights beside it
AVERAGE_MARK = "#ema"


def split_mark(path: str | Path) -> tuple[Path, bool]:
    """(the file, whether the exponential average in it is meant) of a path that may end in #ema."""
    text = str(path)
    if text.endswith(AVERAGE_MARK) and not Path(text).exists():
        return Path(text.removesuffix(AVERAGE_MARK)), True
    return Path(text), False


def read_tensors(path: str | Path, what: str, hint: str = "") -> dict:
    """A checkpoint file (.pth, .ckpt, .safetensors) as a dict on the CPU; nothing in it can run.

    what and hint go into the message: what the file was wanted for and how to get it.
    Raises InputError if it is missing, no checkpoint, cut off, or holds anything but tensors and
    plain values.
    """
    content = read_file(path, what, hint)
    if not isinstance(content, dict):
        kind, hint = type(content).__name__, advice(looks_like(content))
        raise InputError(f"{what}: {path} holds a {kind}, not a dict of tensors{hint}")
    return content


def read_file(path: str | Path, what: str, hint: str = ""):
    """As ``read_tensors``, whatever the file holds: a dict, a tensor, a list."""
    hint = f"; {hint}" if hint else ""
    if not str(path):
        raise InputError(f"{what}: no path is set{hint}")
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{what}: no file at {path.absolute()}{hint}")
    kind = "safetensors" if path.suffix == ".safetensors" else "checkpoint"
    try:
        return load_file(utf8_path(path)) if kind == "safetensors" else load_pickled(path)
    except pickle.UnpicklingError as error:
        name = refused_name(error)
        reason = "it holds more than tensors, or is no checkpoint"
        if name:
            reason = f"it asks to load {name}, which is code and no tensor"
        look = advice(bytes_look_like(path, kind))
        raise InputError(f"{what}: {path} was refused: {reason}{look}") from error
    except UNREADABLE as error:
        if program := program_in(path):
            raise InputError(f"{what}: {path} is {program}") from error
        reason, look = first_line(error, 120), advice(bytes_look_like(path, kind))
        raise InputError(f"{what}: {path} is no readable checkpoint ({reason}){look}") from error


def advice(likeness: str) -> str:
    return f"; it looks like {likeness}" if likeness else ""


def load_pickled(path: Path):
    """What ``torch.save`` wrote.

    Classes of the training framework, which .ckpt files mention, become empty stand-ins.
    """
    with open(path, "rb") as file:
        # else by torch before 1.6: plain weights only
        zipped = file.read(4) == b"PK\x03\x04"
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    stand_ins = {
        name: dict if name.endswith(".AttributeDict") else Ignored
        for name in names
        if FRAMEWORK.match(name)
    }
    return load_torch(path, stand_ins)


def sha256(*paths: str | Path) -> str:
    """The SHA-256 of a file, or of several one after another, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            for block in iter(partial(file.read, 1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def digest_of(path: str | Path) -> str:
    """What tells weights apart: the SHA-256 of their file, and #ema where the path ends so."""
    file, average = split_mark(path)
    return sha256(file) + (AVERAGE_MARK if average else "")
