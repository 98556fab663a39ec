"""A DataLoader's workers, in training and in evaluation: how they start, fail and end."""

import os
import signal

import cv2
import torch

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


def next_batch(batches):
    """The iterator's next batch, or None at its end.

    Raises a worker's InputError without the traceback it arrives wrapped in.
    """
    try:
        return next(batches, None)
    except InputError as error:
        message = str(error).strip().splitlines()[-1]
        raise InputError(message.removeprefix("utils.errors.InputError: ")) from error


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
