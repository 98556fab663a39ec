"""A DataLoader whose workers write their batches into memory that they share with this process.

The memory is used again and again. Left to itself a DataLoader makes new shared memory for every
batch: both processes must first get its pages from the system, and a file descriptor is passed
along. That takes half as long as decoding.
"""

import itertools
import math
import os
from collections.abc import Iterable
from contextlib import nullcontext
from weakref import WeakValueDictionary

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from utils.dataset.base import Batch, FaceImages, keep_batch
from utils.dataset.workers import open_workers
from utils.errors import InputError
from utils.files import take_lock
from utils.recordio.files import IMAGE_SIZE

# batches that a worker makes ahead
PREFETCH = 2
# of a worker: those, and the one that is in use here
SLOTS = PREFETCH + 1
# where Linux keeps shared memory
SHARED = "/dev/shm"

_numbers = itertools.count()
# number -> SharedBatches, in the process that made them
_shared_batches = WeakValueDictionary()


def open_loader(
    dataset: FaceImages,
    batches: Iterable[list[int]],
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> DataLoader:
    """The Batches of ``dataset`` in the order of ``batches``, of at most ``batch_size`` indices
    each, read by ``num_workers`` processes (0: by this one).

    A batch stays what it is until the next one, or another epoch, is asked for; in pinned memory,
    where a GPU copies from, for good. Raises InputError if there is too little shared memory.
    """
    options = dict(
        batch_sampler=batches,
        collate_fn=keep_batch,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )
    if num_workers == 0:
        return open_workers(dataset, 0, **options)
    return open_workers(
        SharedBatches(dataset, batch_size, num_workers),
        num_workers,
        persistent_workers=True,
        prefetch_factor=PREFETCH,
        **options,
    )


class SharedBatches(Dataset):
    """``dataset`` for the workers of one DataLoader: each fills its SLOTS slots of memory in turn.

    The DataLoader lets a worker be PREFETCH batches ahead of the one that it gave out last, so none
    is written to while it is in use.
    """

    def __init__(self, dataset: FaceImages, batch_size: int, num_workers: int):
        self.dataset = dataset
        self.number = next(_numbers)
        self.turn = 0
        rows = dict(images=((*IMAGE_SIZE, 3), torch.uint8), labels=((), torch.int64))
        if dataset.teacher_features is not None:
            rows["features"] = (2, dataset.teacher_features.embedding_size), torch.float16
        slots = num_workers * SLOTS
        row_sizes = (math.prod(shape) * dtype.itemsize for shape, dtype in rows.values())
        with one_at_a_time():
            check_room(slots * batch_size * sum(row_sizes), num_workers)
            self.memory = {
                name: torch.empty(slots, batch_size, *shape, dtype=dtype).share_memory_()
                for name, (shape, dtype) in rows.items()
            }
        _shared_batches[self.number] = self

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> "SlotReference":
        """Called by a worker: reads into its next slot."""
        slot = get_worker_info().id * SLOTS + self.turn
        self.turn = (self.turn + 1) % SLOTS
        rows = {name: memory[slot, : len(indices)].numpy() for name, memory in self.memory.items()}
        bad = self.dataset.read_into(indices, **rows)
        return SlotReference(self.number, slot, len(indices), bad)

    def batch(self, slot: int, count: int, bad: list) -> Batch:
        rows = {name: memory[slot, :count] for name, memory in self.memory.items()}
        return Batch(rows["images"], rows["labels"], bad, rows.get("features"))


class SlotReference:
    """What a worker sends: the slot that it has filled. It arrives as the Batch in that slot."""

    def __init__(self, number: int, slot: int, count: int, bad: list):
        self.arguments = number, slot, count, bad

    def __reduce__(self):
        return attach_slot, self.arguments


def attach_slot(number: int, slot: int, count: int, bad: list) -> Batch:
    return _shared_batches[number].batch(slot, count, bad)


def one_at_a_time():
    """A context for one process of a machine at a time, so that each sees what those before it have
    taken.
    """
    if os.path.isdir(SHARED):
        return take_lock(f"{SHARED}/batches-{os.getuid()}.lock")
    return nullcontext()


def check_room(size: int, num_workers: int) -> None:
    """Raises InputError if SHARED has no ``size`` bytes left.

    A write beyond its end would kill the process without a word.
    """
    if not os.path.isdir(SHARED):
        return
    status = os.statvfs(SHARED)
    free = status.f_bavail * status.f_frsize
    if size > free:
        raise InputError(
            f"the batches of {num_workers} reading processes take {size / 1e6:,.0f} MB of shared "
            f"memory, {SHARED} has {free / 1e6:,.0f} MB left; make it larger (docker run "
            "--shm-size=8g), or take fewer processes (num_workers, --workers) or a smaller batch"
        )
