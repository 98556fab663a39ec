"""Take synthetic photographs, in as many processes as there are.

No command; make_synthetic.py and synthetic_benchmarks.py order them.
"""

import multiprocessing
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from data.synth.faces import draw_identity
from data.synth.faces import draw_nuisance
from data.synth.faces import encode
from data.synth.faces import render

CHUNK = 16  # images a worker takes at once: enough to hide the cost of passing them on


class Photograph(NamedTuple):
    """Names one image of one person; with the seed and the nuisance scale this decides every byte
    of it.
    """

    split: int
    identity: int
    number: int  # 1 ...; the person is drawn with number 0
    view: str = "any"


def take(photograph: Photograph, seed: int, nuisance: float) -> bytes:
    """Draw one photograph and return it as JPEG bytes."""
    split, identity, number, view = photograph
    who = draw_identity(np.random.default_rng([seed, split, identity, 0]))
    look = draw_nuisance(np.random.default_rng([seed, split, identity, number]), nuisance, view)
    return encode(render(who, look), look.quality)


@contextmanager
def open_studio(workers: int, seed: int, nuisance: float):
    """Yield ``studio(photographs, take=take)``: an iterator of what ``take`` makes of each, in
    order, using ``workers`` processes.
    """
    if workers == 1:
        yield lambda photographs, take=take: map(
            partial(take, seed=seed, nuisance=nuisance), photographs
        )
        return
    # spawn: a fork would copy the locks of whatever threads the caller runs
    with multiprocessing.get_context("spawn").Pool(workers, cv2.setNumThreads, (0,)) as pool:
        yield lambda photographs, take=take: pool.imap(
            partial(take, seed=seed, nuisance=nuisance), photographs, CHUNK
        )


def show_progress(faces, total: int, name: str):
    """Wrap an iterator in a progress bar where a terminal watches."""
    return tqdm(faces, total=total, desc=name, unit="img", disable=None, leave=False)
