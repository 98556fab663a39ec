"""The sharded header on real torchrun processes: 2 ranks equal 1 rank for the same features, whatever the method and the loss."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # also started by torchrun, below

import torch

from tests.rounding import U, feature_gradient, logit

CASES = [(method, loss) for method in ("standalone", "AMLDistill", "AdaDistill") for loss in ("MLLoss", "CosFace", "ArcFace", "AdaFace")]
STEPS, BATCH, SIZE, CLASSES = 6, 12, 16, 23                        # 23 classes: 12 on one rank, 11 on the other
LR = 0.1
# of the learned ones, which are drawn from N(0, 1): the shortest of 23 * 6
CENTER_LENGTH = 1.5


def train_header(method, loss, out):
    """A few steps on fixed features; rank r takes its contiguous part of each batch. Saves what rank 0 sees.

    Learned centres are drawn anew for every step: in a few steps SGD would make a rounding error
    many times as large, and the comparison would say nothing. Their momentum stays.
    """
    from utils import distributed
    from utils.losses import build_header
    torch.manual_seed(0)
    geometry = method != "standalone" and loss != "MLLoss"
    header = build_header(method, loss, SIZE, CLASSES, use_geom_margin=geometry, geom_margin_warmup_epoch=1)
    start = header.state_dict()["kernel"]
    optimizer = torch.optim.SGD(header.parameters(), lr=LR, momentum=0.9) if list(header.parameters()) else None
    rank, world = distributed.rank(), distributed.world_size()
    generator = torch.Generator().manual_seed(1)
    seen = []
    for step in range(STEPS):
        features, teacher = torch.randn(2, BATCH, SIZE, generator=generator)
        labels = torch.randint(0, 8, (BATCH,), generator=generator)         # several images of one class, over both ranks
        if optimizer:
            header.load_kernel(torch.randn(SIZE, CLASSES, generator=generator))
        mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        part = (3 * features[mine]).clone().requires_grad_(True)
        value, stats = header(part, labels[mine], teacher[mine], step / 3)
        value.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        seen.append(dict(loss=value.detach(), gradient=distributed.all_gather(part.grad / world), features=3 * features, labels=labels,
                         kernel=header.state_dict()["kernel"], **stats))
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
    """The products with 23 centres at once are those with 12 and with 11, added in another order; all else is the same to a few units of rounding.

    Each of the two results is off by what rounding.py says; the centres' gradient by as much as
    the features', as far as features are longer than centres; velocities add up over the steps.
    """
    one, two = (torch.load(results / str(ranks) / f"{method}-{loss}.pt", weights_only=True) for ranks in (1, 2))
    assert torch.equal(one["start"], two["start"])
    moved = 0
    for first, second in zip(one["seen"], two["seen"]):
        assert first.keys() == second.keys()
        gradient = 2 * feature_gradient(first["features"])
        moved += LR * gradient * first["features"].norm(dim=1).max() / CENTER_LENGTH
        bounds = dict(loss=2 * 2 * logit(SIZE), gradient=gradient, kernel=moved if method == "standalone" else 0, features=0, labels=0)
        for name in first:
            assert (first[name] - second[name]).float().norm() <= bounds.get(name, 16 * U), name
    assert one["state"].keys() == two["state"].keys()
    for name in one["state"].keys() - {"kernel"}:       # AdaFace's statistics, of the same norms
        assert (one["state"][name] - two["state"][name]).abs() <= 16 * U * one["state"][name].abs(), name
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
