"""The colour order that weights were trained on, and the one place that turns BGR into RGB."""

import logging
from pathlib import Path

import torch

from utils.errors import InputError
from utils.weights.cvlface import PublishedConfig, read_configuration
from utils.weights.match import Match, bare, is_matrix

ORDERS = ("auto", "RGB", "BGR")
# of AdaFace's releases, whose networks see BGR images
ADAFACE_PREFIX = "model."
# of CVLFace's model.safetensors and model.pt
CVLFACE_PREFIXES = ("model.net.", "net.")
# which networks of the IR family have, and no other
IR_KEY = "input_layer.0.weight"
# what PyTorch Lightning, by which AdaFace was trained, writes into a checkpoint
LIGHTNING = {
    "pytorch-lightning_version",
    "callbacks",
    "hparams_name",
    "hyper_parameters",
    "loops",
    "lr_schedulers",
    "optimizer_states",
}

log = logging.getLogger(__name__)


def own_order(match: Match, content: dict, size: int, published: PublishedConfig | None) -> str:
    """The order that weights were trained on: "RGB", "BGR", "" where they may be of either.

    content: of the file. size: of the embedding. published: what CVLFace's configuration says.
    """
    if published:
        return published.color_space
    prefix = match.publishers_prefix
    if IR_KEY not in match.weights or prefix not in (ADAFACE_PREFIX, ""):
        return "RGB"
    if has_adafaces_head(match, size):
        return "BGR"
    if not prefix:
        return "RGB"
    return "" if LIGHTNING.isdisjoint(content) else "BGR"


def has_adafaces_head(match: Match, size: int) -> bool:
    """Whether class centres lie beside the network as AdaFace keeps them: head.kernel (D, C)."""
    kernels = [value for key, value in match.beside.items() if bare(key) == "head.kernel"]
    return any(is_matrix(value) and len(value) == size for value in kernels)


def published_beside(path: Path, match: Match, what: str) -> PublishedConfig | None:
    """CVLFace's configuration in the folder of one of its files of weights."""
    if match.publishers_prefix not in CVLFACE_PREFIXES:
        return None
    folder = path.parent.parent if path.parent.name == "pretrained_model" else path.parent
    return read_configuration(folder, what)


def choose_order(own: str, asked: str, subject: str, source: str, key: str) -> str:
    """The order of the images that a network gets: as asked, else its own.

    own: "" if it is not known. asked: of ``ORDERS``. subject: the message's first words.
    source: what its own order is known from, "" if it is only what most files have.
    Raises InputError if neither is known.
    """
    if asked == "auto":
        if not own:
            raise InputError(
                f"{subject} is an IR network under {ADAFACE_PREFIX}: AdaFace's take BGR images, "
                "others RGB, and neither AdaFace's head (head.kernel) nor Lightning's own keys "
                "(pytorch-lightning_version, ...) are beside it: set color_space=BGR or "
                "color_space=RGB (--color-space of commands without a configuration)"
            )
        return own
    if source and own and asked != own:
        log.warning("color_space=%s goes against %s: the %s gets %s", asked, source, key, asked)
    return asked


@torch.no_grad()
def see_rgb(network: torch.nn.Module) -> None:
    """Turn a network trained on BGR images into the same network for RGB.

    The input channels of its first convolution change places.
    """
    first = next(layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d))
    first.weight.copy_(first.weight.flip(1))
