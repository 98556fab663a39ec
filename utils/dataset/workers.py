"""What the reading processes of training and of evaluation share: a DataLoader's workers, how they
start, fail and end.
"""

import os
import signal

import cv2
import torch

from utils.errors import InputError

# each asks a training run to finish its step and save
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def cores() -> int:
    """The cores this process may use; more reading processes than these only compete."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_worker(worker_id: int) -> None:
    """``worker_init_fn`` of the DataLoader: one core each, and deaf to signals that reach the whole
    process group, for the step in progress needs them.
    """
    cv2.setNumThreads(0)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def next_batch(batches):
    """The iterator's next batch, or None at its end.

    Errors: a worker's InputError, without the traceback it arrives wrapped in.
    """
    try:
        return next(batches, None)
    except InputError as error:  # its last line is the message
        raise InputError(
            str(error).strip().splitlines()[-1].removeprefix("utils.errors.InputError: ")
        ) from error


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on ``device``; a copy to a CUDA GPU is not waited for.

    On MPS such a copy would still read memory that a reading process already fills again.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def end_workers(batches) -> None:
    """End the processes behind a DataLoader's iterator by its own word: they ignore SIGTERM, by
    which the interpreter would end them at exit.
    """
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()
