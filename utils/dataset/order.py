"""Which images a rank sees, in which order, mirrored or not.

It is a function of seed, epoch and position only: an interrupted run goes on with the very next
image, on any number of ranks.
"""

from collections.abc import Iterator

import numpy as np
import torch

from utils.dataset.read_ahead import ReadAhead
from utils.memory import mapped_range, mapped_zeros

# blocks that are shuffled together
WINDOW = 64
# beside seed, epoch and window: random numbers that neither mirrors nor augmentation use
WINDOW_STREAM = 64, 0


class EpochBatches:
    """Batch sampler of one rank: consecutive global batches of one shuffled order, each rank a
    contiguous part; the rest of the epoch is dropped.

    ``seek(epoch, samples)`` sets where the next iteration starts: ``samples`` images of that epoch
    are done, over all ranks. read_ahead: the blocks of the set, whose order is shuffled then, and
    within windows of them that of the images; None: that of all images.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool = True,
        read_ahead: ReadAhead | None = None,
    ):
        self.length = length
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.global_batch = batch_size * world_size
        self.seed = seed
        self.shuffle = shuffle
        self.read_ahead = read_ahead
        self.seek(0, 0)

    def seek(self, epoch: int, samples: int) -> None:
        self.epoch = epoch
        self.samples = samples

    def __len__(self) -> int:
        return (self.length - self.samples) // self.global_batch

    def __iter__(self) -> Iterator[list[int]]:
        if self.read_ahead:
            yield from self._from_blocks()
        elif self.shuffle:
            for batch in self._own_part():
                yield batch.tolist()
        else:
            for first in self._starts():
                yield list(range(first, first + self.batch_size))

    def _starts(self) -> range:
        """Where this rank's batches begin in the order of the epoch."""
        first = self.samples + self.rank * self.batch_size
        return range(first, first + len(self) * self.global_batch, self.global_batch)

    def _own_part(self) -> np.ndarray:
        """(batches, batch size) of this rank alone, so that all ranks of a machine hold the order
        of millions of images once.
        """
        order = mapped_range(self.length, np.int32 if self.length < 1 << 31 else np.int64)
        # the same numbers as permutation(length), in half the memory
        np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        used = order[self.samples : self.samples + len(self) * self.global_batch]
        batches_of_ranks = used.reshape(-1, self.world_size, self.batch_size)
        own = mapped_zeros(len(self) * self.batch_size, order.dtype).reshape(-1, self.batch_size)
        own[:] = batches_of_ranks[:, self.rank]
        return own

    def _from_blocks(self) -> Iterator[list[int]]:
        order = BlockOrder(self.read_ahead, self.seed, self.epoch)
        try:
            for first in self._starts():
                yield order.take(first, self.batch_size).tolist()
        finally:
            self.read_ahead.stop()


class BlockOrder:
    """The order of an epoch as shuffled blocks, shuffled once more within windows of WINDOW blocks.

    It is made, and read from the disk, a window ahead.
    """

    def __init__(self, read_ahead: ReadAhead, seed: int, epoch: int):
        self.read_ahead = read_ahead
        self.blocks = read_ahead.blocks
        self.seed = seed
        self.epoch = epoch
        self.order = np.random.default_rng([seed, epoch]).permutation(len(self.blocks))
        ends = np.cumsum(self.blocks.sizes[self.order], dtype=np.int64)
        # of the windows, and the end of the last one
        self.starts = np.concatenate([[0], ends[WINDOW - 1 : -1 : WINDOW], ends[-1:]])
        self.current = -1
        self.images = None

    def take(self, first: int, count: int) -> np.ndarray:
        """The images ``first`` ... ``first + count - 1`` of the epoch; for growing ``first``."""
        parts = []
        while count:
            window = int(np.searchsorted(self.starts, first, side="right")) - 1
            self._enter(window)
            part = self.images[first - self.starts[window] :][:count]
            parts.append(part)
            first += len(part)
            count -= len(part)
        return np.concatenate(parts)

    def _enter(self, window: int) -> None:
        """Have the images of ``window``, read from the disk, and the next one on its way."""
        if window == self.current:
            return
        blocks = self._blocks_of(window)
        self.read_ahead.finish(window, blocks)
        if window + 2 < len(self.starts):
            self.read_ahead.start(window + 1, self._blocks_of(window + 1))
        self.current = window
        self.images = np.concatenate([self.blocks.indices(int(block)) for block in blocks])
        np.random.default_rng([self.seed, self.epoch, window, *WINDOW_STREAM]).shuffle(self.images)

    def _blocks_of(self, window: int) -> np.ndarray:
        return self.order[window * WINDOW : (window + 1) * WINDOW]


def mirrored(seed: int, epoch: int, samples: int, global_batch: int) -> torch.Tensor:
    """(global_batch,) bool: which images are mirrored in a global batch.

    samples: images of the epoch that come before it.
    """
    drawn = np.random.default_rng([seed, epoch, samples]).random(global_batch)
    return torch.from_numpy(drawn < 0.5)
