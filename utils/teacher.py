"""The teacher: loaded strictly, frozen, in eval mode, outside DistributedDataParallel, and never random."""

import logging
from pathlib import Path

import torch
from torch import nn

from backbones import build_backbone
from utils.checkpoint import ADAFACE_PREFIX, load_backbone, sha256

log = logging.getLogger(__name__)


class Teacher(nn.Module):
    """A frozen network: (B, 3, 112, 112) RGB in [-1, 1] -> (B, D) float32 features without gradient.

    bgr: the weights were trained on BGR images (AdaFace's releases), so the channels are turned around first.
    """

    def __init__(self, network: nn.Module, bgr: bool):
        super().__init__()
        self.network, self.bgr = network.eval().requires_grad_(False), bgr

    def train(self, mode: bool = True):
        return super().train(False)      # BatchNorm of a teacher must never follow the student's batches

    @torch.no_grad()
    def forward(self, images):
        return self.network(images.flip(1) if self.bgr else images).float()


def load_teacher(network: str, path: str | Path, embedding_size: int, color_space: str = "auto") -> Teacher:
    """Build ``network`` and load its weights from ``path`` in any published format.

    color_space: "RGB", "BGR", or "auto": BGR for AdaFace checkpoints (keys under ``model.``), RGB for all others.
    Errors: InputError if the network is unknown, or the file missing, unreadable or of another network.
    """
    use_se = network.endswith("_se")
    backbone = build_backbone(network.removesuffix("_se"), embedding_size, use_se=use_se)
    prefix = load_backbone(backbone, path, "teacher", "train one with run_standalone.sh, or set pretrained_teacher_path to a published backbone")
    bgr = color_space == "BGR" or color_space == "auto" and prefix == ADAFACE_PREFIX
    parameters = sum(p.numel() for p in backbone.parameters())
    log.info("Teacher %s: %s parameters, %s input, %s, SHA-256 %s", network, f"{parameters:,}", "BGR" if bgr else "RGB", path, sha256(path))
    return Teacher(backbone, bgr)
