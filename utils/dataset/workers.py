"""A DataLoader's workers, in training and in evaluation: how they start, fail and end."""

import os
import signal
from collections.abc import Callable
from functools import partial

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from utils.errors import InputError

# each asks a training run to finish its step and save
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def cores() -> int:
    """The cores this process may use; more reading processes than these only compete."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start_worker(worker_id: int) -> None:
    """``worker_init_fn`` of the DataLoader: one core each, and deaf to STOP_SIGNALS.

    These reach the whole process group, and the step in progress needs its workers.
    """
    cv2.setNumThreads(0)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def open_workers(dataset: Dataset, num_workers: int, collate_fn: Callable, **options) -> DataLoader:
    """A DataLoader with ``num_workers`` of these processes (0: none), read by ``next_batch``."""
    if num_workers == 0:
        return DataLoader(dataset, collate_fn=collate_fn, **options)
    return DataLoader(
        ErrorsSent(dataset),
        num_workers=num_workers,
        collate_fn=partial(collate, collate_fn),
        worker_init_fn=start_worker,
        **options,
    )


class ErrorsSent(Dataset):
    """A data set for workers: an InputError comes in place of the batch in which it is raised.

    A DataLoader would send the text of its traceback.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]):
        try:
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(indices)
            return [self.dataset[index] for index in indices]
        except InputError as error:
            return error


def collate(collate_fn: Callable, samples):
    return samples if isinstance(samples, InputError) else collate_fn(samples)


def next_batch(batches):
    """The iterator's next batch, or None at its end. Raises the InputError of a worker."""
    batch = next(batches, None)
    if isinstance(batch, InputError):
        raise batch
    return batch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on ``device``; a copy to a CUDA GPU is not waited for.

    On MPS such a copy would still read memory that a reading process already fills again.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def end_workers(batches) -> None:
    """End the processes behind a DataLoader's iterator.

    They ignore SIGTERM, by which the interpreter would end them at exit.
    """
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()
