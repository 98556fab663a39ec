"""Images to features: the only place where evaluation runs a network."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils.distributed import all_gather_rows, rank, world_size
from utils.errors import InputError
from utils.images import mirror, to_input
from utils.precision import PRECISIONS, autocast


class Images(Protocol):
    """N images of one size: an array or tensor (N, H, W, 3) uint8 RGB, a list of (H, W, 3), or anything that behaves so.

    ``images[start:stop]`` is the only access, in increasing order, so that an implementation can decode ahead.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> "np.ndarray | torch.Tensor | list[np.ndarray]": ...


def embed(backbone: nn.Module, images: Images, batch_size: int, *, device: torch.device | str | None = None,
          precision: str = "fp32", channels_last: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the features of all images and of their mirror images.

    ``images``: N uint8 RGB images (N, H, W, 3), the same on every rank. ``batch_size``: images at a time on one rank; the
    network sees twice as many, both flips in one pass. ``device``: where the backbone lies, found by itself.
    ``precision``: "fp32", "bf16" or "fp16" (autocast). Returns two (N, D) float32 CPU tensors, not normalised.
    All ranks call it together: each embeds a contiguous share and all receive everything. The backbone runs in eval mode
    and gets its mode back. Raises InputError for no images, an unknown precision, or a feature that is not finite.
    """
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    if len(images) == 0:
        raise InputError("no images to embed")
    # DDP's forward broadcasts buffers, which would hang: ranks run different numbers of batches.
    backbone = backbone.module if isinstance(backbone, DistributedDataParallel) else backbone
    device = torch.device(device) if device is not None else _device_of(backbone)
    start, stop = (len(images) * part // world_size() for part in (rank(), rank() + 1))
    with _eval_mode(backbone), torch.inference_mode(), autocast(device, precision):
        # With fewer images than ranks a share can be empty; one image then tells this rank the feature size.
        batches = [_embed_batch(backbone, images[first:min(first + batch_size, max(stop, first + 1))], device, channels_last)
                   for first in range(start, max(stop, start + 1), batch_size)]
    both = all_gather_rows(torch.cat(batches)[:stop - start]).cpu()
    _check_finite(both)
    return tuple(half.contiguous() for half in both.chunk(2, dim=1))


def _embed_batch(backbone: nn.Module, batch, device: torch.device, channels_last: bool) -> torch.Tensor:
    """Features of the batch and of its mirror images side by side: (B, 2 D) float32 on ``device``."""
    # The copy makes read-only and memory-mapped arrays acceptable to torch, and stacks lists.
    pixels = batch if isinstance(batch, torch.Tensor) else torch.from_numpy(np.array(batch))
    x = to_input(pixels.to(device), channels_last=channels_last)
    plain, mirrored = backbone(torch.cat([x, mirror(x)])).float().chunk(2)
    return torch.cat([plain, mirrored], dim=1)


@contextmanager
def _eval_mode(backbone: nn.Module) -> Iterator[None]:
    # Module by module: a network may hold frozen parts that were in eval mode before.
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _device_of(backbone: nn.Module) -> torch.device:
    return next(backbone.parameters(), torch.empty(0)).device


def _check_finite(features: torch.Tensor) -> None:
    # After the gathering, so that every rank raises and none waits for another.
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        first = int(torch.nonzero(~finite)[0])
        count = int((~finite).sum())
        raise InputError(f"features are not finite (NaN or infinite) for {count} of {len(features)} images, first image index {first}")
