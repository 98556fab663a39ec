"""Which network of ours a file holds: to build it, and for messages that say what to set."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from backbones import NAMES, build_backbone
from utils.weights.match import (
    Match,
    is_complete,
    is_matrix,
    linear_key,
    prefixes_of,
    states_of,
    take,
)

# by the prefix of their keys
PUBLISHERS = {"model.": "an AdaFace", "model.net.": "a CVLFace", "net.": "a CVLFace"}
HEADER = (
    "a header (class centres), not a network: it belongs to pretrained_teacher_header_path or "
    "pretrained_header_path"
)
# a part of the keys of every vision transformer: CVLFace's, LVFace's, timm's, Hugging Face's
PATCHES = "patch_embed"
TRANSFORMER = "a vision transformer, which cannot be built here: export it to ONNX"
# keys of a run's <step>state.pth
RUN_STATE = {"step", "epoch", "samples", "optimizer", "rng"}


class Network(NamedTuple):
    """A network of ours and where its weights are in a file."""

    name: str
    use_se: bool
    embedding_size: int
    match: Match

    @property
    def full_name(self) -> str:
        """The word that ``config.teacher`` has for it."""
        return f"{self.name}{'_se' if self.use_se else ''}"


def networks_in(content) -> Iterator[Network]:
    """The networks of ours that lie in a file's content, whatever entry and prefix they have."""
    for entry, state in states_of(content):
        keys = dict.fromkeys(linear_key(shapes_of(name, False, 1)) for name in NAMES)
        for key in keys:
            for prefix in prefixes_of(state, key):
                if network := network_at(entry, state, prefix, state[prefix + key]):
                    yield network


def network_at(entry: str, state: dict, prefix: str, linear) -> Network | None:
    """The network of ours under a prefix, the largest, for small ones are parts of larger ones.

    linear: the weights of its linear layer.
    """
    if not is_matrix(linear) or not len(linear):
        return None
    size = len(linear)
    variants = [(name, False) for name in NAMES]
    variants += [(name, True) for name in NAMES if name.startswith("iresnet")]
    fitting = [
        variant for variant in variants if is_complete(state, prefix, shapes_of(*variant, size))
    ]
    if not fitting:
        return None
    name, use_se = max(fitting, key=lambda variant: len(shapes_of(*variant, size)))
    return Network(name, use_se, size, take(entry, state, prefix, shapes_of(name, use_se, size)))


@lru_cache
def shapes_of(name: str, use_se: bool, size: int) -> dict:
    """{key: shape} of a network's weights."""
    with torch.device("meta"):
        weights = build_backbone(name, size, use_se=use_se).state_dict()
    return {key: tuple(value.shape) for key, value in weights.items()}


def looks_like(content, key: str = "network") -> str:
    """What a file's content that does not fit is, and the setting that fits, in words.

    "" if it is nothing known. key: "network" or "teacher", which the setting is of.
    """
    if isinstance(content, torch.Tensor):
        return HEADER if is_matrix(content) else ""
    if not isinstance(content, dict):
        return ""
    if content.keys() >= RUN_STATE:
        return (
            "the state of a run (<step>state.pth): its weights are beside it, in "
            "<step>backbone.pth and <step>header.pth"
        )
    network = next(networks_in(content), None)
    if network is None:
        return looks_like_none_of_ours(content, key)
    name, size, use_se = network.name, network.embedding_size, network.use_se
    description = f"{name}{' with SE=True' if use_se else ''}, embedding_size={size}"
    publisher = PUBLISHERS.get(network.match.publishers_prefix)
    if name.startswith("ir") and name[2:].isdigit() and publisher:
        description = f"{publisher} IR-{name[2:]} checkpoint ({description})"
    if key == "teacher":
        return f"{description}: set teacher={network.full_name}"
    se = " SE=True" if use_se else ""
    return f"{description}: set network={name}{se} embedding_size={size}"


def looks_like_none_of_ours(content: dict, key: str) -> str:
    """As ``looks_like``, for a file without a network of ours."""
    if any(PATCHES in name for _, state in states_of(content) for name in state):
        how = " and set teacher=onnx:PATH" if key == "teacher" else ""
        return f"{TRANSFORMER}{how} (docs/teachers.md)"
    has_centers = any(is_matrix(content.get(name)) for name in ("kernel", "weight"))
    return HEADER if has_centers or "state_dict_softmax_fc" in content else ""
