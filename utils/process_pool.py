"""The same work on many pieces, in as many processes as are wanted, results in order."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import cv2

from utils.errors import InputError

# what a worker process does, set when it starts
_work = None


@contextmanager
def open_pool(work: Callable, workers: int):
    """Yield ``run(pieces, chunk=1)``: an iterator over ``work(piece)`` of every piece, in their
    order; with one worker in this process.

    work: any object that can be called and pickled; every process gets it once. chunk: pieces that
    a process takes at a time. Raises what ``work`` does, and InputError if a process was killed.
    """
    if workers == 1:
        yield lambda pieces, chunk=1: map(work, pieces)
        return
    # spawn: a fork would copy the locks of whatever threads the caller runs
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, start_worker, (work,))
    try:
        yield lambda pieces, chunk=1: pool.map(run_piece, pieces, chunksize=chunk)
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process was killed, as happens where memory runs out: try "
            "again with fewer (--workers)"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_parallel(work: Callable, pieces: Iterable, workers: int, chunk: int = 1) -> Iterator:
    """Yield ``work(piece)`` for every piece, as a pool of its own does."""
    with open_pool(work, workers) as run:
        yield from run(pieces, chunk)


def start_worker(work: Callable) -> None:
    global _work
    _work = work
    # one thread a process: the work is divided already
    cv2.setNumThreads(0)


def run_piece(piece):
    return _work(piece)
