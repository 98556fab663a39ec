"""A face network to be deployed, from any file: weights of one of ours, or any ONNX face model."""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from eval.embed import embed
from eval.roc import check_norms
from eval.verification import add_flips
from utils.errors import InputError
from utils.teacher.onnx import OnnxNetwork
from utils.weights.color_order import ORDERS
from utils.weights.load import load_network, read_weights, recognise
from utils.weights.read import digest_of, sha256


class Model(NamedTuple):
    """A network and what is known of it.

    network: (B, 3, 112, 112) RGB in [-1, 1] -> (B, embedding_size) float32.
    name: of the network ("?" where an ONNX file does not say it). step: of the run, "" if unknown.
    sha256: of the file; checkpoint_sha256: of the checkpoint that an ONNX file was made from, "" if
    it does not say; of a checkpoint the same as ``sha256``. color_space: the order that the file's
    weights, or its graph, take. place: where in the file the features or the weights are, in words,
    "" if it holds nothing else.
    """

    path: Path
    network: nn.Module
    name: str
    embedding_size: int
    parameters: int
    step: str
    sha256: str
    checkpoint_sha256: str
    color_space: str
    place: str

    @property
    def is_onnx(self) -> bool:
        return isinstance(self.network, OnnxNetwork)

    def about(self) -> dict:
        """What users of a file made from this model must know, for its metadata."""
        return dict(
            network=self.name,
            embedding_size=self.embedding_size,
            parameters=self.parameters,
            color_space="RGB",
            step=self.step,
            checkpoint_sha256=self.checkpoint_sha256,
            checkpoint_color_space=self.color_space,
            features="not normalised: add those of the mirror image, then divide by the L2 norm",
        )

    def describe(self) -> str:
        place = f", {self.place}" if self.place else ""
        return f"{self.path}: {self.name}, {self.color_space} images{place}"


def add_color_space(parser: argparse.ArgumentParser) -> None:
    """The flag of commands that have no configuration to set color_space in."""
    parser.add_argument(
        "--color-space",
        choices=ORDERS,
        default="auto",
        help="order of the colours that the model was trained on (%(default)s: as its file says; "
        "BGR for AdaFace's .ckpt files)",
    )


def load_model(path: str | Path, what: str, color_space: str = "auto") -> Model:
    """Read a model; the network is recognised by its weights, so nothing need be said of it.

    It takes RGB images, whatever it was trained on.
    what: what the file is wanted for, the first word of messages. color_space: of the images that
    it was trained on, "auto": as the file says.
    Raises InputError if the file is missing, unreadable, or holds no face network, or if its colour
    order is not known.
    """
    path = Path(path)
    load = load_onnx if path.suffix == ".onnx" else load_checkpoint
    return load(path, what, color_space)


def load_to_export(path: Path, color_space: str) -> Model:
    """The checkpoint that an export starts from.

    Raises InputError as ``load_model``, and if it is an ONNX model.
    """
    model = load_model(path, "--checkpoint", color_space)
    if model.is_onnx:
        raise InputError(
            f"--checkpoint: {path} is an ONNX model already; name the .pth, .ckpt or .safetensors "
            "file it was made from"
        )
    return model


def load_onnx(path: Path, what: str, color_space: str) -> Model:
    network = OnnxNetwork(path, what, color_space)
    about = network.about
    count = about.get("parameters", "")
    return Model(
        path,
        network,
        about.get("network", "?"),
        network.embedding_size,
        int(count) if count.isdecimal() else network.parameter_count,
        about.get("step", ""),
        sha256(*network.files),
        about.get("checkpoint_sha256", ""),
        network.color_space,
        network.choice,
    )


def load_checkpoint(path: Path, what: str, color_space: str) -> Model:
    weights = read_weights(path, what)
    known = recognise(weights)
    network, loaded = load_network(
        known.name, known.embedding_size, known.use_se, weights, color_space=color_space
    )
    step = re.match(r"(\d+)(backbone|ema)\b", path.name)
    digest = digest_of(path)
    return Model(
        weights.path,
        network.eval().requires_grad_(False),
        known.full_name,
        known.embedding_size,
        sum(value.numel() for value in network.parameters()),
        step[1] if step else "",
        digest,
        digest,
        loaded.color_space,
        loaded.source,
    )


def embed_faces(model: Model, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """(N, 112, 112, 3) uint8 RGB -> (N, D) float32 of unit length: a product is a cosine.

    Image and mirror image are added as in evaluation.
    Raises InputError naming the model if a feature is not finite, or zero: it has no direction to
    compare.
    """
    features = add_flips(embed(model.network, images, batch_size, name=model.path.name))
    try:
        check_norms(features)
    except InputError as error:
        raise InputError(f"{model.path}: {error}") from error
    return features
