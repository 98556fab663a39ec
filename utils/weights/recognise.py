"""Which network of ours a file holds: to build it, and for messages that say what to set."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from backbones import NAMES, build_backbone
from utils.weights.match import Found, is_complete, linear_key, prefixes_of, states_of, take

# by the prefix of their keys
PUBLISHERS = {"model.": "an AdaFace", "model.net.": "a CVLFace", "net.": "a CVLFace"}
HEADER = (
    "a header (class centres), not a network: it belongs to pretrained_teacher_header_path or "
    "pretrained_header_path"
)
# keys of a run's <step>state.pth
RUN_STATE = {"step", "epoch", "samples", "optimizer", "rng"}


class Network(NamedTuple):
    """A network of ours and where its weights are in a file."""

    name: str
    use_se: bool
    embedding_size: int
    found: Found

    @property
    def full_name(self) -> str:
        """The word that ``config.teacher`` has for it."""
        return f"{self.name}{'_se' if self.use_se else ''}"


def networks_in(content) -> Iterator[Network]:
    """The networks of ours that lie in a file's content, whatever entry and prefix they have."""
    for entry, state in states_of(content):
        keys = dict.fromkeys(linear_key(shapes_of(name, 1, False)) for name in NAMES)
        for key in keys:
            for prefix in prefixes_of(state, key):
                if network := network_at(entry, state, prefix, state[prefix + key]):
                    yield network


def network_at(entry: str, state: dict, prefix: str, linear) -> Network | None:
    """The network of ours under a prefix, the largest, for small ones are parts of larger ones.

    linear: the weights of its linear layer.
    """
    size = len(linear) if isinstance(linear, torch.Tensor) and linear.dim() == 2 else 0
    variants = [
        (name, use_se, shapes_of(name, size, use_se))
        for name in (NAMES if size else ())
        for use_se in ((False, True) if name.startswith("iresnet") else (False,))
    ]
    fitting = [variant for variant in variants if is_complete(state, prefix, variant[2])]
    if not fitting:
        return None
    name, use_se, shapes = max(fitting, key=lambda variant: len(variant[2]))
    return Network(name, use_se, size, take(entry, state, prefix, shapes))


@lru_cache
def shapes_of(name: str, size: int, use_se: bool) -> dict:
    """{key: shape} of a network's weights."""
    with torch.device("meta"):
        weights = build_backbone(name, size, use_se=use_se).state_dict()
    return {key: tuple(value.shape) for key, value in weights.items()}


def looks_like(content, key: str = "network") -> str:
    """What a file's content that does not fit is, and the setting that fits, in words.

    "" if it is nothing known.
    key: "network" or "teacher", which the setting is of.
    """
    if isinstance(content, torch.Tensor):
        return HEADER if content.dim() == 2 else ""
    if not isinstance(content, dict):
        return ""
    if content.keys() >= RUN_STATE:
        return (
            "the state of a run (<step>state.pth): its weights are beside it, in "
            "<step>backbone.pth and <step>header.pth"
        )
    network = next(networks_in(content), None)
    if network is None:
        centres = [content[name] for name in ("kernel", "weight") if name in content]
        alone = any(isinstance(value, torch.Tensor) and value.dim() == 2 for value in centres)
        return HEADER if alone or "state_dict_softmax_fc" in content else ""
    name, size, use_se = network.name, network.embedding_size, network.use_se
    words = f"{name}{' with SE=True' if use_se else ''}, embedding_size={size}"
    publisher = PUBLISHERS.get(network.found.publishers_prefix)
    if name.startswith("ir") and name[2:].isdigit() and publisher:
        words = f"{publisher} IR-{name[2:]} checkpoint ({words})"
    if key == "teacher":
        return f"{words}: set teacher={network.full_name}"
    return f"{words}: set network={name}{' SE=True' if use_se else ''} embedding_size={size}"
