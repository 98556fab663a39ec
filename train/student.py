"""The student in training, and the moving average of its weights."""

import copy
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from utils import distributed
from utils.precision import autocast


class Student:
    """``student(images)``: features under autocast, compiled, averaging gradients over the ranks.

    backbone: the plain network, on run.device.
    """

    def __init__(self, backbone: torch.nn.Module, run, compiled: bool):
        self.backbone = backbone
        self.run = run
        self.frozen = False
        self.network = torch.compile(backbone) if compiled else backbone
        self.no_sync = nullcontext
        if distributed.world_size() > 1:
            device_ids = [run.device] if run.device.type == "cuda" else None
            self.network = DistributedDataParallel(
                self.network, gradient_as_bucket_view=True, device_ids=device_ids
            )
            self.no_sync = self.network.no_sync

    def freeze(self, frozen: bool) -> None:
        """Frozen, it works as in evaluation: BatchNorm's statistics stay, no gradient comes in."""
        self.frozen = frozen
        self.backbone.train(not frozen)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(not self.frozen), autocast(self.run.device, self.run.precision):
            features = self.network(images)
        # a loss whose centres are not learned still has something to differentiate by
        return features.requires_grad_() if self.frozen else features


class Average:
    """An exponential moving average of a network's weights: a <- decay a + (1 - decay) w.

    Buffers (BatchNorm's statistics) are copied. network: the averaged one, to measure and save;
    with decay 0 the network itself.
    """

    def __init__(self, backbone: torch.nn.Module, decay: float):
        self.backbone = backbone
        self.decay = decay
        self.network = backbone
        if decay:
            self.network = copy.deepcopy(backbone).requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of another step."""
        if not self.decay:
            return
        weights = list(self.backbone.parameters())
        torch._foreach_lerp_(list(self.network.parameters()), weights, 1 - self.decay)
        for own, buffer in zip(self.network.buffers(), self.backbone.buffers(), strict=True):
            own.copy_(buffer)

    def restart(self) -> None:
        """Begin at the weights as they are."""
        self.network.load_state_dict(self.backbone.state_dict())

    def state_dict(self) -> dict | None:
        return self.network.state_dict() if self.decay else None
