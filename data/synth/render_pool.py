"""Take synthetic photographs, in as many processes as are wanted."""

from contextlib import contextmanager
from functools import partial
from operator import methodcaller
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.synth.faces import draw_identity, draw_nuisance, encode, render
from utils.process_pool import open_pool

# images a worker takes at once: enough to hide the cost of passing them on
CHUNK = 16


class Photograph(NamedTuple):
    """Names one image of one person; with seed and nuisance scale it decides every byte of it."""

    split: int
    identity: int
    # 1 ...; the person is drawn with number 0
    number: int
    view: str = "any"

    def take(self, seed: int, nuisance: float) -> bytes:
        """Draw it, as JPEG bytes."""
        split, identity, number, view = self
        who = draw_identity(np.random.default_rng([seed, split, identity, 0]))
        look = draw_nuisance(np.random.default_rng([seed, split, identity, number]), nuisance, view)
        return encode(render(who, look), look.quality)


@contextmanager
def open_studio(workers: int, seed: int, nuisance: float):
    """Yield ``studio(photographs, name="")``: an iterator over what these, or other objects with a
    method ``take``, show, in order, taken by ``workers`` processes, under a progress bar.
    """
    with open_pool(methodcaller("take", seed, nuisance), workers) as run:
        yield partial(take_all, run)


def take_all(run, photographs: list, name: str = "") -> tqdm:
    images = run(photographs, CHUNK)
    return tqdm(images, name, len(photographs), unit="img", disable=None, leave=False)
