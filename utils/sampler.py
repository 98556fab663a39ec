"""Which images a rank sees, in which order, mirrored or not: a function of seed, epoch and position only.

So an interrupted run goes on with the very next image, on any number of ranks.
"""

import numpy as np
import torch


class EpochBatches:
    """Batch sampler of one rank: consecutive global batches of one shuffled order, each rank a contiguous part; the rest of the epoch is dropped.

    ``seek(epoch, samples)`` sets where the next iteration starts: ``samples`` images of that epoch are done, over all ranks.
    """

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int, seed: int, shuffle: bool = True):
        self.length, self.batch_size, self.rank = length, batch_size, rank
        self.global_batch = batch_size * world_size
        self.seed, self.shuffle = seed, shuffle
        self.seek(0, 0)

    def seek(self, epoch: int, samples: int) -> None:
        self.epoch, self.samples = epoch, samples

    def __len__(self) -> int:
        return (self.length - self.samples) // self.global_batch

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length) if self.shuffle else np.arange(self.length)
        for number in range(len(self)):
            first = self.samples + number * self.global_batch + self.rank * self.batch_size
            yield order[first:first + self.batch_size].tolist()


def mirrored(seed: int, epoch: int, samples: int, global_batch: int) -> torch.Tensor:
    """(global_batch,) bool: which images are mirrored in the global batch that starts after ``samples`` images of the epoch."""
    return torch.from_numpy(np.random.default_rng([seed, epoch, samples]).random(global_batch) < 0.5)
