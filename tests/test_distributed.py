"""The sharded header on real torchrun processes: 2 ranks equal 1 rank for the same features, whatever the method and the loss."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # also started by torchrun, below

import torch

CASES = [(method, loss) for method in ("standalone", "AMLDistill", "AdaDistill") for loss in ("MLLoss", "CosFace", "ArcFace", "AdaFace")]
STEPS, BATCH, SIZE, CLASSES = 6, 12, 16, 23                        # 23 classes: 11 on one rank, 12 on the other


def train_header(method, loss, out):
    """A few steps on fixed features; rank r takes its contiguous part of each batch. Saves what rank 0 sees."""
    from utils import distributed
    from utils.losses import build_header
    torch.manual_seed(0)
    geometry = method != "standalone" and loss != "MLLoss"
    header = build_header(method, loss, SIZE, CLASSES, use_geom_margin=geometry, geom_margin_warmup_epoch=1)
    start = header.state_dict()["kernel"]
    optimizer = torch.optim.SGD(header.parameters(), lr=0.1, momentum=0.9) if list(header.parameters()) else None
    rank, world = distributed.rank(), distributed.world_size()
    generator = torch.Generator().manual_seed(1)
    seen = []
    for step in range(STEPS):
        features, teacher = torch.randn(2, BATCH, SIZE, generator=generator)
        labels = torch.randint(0, 8, (BATCH,), generator=generator)         # several images of one class, over both ranks
        mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        part = (3 * features[mine]).clone().requires_grad_(True)
        value, stats = header(part, labels[mine], teacher[mine], step / 3)
        value.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        seen.append(dict(loss=value.detach(), gradient=distributed.all_gather(part.grad / world), **stats))
    state = header.state_dict()
    assert all(torch.equal(state["kernel"], other) for other in distributed.all_gather_object(state["kernel"])), "centres differ between ranks"
    assert len(set(distributed.all_gather_object(value.item()))) == 1, "the loss differs between ranks"
    header.load_state_dict({key: tensor.clone() for key, tensor in state.items()})
    assert torch.equal(header.state_dict()["kernel"], state["kernel"])
    if rank == 0:
        torch.save(dict(start=start, state=state, seen=seen), out)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    from tests.commands import run
    folder = tmp_path_factory.mktemp("header")
    for ranks in (1, 2):
        run(Path(__file__), folder / str(ranks), ranks=ranks)
    return folder


@pytest.mark.parametrize("method, loss", CASES)
def test_two_ranks_equal_one(method, loss, results):
    one, two = (torch.load(results / str(ranks) / f"{method}-{loss}.pt", weights_only=True) for ranks in (1, 2))
    assert torch.equal(one["start"], two["start"])
    for first, second in zip(one["seen"], two["seen"]):
        assert first.keys() == second.keys()
        for name in first:
            assert (first[name] - second[name]).norm() <= 1e-5 * first[name].norm(), name
    for name in one["state"]:
        assert (one["state"][name] - two["state"][name]).norm() <= 1e-5 * one["state"][name].norm(), name
    if method == "AdaDistill":
        assert torch.equal(one["state"]["kernel"], two["state"]["kernel"])
    assert torch.equal(one["state"]["kernel"], one["start"]) == (method == "AMLDistill")


def test_a_share_without_positives_still_takes_part(results):
    """8 classes on 2 ranks, of which 10 % are sampled: one rank holds no class of the batch."""
    assert (results / "2" / "sampled.txt").read_text() == "finite"


def test_more_ranks_than_classes_is_refused(results):
    assert "cannot be shared out over 2 ranks" in (results / "2" / "refused.txt").read_text()


if __name__ == "__main__":
    from utils import distributed
    from utils.errors import InputError
    from utils.losses import build_header
    distributed.init("cpu")
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    for method, loss in CASES:
        train_header(method, loss, folder / f"{method}-{loss}.pt")
    loss, _ = build_header("standalone", "ArcFace", SIZE, 8, sample_rate=0.1)(torch.randn(4, SIZE), torch.zeros(4, dtype=torch.int64))
    if distributed.rank() == 0:
        (folder / "sampled.txt").write_text("finite" if torch.isfinite(loss) else "not finite")
    if distributed.world_size() > 1:
        try:
            build_header("standalone", "ArcFace", SIZE, 1)
        except InputError as error:
            if distributed.rank() == 0:
                (folder / "refused.txt").write_text(str(error))
    distributed.shutdown()
