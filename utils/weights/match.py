"""Which of a file's tensors are a network's: entry, prefix, and what lies beside them."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch

from utils.errors import InputError

# BatchNorm's counter, which nothing here reads: PyTorch before 0.4.1 and converters leave it out
COUNTER = "num_batches_tracked"
# how deep a network may lie in dicts: {"state": {"model": {"state_dict": ...}}}
DEEPEST = 3
# DistributedDataParallel's and torch.compile's
WRAPPERS = ("module", "_orig_mod")
# words in the name of an entry or a prefix that holds an average of the weights
AVERAGE = re.compile(r"(^|[._-])(ema|swa|avg|averaged?|polyak|shadow)($|[._-])", re.IGNORECASE)
# words in the name of what holds class centres
HEAD = re.compile(
    r"head|classif|kernel|^weight$|^fc\d*$|_fc$|^arc|softmax|margin|(arc|cos|ada)_?face|metric|"
    r"product|logit|loss|criterion|cent(er|re)s|prototype",
    re.IGNORECASE,
)
# beside the weights in torch.optim.swa_utils.AveragedModel
HARMLESS = {"n_averaged"}


class Match(NamedTuple):
    """A network's weights in a file.

    entry: the keys of the dicts that they lie in, with dots between ("" at the top). prefix: of
    their keys, "" or one that ends in a dot. weights: {key without the prefix: tensor}.
    beside: {key: value} of what else lies there.
    """

    entry: str
    prefix: str
    weights: dict
    beside: dict

    @property
    def is_average(self) -> bool:
        return bool(AVERAGE.search(f"{self.entry}.{self.prefix}"))

    @property
    def publishers_prefix(self) -> str:
        """The prefix without what DistributedDataParallel and torch.compile put into it."""
        return bare(self.prefix)

    def where(self) -> str:
        """Entry and prefix in words, as "state_dict under model."; "" for a plain file."""
        under = f"under {self.prefix}" if self.prefix else ""
        return f"{self.entry} {under}".strip()


def bare(name: str) -> str:
    """A key or prefix without ``WRAPPERS``."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def states_of(content, entry: str = "", depth: int = 0) -> Iterator[tuple[str, dict]]:
    """(entry, {key: value}) of every dict in a file that holds tensors, the outermost first."""
    if not isinstance(content, dict):
        return
    state = {str(key): value for key, value in content.items()}
    if any(isinstance(value, torch.Tensor) for value in state.values()):
        yield entry, state
    if depth < DEEPEST:
        for key, value in state.items():
            yield from states_of(value, f"{entry}.{key}" if entry else key, depth + 1)


def prefixes_of(state: dict, key: str) -> list[str]:
    """The prefixes under which a state has this key."""
    return [name[: -len(key)] for name in state if name == key or name.endswith(f".{key}")]


def is_matrix(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2


def shape_of(value):
    """A tensor's shape as a tuple; the type's name of anything else."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def linear_key(shapes: dict) -> str:
    """The key of the weights of the one linear layer that every face network here has."""
    return next(key for key, shape in shapes.items() if len(shape) == 2)


def take(entry: str, state: dict, prefix: str, shapes: dict) -> Match:
    """What a state has of a network's keys under a prefix."""
    weights = {key: state[prefix + key] for key in shapes if prefix + key in state}
    taken = {prefix + key for key in weights}
    beside = {key: value for key, value in state.items() if key not in taken}
    return Match(entry, prefix, weights, beside)


def is_complete(state: dict, prefix: str, shapes: dict) -> bool:
    """Whether all of a network's weights are there in their shapes; counters may be missing."""
    return all(
        shape_of(state[prefix + key]) == shape if prefix + key in state else key.endswith(COUNTER)
        for key, shape in shapes.items()
    )


def matches_in(content, shapes: dict) -> list[Match]:
    """Every place of a file's content where all weights of a network of these {key: shape} are."""
    key = linear_key(shapes)
    return [
        take(entry, state, prefix, shapes)
        for entry, state in states_of(content)
        for prefix in prefixes_of(state, key)
        if is_complete(state, prefix, shapes)
    ]


def choose(matches: list[Match], average: bool, subject: str) -> Match | None:
    """The match that is meant; None if there is none.

    Plain weights come before an average of them, unless ``average`` asks for that.
    subject: the message's first words.
    Raises InputError if there is no average, or if several matches are left that differ.
    """
    averages = [match for match in matches if match.is_average]
    plain = [match for match in matches if not match.is_average]
    if average and plain and not averages:
        raise InputError(
            f"{subject} holds no exponential average of the weights (an entry or a prefix named "
            f"ema), only {places(plain)}: leave #ema out"
        )
    candidates = averages if average else plain or averages
    if not candidates:
        return None
    first, *others = candidates
    if not all(same(first.weights, other.weights) for other in others):
        raise InputError(
            f"{subject} holds {len(candidates)} networks of this kind with different weights "
            f"({places(candidates)}): which is meant cannot be told; save the one that is meant in "
            "a file of its own"
        )
    return first


def places(matches: list[Match]) -> str:
    return ", ".join(match.where() or "its plain keys" for match in matches)


def same(weights: dict, others: dict) -> bool:
    """Whether two networks have the same weights; the counters do not matter."""
    keys = {key for key in weights if not key.endswith(COUNTER)}
    others_keys = {key for key in others if not key.endswith(COUNTER)}
    return keys == others_keys and all(torch.equal(weights[key], others[key]) for key in keys)


def strangers(match: Match, matches: list[Match], shapes: dict) -> list[str]:
    """The keys beside a network that keep its file from being taken.

    Class centres, other places of the same network and plain values may be there.
    """
    size = shapes[linear_key(shapes)][0]
    siblings = [other for other in matches if other.entry == match.entry]
    known = {other.prefix + key for other in siblings for key in other.weights} | HARMLESS
    rest = {
        key: value
        for key, value in match.beside.items()
        if isinstance(value, torch.Tensor) and key not in known
    }
    groups = {}
    for key in rest:
        groups.setdefault(head_of(key, match.prefix), []).append(key)
    heads = {
        group
        for group, keys in groups.items()
        if group and is_head(group, [rest[key] for key in keys], size)
    }
    return sorted(key for group, keys in groups.items() if group not in heads for key in keys)


def head_of(key: str, prefix: str) -> str:
    """The part of a key that names class centres, "head" of "head.kernel"; "" if it names none."""
    parts = key.removeprefix(prefix).split(".")
    for number, part in enumerate(parts):
        if HEAD.search(part):
            return ".".join(parts[: number + 1])
    return ""


def is_head(group: str, tensors: list[torch.Tensor], size: int) -> bool:
    """Whether these are a head's: named so, or with class centres of the network's dimensions."""
    named = bare(group) == "head"
    return named or any(value.dim() >= 2 and size in value.shape for value in tensors)
