"""What a rank computes with: the batches of an epoch on its device, mirrored and augmented."""

import logging
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from train.damaged_records import DamagedRecords
from train.run_state import Position
from train.schedule import images_of_step, steps_of_epoch
from utils import distributed
from utils.dataset.loader import open_loader
from utils.dataset.order import EpochBatches, mirrored
from utils.dataset.read_ahead import ReadAhead, RecordBlocks
from utils.dataset.workers import end_workers, next_batch, to_device
from utils.inputs import to_input


class Inputs(NamedTuple):
    """A batch of this rank, on its device.

    images (B, 3, 112, 112) in [-1, 1], float32 or bfloat16; labels (B,) int64; features (B, D)
    float32: the teacher's of these images, mirrored or not, None if the data set has none.
    """

    images: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor | None


class Feed:
    """The batches of a run in their order, which depends on seed, epoch and position only.

    dtype: of the images the networks get. Raises InputError if the set does not fill one step.
    """

    def __init__(self, cfg, dataset, device: torch.device, dtype: torch.dtype):
        self.cfg = cfg
        self.device = device
        self.dtype = dtype
        self.dataset = dataset
        self.length = len(dataset)
        self.batches = EpochBatches(
            self.length,
            cfg.batch_size,
            distributed.rank(),
            distributed.world_size(),
            cfg.seed,
            cfg.shuffle,
            open_read_ahead(dataset, cfg.shuffle_block),
        )
        self.step_samples = images_of_step(cfg, distributed.world_size())
        self.steps_per_epoch = steps_of_epoch(cfg, self.length, distributed.world_size())
        self.loader = open_loader(dataset, self.batches, cfg.batch_size, cfg.num_workers, device)
        self.damaged = DamagedRecords(cfg.max_bad_records)
        # Seconds spent waiting for images, since whoever reads this set it to 0.
        self.waited = 0.0
        self.reading = None
        self.resized_told = False

    def steps_left(self, samples: int) -> int:
        """Whole steps of an epoch of which ``samples`` images are done."""
        return (self.length - samples) // self.step_samples

    def fraction(self, position: Position) -> float:
        """How much of the epoch is done, 0 to 1."""
        return position.samples / (self.steps_per_epoch * self.step_samples)

    def read(self, position: Position) -> Iterator[Inputs]:
        """Yield this rank's batches of the epoch, from where ``position`` stands now."""
        epoch, samples = position.epoch, position.samples
        self.batches.seek(epoch, samples)
        self.reading = iter(self.loader)
        while True:
            started = time.monotonic()
            batch = next_batch(self.reading)
            self.waited += time.monotonic() - started
            if batch is None:
                return
            self.damaged.note(batch.bad)
            # kept in no variable here: the next one takes its memory
            yield self.to_inputs(batch, epoch, samples)
            samples += self.batches.global_batch

    def to_inputs(self, batch, epoch: int, samples: int) -> Inputs:
        """This rank's part of the global batch that begins after ``samples`` images."""
        cfg = self.cfg
        device = self.device
        before = distributed.rank() * cfg.batch_size
        flip = None
        if cfg.flip:
            flips = mirrored(cfg.seed, epoch, samples, self.batches.global_batch)
            flip = to_device(flips[before:][: cfg.batch_size], device)
        images = to_device(batch.images, device)
        images = to_input(images, flip, cfg.channels_last, self.dtype)
        if cfg.augment:
            # torchvision takes a second to import
            from utils.augment import augment

            images = augment(images, cfg.seed, epoch, samples + before)
        features = None
        if batch.features is not None:
            features = features_shown(to_device(batch.features, device), flip)
        return Inputs(images, to_device(batch.labels, device), features)

    def tell_resized(self) -> None:
        """Log once, after an epoch, how many images were of another size. A collective."""
        if self.resized_told:
            return
        self.resized_told = True
        count = distributed.all_reduce(torch.tensor(self.dataset.count_resized())).item()
        if count:
            logging.info(
                "%d of the %d images are not 112x112 and were resized (not aligned); "
                "data/make_rec.py --resize does it once for all",
                count,
                self.length,
            )

    def close(self) -> None:
        """End the reading processes."""
        end_workers(self.reading)


def open_read_ahead(dataset, block: int) -> ReadAhead | None:
    """Read ``block`` records that lie together at a time; 0: every record by itself."""
    if not block:
        return None
    return ReadAhead(RecordBlocks(dataset.record_files(), block), *distributed.place_on_node())


def features_shown(features: torch.Tensor, flip: torch.Tensor | None) -> torch.Tensor:
    """(B, 2, D) float16 features of images and mirror images -> (B, D) float32 of those shown.

    flip: (B,) bool, True where the mirror image is shown; None: nowhere.
    """
    plain, of_mirrors = features.unbind(1)
    return (plain if flip is None else torch.where(flip[:, None], of_mirrors, plain)).float()
