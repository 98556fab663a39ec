"""The same work on many pieces, in as many processes as are wanted, results in order."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import cv2

from utils.errors import InputError

_work = None


def in_parallel(work: Callable, pieces: Iterable, workers: int, chunk: int = 1) -> Iterator:
    """Yield ``work(piece)`` for every piece, in their order; with one worker in this process.

    work: any object that can be called and pickled; every process gets it once. chunk: pieces that
    a process takes at a time. Errors: those of ``work``; InputError if a process was killed.
    """
    if workers == 1:
        yield from map(work, pieces)
        return
    # spawn: a fork would copy the locks of whatever threads the caller runs
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start, (work,)
    ) as pool:
        try:
            yield from pool.map(_run, pieces, chunksize=chunk)
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process was killed, as happens where memory runs out: try "
                "again with fewer (--workers)"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start(work: Callable) -> None:
    global _work
    _work = work
    cv2.setNumThreads(0)  # one thread a process: the work is divided already


def _run(piece):
    return _work(piece)
