"""From a file of weights to a network that takes RGB images: the only way, for every command."""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from backbones import NAMES, build_backbone
from utils.errors import InputError
from utils.weights.color_order import choose_order, own_order, published_beside, see_rgb
from utils.weights.cvlface import PublishedConfig
from utils.weights.match import (
    COUNTER,
    Match,
    choose,
    is_matrix,
    linear_key,
    matches_in,
    prefixes_of,
    shape_of,
    states_of,
    strangers,
    take,
)
from utils.weights.read import advice, read_tensors, split_mark
from utils.weights.recognise import Network, looks_like, networks_in, shapes_of


class WeightFile(NamedTuple):
    """A file of weights that was read. what: it was wanted for. average: #ema asks for."""

    path: Path
    content: dict
    average: bool
    what: str

    @property
    def subject(self) -> str:
        """The first words of messages."""
        return f"{self.what}: {self.path}"


class Loaded(NamedTuple):
    """What a network was given.

    place: the entry and prefix of the weights in the file, in words, "" if it holds nothing else.
    color_space: the order of the images they were trained on; own_color_space: the same as the
    file has it, "" if it does not tell. published: what CVLFace's configuration says of them.
    """

    place: str
    color_space: str
    own_color_space: str
    published: PublishedConfig | None

    @property
    def source(self) -> str:
        return f"weights of {self.place}" if self.place else ""

    def describe(self) -> str:
        return f"{self.color_space} images" + (f", {self.source}" if self.place else "")


def read_weights(path: str | Path, what: str, hint: str = "") -> WeightFile:
    """A file of weights, of which #ema behind the path means the exponential average.

    Raises InputError as ``read_tensors``.
    """
    file, average = split_mark(path) if str(path) else (path, False)
    return WeightFile(file, read_tensors(file, what, hint), average, what)


def load_backbone(
    network: torch.nn.Module, path: str | Path, what: str, hint: str = "", color_space: str = "auto"
) -> Loaded:
    """Load a network's weights strictly from any published format; it takes RGB images afterwards.

    color_space: the order that they were trained on; "auto": as the file says.
    Raises InputError as ``read_tensors`` and ``load_into``.
    """
    return load_into(network, read_weights(path, what, hint), color_space)


def load_network(
    name: str, embedding_size: int, use_se: bool, weights: WeightFile, **options
) -> tuple[torch.nn.Module, Loaded]:
    """One of our networks with the weights of a file. options: of ``load_into``."""
    network = empty_backbone(name, embedding_size, use_se)
    return network, load_into(network, weights, **options)


def load_into(
    network: torch.nn.Module,
    weights: WeightFile,
    color_space: str = "auto",
    key: str = "network",
    published: PublishedConfig | None = None,
) -> Loaded:
    """Give a network its weights from a file's content; one trained on BGR images takes RGB then.

    key: "network" or "teacher", which messages name. published: CVLFace's configuration, where it
    has been read; it is looked for beside a file with CVLFace's keys.
    Raises InputError that names the first differing keys or shapes and which network they look
    like; if several networks fit; if the colour order is neither known nor set.
    """
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    match = find_match(weights, shapes, key)
    published = published or published_beside(weights.path, match, weights.what)
    own = own_order(match, weights.content, shapes[linear_key(shapes)][0], published)
    source = ""
    if published:
        source = f"{published.path}, which states {own}"
    elif own == "BGR":
        source = f"AdaFace's files, which are {own}"
    order = choose_order(own, color_space, weights.subject, source, key)
    counters = {
        name: torch.zeros(shape, dtype=torch.int64)
        for name, shape in shapes.items()
        if name not in match.weights
    }
    network.load_state_dict(match.weights | counters)
    if order == "BGR":
        see_rgb(network)
    return Loaded(match.where(), order, own, published)


def find_match(weights: WeightFile, shapes: dict, key: str) -> Match:
    """Where the weights of a network of these {key: shape} are.

    Raises InputError as ``load_into``.
    """
    matches = matches_in(weights.content, shapes)
    match = choose(matches, weights.average, weights.subject)
    if match is None:
        reason = mismatch(nearest_to(weights.content, shapes), shapes)
        hint = advice(looks_like(weights.content, key))
        raise InputError(f"{weights.subject} does not fit: {reason}{hint}")
    if names := strangers(match, matches, shapes):
        # a larger network may hold all of a smaller one
        is_larger = any(
            other.match.where() == match.where() and len(other.match.weights) > len(match.weights)
            for other in networks_in(weights.content)
        )
        hint = advice(looks_like(weights.content, key)) if is_larger else ""
        where = f" beside the network {match.where()}" if match.where() else ""
        raise InputError(
            f"{weights.subject} does not fit: {listed(names, 'unexpected keys')}{where}{hint}"
        )
    return match


def nearest_to(content: dict, shapes: dict) -> Match:
    """The place of a file's content that has most of a network's keys."""
    states = list(states_of(content)) or [("", {str(key): value for key, value in content.items()})]
    known = next((network.match for network in networks_in(content)), None)
    if known:
        states = [(entry, state) for entry, state in states if entry == known.entry]
    prefixes = {"", known.prefix if known else ""}
    candidates = []
    for entry, state in states:
        guesses = {
            prefix
            for key in (linear_key(shapes), next(iter(shapes)))
            for prefix in prefixes_of(state, key)
        }
        candidates += [take(entry, state, prefix, shapes) for prefix in prefixes | guesses]
    return max(candidates, key=lambda match: (len(match.weights), -len(match.prefix)))


def mismatch(match: Match, shapes: dict) -> str:
    """What keeps weights from being a network's, in words."""
    missing = [key for key in shapes if key not in match.weights and not key.endswith(COUNTER)]
    unexpected = [key.removeprefix(match.prefix) for key in match.beside]
    shaped = [
        f"{key} is {shape_of(value)} instead of {shapes[key]}"
        for key, value in match.weights.items()
        if shape_of(value) != shapes[key]
    ]
    kinds = {
        "missing keys": sorted(missing),
        "unexpected keys": sorted(unexpected),
        "other shapes": shaped,
    }
    return "; ".join(listed(names, kind) for kind, names in kinds.items() if names)


def listed(names: list[str], kind: str) -> str:
    return f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def recognise(weights: WeightFile) -> Network:
    """The network of ours that a file holds. Raises InputError if there is none, or several."""
    networks = list(networks_in(weights.content))
    match = choose([network.match for network in networks], weights.average, weights.subject)
    if match is None:
        hint = advice(looks_like(weights.content))
        raise InputError(
            f"{weights.subject} holds no network that can be built here ({', '.join(NAMES)}){hint}"
        )
    return next(network for network in networks if network.match is match)


def embedding_size_in(content: dict, name: str, use_se: bool) -> int:
    """The dimensions of a network's features in a file; 0 if its linear layer is not there."""
    key = linear_key(shapes_of(name, use_se, 1))
    for _, state in states_of(content):
        for prefix in prefixes_of(state, key):
            value = state[prefix + key]
            if is_matrix(value):
                return len(value)
    return 0


def empty_backbone(name: str, size: int, use_se: bool) -> torch.nn.Module:
    """A network whose values all come from a file afterwards; it takes no random numbers."""
    with torch.device("meta"):
        network = build_backbone(name, size, use_se=use_se)
    return network.to_empty(device="cpu")


def run_beside(checkpoint: str | Path) -> Path | None:
    """The config.json of the run that wrote a checkpoint; None if there is none of a run's."""
    path = split_mark(checkpoint)[0].parent / "config.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        # whoever reads it as a run's says what is wrong with it
        return path
    # those of the Hugging Face hub, CVLFace's among them, name classes
    foreign = isinstance(content, dict) and ("conf" in content or "architectures" in content)
    return None if foreign else path
