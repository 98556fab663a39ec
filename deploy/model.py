"""A face network to be deployed, from whatever file it is in: one of ours as .pth, .ckpt or .safetensors, or any ONNX face model."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from backbones import NAMES, build_backbone
from eval.embed import embed
from eval.roc import check_norms
from eval.verification import add_flips
from utils.checkpoint import ADAFACE_PREFIX, advice, network_weights, read_tensors, sha256
from utils.errors import InputError
from utils.looks import feature_size, looks_like, which_network
from utils.onnx_network import OnnxNetwork


class Model(NamedTuple):
    """A network, (B, 3, 112, 112) RGB in [-1, 1] -> (B, embedding_size) float32, and what is known of it.

    name: of the network ("?" where an ONNX file does not say it). step: of the run, "" if unknown. sha256: of the file;
    checkpoint_sha256: of the checkpoint that an ONNX file was made from, "" if it does not say; of a checkpoint the same as ``sha256``.
    """

    path: Path
    network: nn.Module
    name: str
    embedding_size: int
    parameters: int
    step: str
    sha256: str
    checkpoint_sha256: str

    @property
    def is_onnx(self) -> bool:
        return isinstance(self.network, OnnxNetwork)


def load_model(path: str | Path, what: str) -> Model:
    """Read a model; the network is recognised by its weights, so nothing need be said of it. AdaFace's releases, trained on BGR, take RGB as all others.

    what: what the file is wanted for, the first word of messages.
    Errors: InputError if the file is missing, unreadable, or holds no face network.
    """
    path = Path(path)
    return load_onnx(path, what) if path.suffix == ".onnx" else load_checkpoint(path, what)


def load_onnx(path: Path, what: str) -> Model:
    network = OnnxNetwork(path, what)
    about = network.about
    count = about.get("parameters", "")
    return Model(path, network, about.get("network", "?"), network.embedding_size, int(count) if count.isdecimal() else network.parameter_count,
                 about.get("step", ""), sha256(*network.files), about.get("checkpoint_sha256", ""))


def load_checkpoint(path: Path, what: str) -> Model:
    weights, prefix = network_weights(read_tensors(path, what))
    size = feature_size(weights)
    name, use_se = which_network(weights, size)
    if not name:
        raise InputError(f"{what}: {path} holds no network that can be built here ({', '.join(NAMES)}){advice(looks_like(weights, prefix))}")
    network = build_backbone(name, size, use_se=use_se)
    network.load_state_dict(weights)
    if prefix == ADAFACE_PREFIX:
        exchange_colours(network)
    step = re.match(r"(\d+)backbone\b", path.name)
    digest = sha256(path)
    return Model(path, network.eval().requires_grad_(False), f"{name}{'_se' if use_se else ''}", size, sum(value.numel() for value in network.parameters()),
                 step[1] if step else "", digest, digest)


def exchange_colours(network: nn.Module) -> None:
    """Turn a network that takes BGR into one that takes RGB: its first convolution reads the channels in the other order."""
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        first.weight.copy_(first.weight.flip(1))


def embed_faces(model: Model, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """(N, 112, 112, 3) uint8 RGB -> (N, D) float32 of unit length, image and mirror image added as in evaluation: a product of two is their cosine.

    Errors: InputError naming the model if a feature is not finite, or zero: it has no direction to compare.
    """
    features = add_flips(embed(model.network, images, batch_size, name=model.path.name))
    try:
        check_norms(features)
    except InputError as error:
        raise InputError(f"{model.path}: {error}") from error
    return features
