"""Images to features: the only place where evaluation, inside and outside of training, runs a
network.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm import tqdm

from eval.feature_store import StoredFeatures
from utils import distributed
from utils.dataset.workers import cores, end_workers, next_batch, open_workers, to_device
from utils.distributed import all_gather_rows, rank, world_size
from utils.errors import InputError
from utils.inputs import mirror, to_input
from utils.precision import PRECISIONS, autocast

# images whose features wait on the device before they are copied to the host: 32 MB, and the device
# need not be waited for
ON_DEVICE = 8192


class Images(Protocol):
    """N images of one size: an array or tensor (N, H, W, 3) uint8 RGB, a list of (H, W, 3), or
    anything that behaves so.

    ``images[start:stop]`` is the only access, in increasing order, so that an implementation can
    decode ahead. A ``torch.utils.data.Dataset`` is read by index instead, ``images[i]`` -> (H, W,
    3), in worker processes if asked.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> "np.ndarray | torch.Tensor | list[np.ndarray]": ...


def embed(
    backbone: nn.Module,
    images: Images | Dataset,
    batch_size: int,
    *,
    flip: bool = True,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    channels_last: bool = False,
    store: StoredFeatures | None = None,
    name: str = "images",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the features of all images and of their mirror images.

    ``images``: N uint8 RGB images (N, H, W, 3), the same on every rank. ``batch_size``: images at a
    time on one rank; with ``flip`` the network sees twice as many, both flips in one pass.
    ``num_workers``: reading processes, for a Dataset. ``device``: where the backbone lies, found by
    itself. ``precision``: "fp32", "bf16" or "fp16" (autocast). ``store``: features on disk; what is
    there is not computed again, what is computed is there even if this is interrupted. ``name``:
    for the progress bar. Returns two (N, D) float32 CPU tensors, not normalised, of the images and
    of their mirror images (None without ``flip``). All ranks call it together: each embeds a share
    and all receive everything. The backbone runs in eval mode and gets its mode back. Raises
    InputError, on all ranks, for no images, an unknown precision, an unreadable image, or a feature
    that is not finite.
    """
    if len(images) == 0:
        raise InputError("no images to embed")
    # DDP's forward broadcasts buffers, which would hang: ranks run different numbers of batches.
    backbone = backbone.module if isinstance(backbone, DistributedDataParallel) else backbone
    run = _options(backbone, flip, device, precision, channels_last)
    with _eval_mode(backbone):
        features = (_embed_share if store is None else _embed_missing)(
            backbone, images, batch_size, num_workers, store, name, run
        )
    return (
        tuple(half.contiguous() for half in features.chunk(2, dim=1)) if flip else (features, None)
    )


def embed_parts(
    network: nn.Module,
    images: Images | Dataset,
    parts: list[range],
    batch_size: int,
    keep: Callable,
    *,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    channels_last: bool = False,
    name: str = "images",
) -> None:
    """Compute the features of ``parts`` of the images, ranges of indices, and hand on those of each
    part when it is done; nothing stays in memory.

    ``keep(part, features)`` receives (n, 2 D) float32 on the CPU: of the images and, side by side,
    of their mirror images. The rest as ``embed``, but no collective runs: every rank has parts of
    its own, and its errors are its own.
    """
    run = _options(network, True, device, precision, channels_last)
    with _eval_mode(network):
        _embed_mine(network, images, parts, batch_size, num_workers, name, run, keep)


def split(parts: list[range], batch_size: int) -> list[range]:
    """The batches in which the images of ``parts`` are read: of each part ``batch_size`` at a time
    and then the rest.
    """
    return [
        range(first, min(first + batch_size, part.stop))
        for part in parts
        for first in range(part.start, part.stop, batch_size)
    ]


def _options(backbone, flip, device, precision, channels_last) -> dict:
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    device = torch.device(device) if device is not None else _device_of(backbone)
    return dict(flip=flip, device=device, precision=precision, channels_last=channels_last)


def _embed_share(backbone, images, batch_size, num_workers, store, name, run) -> torch.Tensor:
    """Each rank embeds a contiguous share; all gather it."""
    start, stop = (len(images) * part // world_size() for part in (rank(), rank() + 1))
    # With fewer images than ranks a share can be empty; one image then tells this rank the feature
    # size.
    end, done = max(stop, start + 1), []
    parts = [range(first, min(first + ON_DEVICE, end)) for first in range(start, end, ON_DEVICE)]
    _embed_parts(
        backbone,
        images,
        parts,
        batch_size,
        num_workers,
        name,
        run,
        lambda part, features: done.append(features),
    )
    return all_gather_rows(torch.cat(done)[: stop - start])


def _embed_missing(backbone, images, batch_size, num_workers, store, name, run) -> torch.Tensor:
    """The ranks share out the parts that the store lacks and write each when it is done; all read
    everything from there.
    """
    missing = distributed.main_computes(store.missing)
    _embed_parts(
        backbone,
        images,
        missing[rank() :: world_size()],
        batch_size,
        num_workers,
        name,
        run,
        store.write,
    )
    return distributed.all_succeed(store.read)


def _embed_parts(*arguments) -> None:
    """As ``_embed_mine``, called by all ranks.

    An error of one rank is raised on all when they are through.
    """
    distributed.all_succeed(lambda: _embed_mine(*arguments))


def _embed_mine(
    backbone, images, parts: list[range], batch_size, num_workers, name, run, keep
) -> None:
    """Call ``keep(part, features)`` for every part: (n, D or 2 D) float32 on the CPU."""
    batches = _read(images, split(parts, batch_size), num_workers, run["device"])
    bar = tqdm(
        total=sum(map(len, parts)),
        desc=name,
        unit="img",
        leave=False,
        disable=None if distributed.is_main() else True,
    )
    try:
        for part in parts:
            features = []
            for batch in split([part], batch_size):
                distributed.begin()  # a long evaluation is no rank that hangs
                features.append(_embed_batch(backbone, next_batch(batches), **run))
                bar.update(len(batch))
            features = torch.cat(features).cpu()
            _check_finite(features, part.start, images)
            keep(part, features)
    finally:
        end_workers(batches)
        bar.close()


def _read(images, batches: list[range], num_workers: int, device: torch.device) -> Iterator:
    """Yield the images of every batch: (B, H, W, 3) uint8, as tensor, array or list."""
    if isinstance(images, Dataset):
        return iter(
            open_workers(
                images,
                min(num_workers, cores()),
                _stack,
                batch_sampler=batches,
                pin_memory=device.type == "cuda",
            )
        )
    return (images[batch.start : batch.stop] for batch in batches)


def _stack(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images))


def _embed_batch(
    backbone: nn.Module,
    batch,
    flip: bool,
    device: torch.device,
    precision: str,
    channels_last: bool,
) -> torch.Tensor:
    """Features of the batch and, side by side, of its mirror images: (B, 2 D) float32 on
    ``device``.
    """
    # The copy makes read-only and memory-mapped arrays acceptable to torch, and stacks lists.
    pixels = batch if isinstance(batch, torch.Tensor) else torch.from_numpy(np.array(batch))
    x = to_input(to_device(pixels, device), channels_last=channels_last)
    with torch.inference_mode(), autocast(device, precision):
        if not flip:
            return backbone(x).float()
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


def _check_finite(features: torch.Tensor, first: int, images) -> None:
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        index = first + int(torch.nonzero(~finite)[0])
        name = f" ({images.name_of(index)})" if hasattr(images, "name_of") else ""
        raise InputError(
            f"features are not finite (NaN or infinite) for {int((~finite).sum())} of "
            f"{len(features)} images, first image index {index}{name}"
        )
