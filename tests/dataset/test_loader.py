"""utils.shared_batches: batches that workers write into shared memory are those that reading
directly gives, for as long as they are promised to be.
"""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.dataset.test_dataset import jpeg, write_set
from utils.dataset import loader
from utils.dataset.loader import PREFETCH, open_loader
from utils.dataset.order import EpochBatches
from utils.dataset.records import MXFaceDataset
from utils.dataset.workers import end_workers, next_batch
from utils.errors import InputError

CPU = torch.device("cpu")
IMAGES = 60


class Features:
    """As a TeacherCache: every number tells image and place."""

    embedding_size = 4

    def read(self, indices):
        return (np.asarray(indices)[:, None, None] * 8 + np.arange(8).reshape(2, 4)).astype(
            np.float16
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Record 7 is damaged."""
    return write_set(
        tmp_path_factory.mktemp("faces"),
        [(float(label), jpeg(label) if label != 7 else b"damaged") for label in range(IMAGES)],
        f"{IMAGES},112,112\n",
    )


@pytest.fixture(params=[False, True], ids=["", "features"])
def dataset(request, folder):
    dataset = MXFaceDataset(folder)
    dataset.teacher_features = Features() if request.param else None
    return dataset


def assert_equal(left, right):
    assert (
        torch.equal(left.images, right.images)
        and torch.equal(left.labels, right.labels)
        and left.bad == right.bad
    )
    assert left.features is right.features is None or torch.equal(left.features, right.features)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_they_are_those_of_direct_reading_epoch_after_epoch(dataset, workers):
    """Compared one by one, each before the next is asked for: every slot is used several times, and
    the last batch of an epoch is smaller.
    """
    order = np.random.default_rng(0).permutation(IMAGES).tolist()
    batches = [order[first : first + 7] for first in range(0, IMAGES, 7)]
    loader = open_loader(dataset, batches, 7, workers, CPU)
    for _ in range(3):
        damaged = 0
        for indices, batch in zip(batches, loader, strict=True):
            assert_equal(batch, dataset.__getitems__(indices))
            damaged += len(batch.bad)
        assert damaged == 1
    end_workers(loader._iterator)


def test_a_batch_in_use_is_not_written_to(dataset):
    """However long it is used: the worker has all the time to go as far ahead as it may."""
    batches = [[index] for index in range(20)]
    loader = open_loader(dataset, batches, 1, 1, CPU)
    reading = iter(loader)
    for indices in batches:
        batch = next_batch(reading)
        before = batch.images.clone()
        while loader._iterator._worker_result_queue.qsize() < min(
            PREFETCH, len(batches) - 1 - indices[0]
        ):
            time.sleep(0.001)
        assert torch.equal(batch.images, before)
        assert_equal(batch, dataset.__getitems__(indices))
    end_workers(reading)


def test_an_epoch_left_in_the_middle_leaves_nothing_behind(folder):
    """What was read ahead is forgotten, and the same workers begin at the place that is asked
    for.
    """
    dataset = MXFaceDataset(folder)
    batches = EpochBatches(IMAGES, 4, 0, 1, seed=3)
    loader = open_loader(dataset, batches, 4, 2, CPU)
    for epoch, samples in ((0, 0), (0, 20), (1, 0)):
        batches.seek(epoch, samples)
        expected = list(batches)
        for indices, batch in zip(expected[:4], loader, strict=False):
            assert_equal(batch, dataset.__getitems__(indices))
    end_workers(loader._iterator)


def test_workers_that_are_started_anew(dataset):
    """The start methods other than fork send them the data set, and with it the way to the shared
    memory.
    """
    loader = open_loader(dataset, [[5, 6, 7], [8]], 3, 1, CPU)
    loader.multiprocessing_context = "spawn"
    for indices, batch in zip([[5, 6, 7], [8]], loader, strict=True):
        assert_equal(batch, dataset.__getitems__(indices))
    end_workers(loader._iterator)


def test_an_error_of_a_worker_is_told(tmp_path):
    dataset = MXFaceDataset(
        write_set(tmp_path, [(0.0, jpeg(0)), (5.0, jpeg(1)), (1.0, jpeg(2))], "2,112,112\n")
    )
    batches = iter(open_loader(dataset, [[0], [1]], 1, 1, CPU))
    next_batch(batches)
    with pytest.raises(InputError, match="^record 1 of .* has label 5, but the set has 2 classes"):
        next_batch(batches)
    end_workers(batches)


def test_without_workers_nothing_is_shared(dataset):
    loader = open_loader(dataset, [[0, 1], [2]], 2, 0, CPU)
    assert loader.dataset is dataset
    for indices, batch in zip([[0, 1], [2]], loader, strict=True):
        assert_equal(batch, dataset.__getitems__(indices))


def own_memory():
    """Bytes of shared memory that this process holds; what is free on the machine changes with what
    others do.
    """
    mapped = [
        line.split()
        for line in Path("/proc/self/maps").read_text().splitlines()
        if loader.SHARED in line
    ]
    return sum(
        int(end, 16) - int(start, 16) for start, end in (fields[0].split("-") for fields in mapped)
    )


def test_the_memory_goes_with_the_loader(folder):
    before = own_memory()
    # 3 slots of 600 images: 68 MB
    loader = open_loader(MXFaceDataset(folder), [[0, 1]], 600, 1, CPU)
    assert sum(1 for _ in loader) == 1
    assert own_memory() - before > 60e6
    end_workers(loader._iterator)
    del loader
    assert own_memory() - before < 30e6


def test_too_little_shared_memory(folder, monkeypatch):
    """Whoever comes second sees what the first one has taken: 2 workers x 3 slots x 100 images of
    37,632 bytes and a label of 8, each.
    """
    size, before = 2 * 3 * 100 * 37640, own_memory()
    monkeypatch.setattr(
        os,
        "statvfs",
        lambda path: SimpleNamespace(f_bavail=1.5 * size - (own_memory() - before), f_frsize=1),
    )
    first = open_loader(MXFaceDataset(folder), [[0]], 100, 2, CPU)
    with pytest.raises(
        InputError,
        match=r"^the batches of 2 reading processes take 23 MB of "
        r"shared memory, /dev/shm has 1\d MB left; make it larger \(docker run --shm-size=8g\)",
    ):
        open_loader(MXFaceDataset(folder), [[0]], 100, 2, CPU)
    del first
    open_loader(MXFaceDataset(folder), [[0]], 100, 2, CPU)
