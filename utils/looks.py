"""What a file holds that is not what was asked for: error messages name it, and the setting that fits."""

import re
from functools import lru_cache
from pathlib import Path

import torch

from backbones import NAMES, build_backbone

PUBLISHERS = {"model.": "an AdaFace", "model.net.": "a CVLFace", "net.": "a CVLFace"}       # by the prefix of their keys
HEADER = "a header (class centres), not a network: it belongs to pretrained_teacher_header_path or pretrained_header_path"
RUN_STATE = {"step", "epoch", "samples", "optimizer", "rng"}                                # keys of a run's <step>state.pth
FIRST_BYTES = (     # pattern, kind, what to do
    (re.compile(rb"version https://git-lfs"), "pointer", "a Git LFS pointer instead of the file: fetch the file itself (git lfs pull)"),
    (re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE), "page", "a web page that was saved instead of the file: download it again"),
    (re.compile(rb"PK\x03\x04"), "checkpoint", "a PyTorch checkpoint: name it *.pth, and as a teacher set teacher to its network and pretrained_teacher_path to it"),
    (re.compile(rb".{7}\x00\{", re.DOTALL), "safetensors", "a safetensors file: name it *.safetensors"),
    # protobuf field 1 (ir_version), a small number, then one of the other fields of a model
    (re.compile(rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42\x72]"), "onnx", "an ONNX model: named .onnx it can be evaluated; training takes one only as a teacher, by teacher=onnx:PATH"),
)


def bytes_look_like(path: str | Path, wanted: str) -> str:
    """What the first bytes of an unreadable file show, in words; "" if nothing known, or the kind it should be: then it is damaged."""
    with open(path, "rb") as file:
        start = file.read(64)
    return next((words for pattern, kind, words in FIRST_BYTES if kind != wanted and pattern.match(start)), "")


def looks_like(weights, prefix: str = "", key: str = "network") -> str:
    """What weights that do not fit are, and the setting that fits, in words; "" if they are nothing known.

    weights: a checkpoint's content without ``prefix``, which its keys had. key: "network" or "teacher", which the setting is of.
    """
    if isinstance(weights, torch.Tensor):
        return HEADER if weights.dim() == 2 else ""
    if not isinstance(weights, dict):
        return ""
    if weights.keys() >= RUN_STATE:
        return "the state of a run (<step>state.pth): its weights are beside it, in <step>backbone.pth and <step>header.pth"
    if any(isinstance(weights.get(name), torch.Tensor) and weights[name].dim() == 2 for name in ("kernel", "weight")) or "state_dict_softmax_fc" in weights:
        return HEADER
    size = feature_size(weights)
    name, use_se = which_network(weights, size)
    if not name:
        return ""
    words = f"{name}{' with SE=True' if use_se else ''}, embedding_size={size}"
    if name.startswith("ir") and name[2:].isdigit() and prefix in PUBLISHERS:
        words = f"{PUBLISHERS[prefix]} IR-{name[2:]} checkpoint ({words})"
    setting = f"teacher={name}{'_se' if use_se else ''}" if key == "teacher" else f"network={name}{' SE=True' if use_se else ''} embedding_size={size}"
    return f"{words}: set {setting}"


def feature_size(weights: dict) -> int:
    """D of a face network's weights: every one of ours has one linear layer, the last; 0 if there is none."""
    linear = [value for key, value in weights.items() if isinstance(value, torch.Tensor) and value.dim() == 2 and "weight" in key]
    return linear[-1].shape[0] if linear else 0


def which_network(weights: dict, size: int) -> tuple[str, bool]:
    """(name, with squeeze-and-excitation?) of the network that has exactly these keys and shapes; ("", False) if none of ours."""
    shapes = {key: tuple(value.shape) for key, value in weights.items() if isinstance(value, torch.Tensor)}
    for name in NAMES if size else ():
        for use_se in (False, True) if name.startswith("iresnet") else (False,):
            if shapes_of(name, size, use_se) == shapes:
                return name, use_se
    return "", False


@lru_cache
def shapes_of(name: str, size: int, use_se: bool) -> dict:
    """{key: shape} of a network's weights."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in build_backbone(name, size, use_se=use_se).state_dict().items()}
