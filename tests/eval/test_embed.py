"""eval.embed and eval.features: data sets read by workers, features kept on disk, errors that reach
every rank.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also started by torchrun, below

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

from backbones import build_backbone
from eval import feature_store
from eval.embed import embed
from eval.feature_store import open_store
from tests import rounding
from tests.commands import run
from tests.eval.test_verification import faces, plain_loop, small_backbone
from utils import distributed
from utils.errors import InputError


class Files(Dataset):
    """Images behind an index, as the readers of IJB and TinyFace give them; ``damaged`` ones cannot
    be read.
    """

    def __init__(self, count: int, damaged=()):
        self.pixels = faces(count, (20, 16))
        self.damaged = damaged

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        if index in self.damaged:
            raise InputError(f"loose_crop/{index}.jpg: no image")
        return self.pixels[index]

    def name_of(self, index):
        return f"{index}.jpg"


class Counting(nn.Module):
    """Counts the images it sees and, like a machine that goes away, stops at ``limit`` of them."""

    def __init__(self, limit: int = 10**9):
        super().__init__()
        self.network = small_backbone()
        self.seen = 0
        self.limit = limit

    def forward(self, x):
        self.seen += len(x)
        if self.seen > self.limit:
            raise KeyboardInterrupt
        return self.network(x)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(feature_store, "PART", 4)


def store_of(
    folder, images=10, precision="fp32", flip=True, fingerprint="f" * 64, checkpoint="c" * 64
):
    return open_store(folder, checkpoint, "ijb-IJBX", fingerprint, images, precision, flip)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_data_set_equals_a_plain_loop(workers, batch_size):
    files = Files(9)
    for result, flip in zip(
        embed(small_backbone(), files, batch_size, num_workers=workers),
        plain_loop(small_backbone(), files.pixels),
        strict=True,
    ):
        torch.testing.assert_close(result, flip)


def test_without_mirror_images_the_network_sees_each_image_once():
    files, network = Files(5), Counting()
    plain, mirrored = embed(network, files, 2, flip=False)
    assert mirrored is None and network.seen == 5 and not plain.is_inference()
    torch.testing.assert_close(plain, plain_loop(small_backbone(), files.pixels)[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_an_error_with_its_name(workers):
    with pytest.raises(InputError) as caught:
        embed(small_backbone(), Files(9, damaged=[6]), 2, num_workers=workers)
    assert str(caught.value) == "loose_crop/6.jpg: no image"


def test_a_feature_that_is_not_finite_is_an_error_with_the_images_name():
    network = small_backbone()
    with torch.no_grad():
        network[-1].weight[2, 3] = torch.nan
    with pytest.raises(InputError, match=r"first image index 0 \(0.jpg\)"):
        embed(network, Files(3), 2)


def test_stored_features_are_not_computed_again(tmp_path, small_parts):
    files, expected = Files(10), plain_loop(small_backbone(), Files(10).pixels)
    for seen in (20, 0):
        network = Counting()
        for result, flip in zip(
            embed(network, files, 3, store=store_of(tmp_path)), expected, strict=True
        ):
            torch.testing.assert_close(result, flip)
        assert network.seen == seen
    about = json.loads((store_of(tmp_path).path / "features.json").read_text())
    assert (
        about["images"] == 10
        and about["checkpoint_sha256"] == "c" * 64
        and about["set"] == "ijb-IJBX"
    )


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path, small_parts):
    with pytest.raises(KeyboardInterrupt):
        embed(Counting(limit=14), Files(10), 2, store=store_of(tmp_path))
    network = Counting()
    torch.testing.assert_close(
        embed(network, Files(10), 2, store=store_of(tmp_path)),
        embed(small_backbone(), Files(10), 2),
    )
    # of 20: the first part of 4 images and their mirror images was complete
    assert network.seen == 12


@pytest.mark.parametrize(
    "change",
    [
        dict(precision="bf16"),
        dict(flip=False),
        dict(fingerprint="e" * 64),
        dict(checkpoint="d" * 64),
    ],
)
def test_other_conditions_have_other_features(tmp_path, change):
    assert store_of(tmp_path).path != store_of(tmp_path, **change).path


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "no readable file of features"),
        (
            lambda file: np.save(file, np.zeros((4, 5), np.float32)),
            r"shape \(4, 5\), expected \(4, "
            r"12\): remove the file",
        ),
        (lambda file: np.save(file, np.zeros((4, 12))), "holds float64"),
        (
            lambda file: np.save(file, np.array([{}], object), allow_pickle=True),
            "no readable file of features",
        ),
    ],
)
def test_damaged_features_are_named(tmp_path, small_parts, damage, message):
    store = store_of(tmp_path)
    embed(small_backbone(), Files(10), 3, store=store)
    damage(store.path / "00000004.npy")
    with pytest.raises(InputError, match=f"00000004.npy.*{message}"):
        embed(small_backbone(), Files(10), 3, store=store)


def test_one_image_at_a_time():
    """A network in training mode could not: BatchNorm needs two."""
    backbone = build_backbone("mobilefacenet", 16).train()
    images = np.random.default_rng(0).integers(256, size=(3, 112, 112, 3), dtype=np.uint8)
    alone, _ = embed(backbone, images, 1, flip=False)
    together, _ = embed(backbone, images, 3, flip=False)
    # in another order of addition
    atol = 2 * rounding.network(50) * float(together.abs().max())
    torch.testing.assert_close(alone, together, rtol=0, atol=atol)
    assert backbone.training


def on_rank(folder: str) -> None:
    torch.set_num_threads(1)
    feature_store.PART = 2
    distributed.init("cpu")
    rank, world = distributed.rank(), distributed.world_size()
    results = {
        "plain": embed(small_backbone(), Files(11), 2),
        "stored": embed(small_backbone(), Files(11), 2, store=store_of(folder, 11)),
        "again": embed(Counting(limit=0), Files(11), 2, store=store_of(folder, 11)),
    }
    # on all ranks, though only one reads it
    with pytest.raises(InputError, match="loose_crop/9.jpg: no image"):
        embed(small_backbone(), Files(11, damaged=[9]), 2)
    with pytest.raises(InputError, match="only the first"):
        distributed.main_computes(fail_on_first)
    # ranks with different numbers of images: no collective runs
    with distributed.alone():
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        results["alone"] = embed(small_backbone(), Files(3 + rank), 2)
    assert distributed.world_size() == world
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    distributed.shutdown()


def fail_on_first():
    assert distributed.is_main()
    raise InputError("only the first knows this")


@pytest.mark.processes
def test_ranks_share_the_work_and_the_errors(tmp_path):
    run(Path(__file__), tmp_path, ranks=3)
    expected = embed(small_backbone(), Files(11), 2)
    for rank in range(3):
        actual = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name in ("plain", "stored", "again"):
            torch.testing.assert_close(actual[name], expected)
        torch.testing.assert_close(actual["alone"], embed(small_backbone(), Files(3 + rank), 2))


if __name__ == "__main__":
    on_rank(sys.argv[1])
