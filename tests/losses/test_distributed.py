"""The sharded header on real torchrun processes: several ranks equal one for the same features,
whatever the method and the loss, also where some of them hold no class."""

import sys
import threading
from pathlib import Path

import pytest

# also started by torchrun, below
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tests.rounding import U, feature_gradient, logit
from utils import distributed

pytestmark = pytest.mark.processes

CASES = [
    (method, loss)
    for method in ("standalone", "AMLDistill", "AdaDistill")
    for loss in ("MLLoss", "CosFace", "ArcFace", "AdaFace")
]
STEPS, BATCH, SIZE = 6, 12, 16
# {ranks: numbers of classes}: shares of 12 and 11; 2, 2, 0; 1, 1, 0. One rank is what all are
# compared with.
CLASSES = {1: (23, 4, 2), 2: (23,), 3: (4, 2)}
LR = 0.1
# of the learned ones, which are drawn from N(0, 1): the shortest of 23 * 6
CENTER_LENGTH = 1.5


def train_header(method, loss, classes, out, sample_rate=1.0, **options):
    """A few steps on fixed features; rank r takes its contiguous part of each batch. Saves what
    rank 0 sees.

    Learned centres are drawn anew for every step: in a few steps SGD would make a rounding error
    many times as large, and the comparison would say nothing. Their momentum stays.
    With sample_rate < 1 learned centres move as the engine moves them, with two forward passes to
    some of the steps, else by PyTorch's optimizer.
    """
    from utils.losses import build_header

    torch.manual_seed(0)
    geometry = method != "standalone" and loss != "MLLoss"
    header = build_header(
        method,
        loss,
        SIZE,
        classes,
        use_geom_margin=geometry,
        geom_margin_warmup_epoch=1,
        sample_rate=sample_rate,
        **options,
    )
    deferred = header.centers.learned and sample_rate < 1
    header.centers.defer = deferred
    start = header.state_dict()["kernel"]
    optimizer = (
        torch.optim.SGD(header.parameters(), lr=LR, momentum=0.9)
        if header.centers.learned
        else None
    )
    rank, world = distributed.rank(), distributed.world_size()
    generator = torch.Generator().manual_seed(1)
    seen = []
    for step in range(STEPS):
        features, teacher = torch.randn(2, BATCH, SIZE, generator=generator)
        # several images of one class, over both ranks
        labels = torch.randint(0, min(classes, 8), (BATCH,), generator=generator)
        if header.centers.learned and not header.centers.pending:
            header.load_kernel(torch.randn(SIZE, classes, generator=generator))
        of_rank = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        part = (3 * features[of_rank]).clone().requires_grad_(True)
        value, stats = header(part, labels[of_rank], teacher[of_rank], step / 3)
        value.backward()
        if deferred and step % 3 != 1:
            header.centers.step(lr=LR, momentum=0.9, weight_decay=5e-4)
        elif optimizer and not deferred:
            optimizer.step()
            optimizer.zero_grad()
        seen.append(
            dict(
                loss=value.detach(),
                gradient=distributed.all_gather(part.grad / world),
                features=3 * features,
                labels=labels,
                kernel=header.state_dict()["kernel"],
                **stats,
            )
        )
    state = header.state_dict()
    if deferred:
        state["momentum"] = header.centers.whole(header.centers.momentum)
    assert all(
        torch.equal(state["kernel"], other)
        for other in distributed.all_gather_object(state["kernel"])
    ), "centres differ between ranks"
    assert len(set(distributed.all_gather_object(value.item()))) == 1, (
        "the loss differs between ranks"
    )
    header.load_state_dict(
        {key: tensor.clone() for key, tensor in state.items() if key != "momentum"}
    )
    assert torch.equal(header.state_dict()["kernel"], state["kernel"])
    if rank == 0:
        torch.save(dict(start=start, state=state, seen=seen), out)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    from tests.commands import run

    folder = tmp_path_factory.mktemp("header")
    for ranks in CLASSES:
        run(Path(__file__), folder / str(ranks), ranks=ranks)
    return folder


@pytest.mark.parametrize("ranks, classes", [(2, 23), (3, 4), (3, 2)])
@pytest.mark.parametrize("method, loss", CASES)
def test_ranks_equal_one(method, loss, ranks, classes, results):
    one, several = load_and_compare(results, ranks, f"{method}-{loss}-{classes}.pt")
    if method == "AdaDistill":
        assert torch.equal(one["state"]["kernel"], several["state"]["kernel"])
    assert torch.equal(one["state"]["kernel"], one["start"]) == (method == "AMLDistill")


@pytest.mark.parametrize("method", ["standalone", "AMLDistill", "AdaDistill"])
@pytest.mark.parametrize("classes", [4, 2])
def test_samples_of_few_classes_are_all_of_them(method, classes, results):
    """A batch has more images than there are classes, so that all take part, on ranks without any
    too.
    """
    load_and_compare(results, 3, f"sampled-{method}-{classes}.pt")


@pytest.mark.parametrize("header_weight", [0.5, 0.0])
@pytest.mark.parametrize("method", ["AMLDistill", "AdaDistill"])
def test_ranks_equal_one_with_a_feature_weight(method, header_weight, results):
    """Its gradient is less off than what load_and_compare allows the header's: half of it, with
    other factors of the cosines' rounding, 32 against 2 * 64 * 64 / 2.
    """
    one, _ = load_and_compare(results, 2, f"feature-{method}-{header_weight}.pt")
    assert all("feature" in seen for seen in one["seen"])
    if not header_weight:
        assert torch.equal(one["state"]["kernel"], one["start"])


def load_and_compare(results, ranks, file):
    """What one and several ranks have seen: products with all centres at once are those with each
    rank's, added in another order; all else is the same to a few units of rounding.

    Each of the two results is off by what rounding.py says; the centres' gradient by as much as
    the features', as far as features are longer than centres; velocities add up over the steps.
    """
    one, several = (
        torch.load(results / str(number) / file, weights_only=True) for number in (1, ranks)
    )
    assert torch.equal(one["start"], several["start"])
    learned = "standalone" in file
    moved = 0
    for first, second in zip(one["seen"], several["seen"], strict=True):
        assert first.keys() == second.keys()
        gradient = 2 * feature_gradient(first["features"])
        moved += LR * gradient * first["features"].norm(dim=1).max() / CENTER_LENGTH
        bounds = dict(
            loss=2 * 2 * logit(SIZE),
            gradient=gradient,
            kernel=moved if learned else 0,
            features=0,
            labels=0,
        )
        for name in first:
            assert (first[name] - second[name]).float().norm() <= bounds.get(name, 16 * U), name
    assert one["state"].keys() == several["state"].keys()
    # AdaFace's statistics, of the same norms
    for name in one["state"].keys() - {"kernel", "momentum"}:
        assert (one["state"][name] - several["state"][name]).abs() <= 16 * U * one["state"][
            name
        ].abs(), name
    if "momentum" in one["state"]:
        assert (one["state"]["momentum"] - several["state"]["momentum"]).norm() <= moved / LR
    return one, several


def test_a_share_without_positives_still_takes_part(results):
    """8 classes on 2 ranks, of which 10 % are sampled: one rank holds no class of the batch."""
    assert (results / "2" / "sampled.txt").read_text() == "finite"


# what a training run does at its end, and one rank that fails instead
ENDING = """
import atexit, pathlib, sys, tempfile
sys.path.insert(0, {root!r})
import torch
from torch.nn.parallel import DistributedDataParallel
from utils import distributed
from utils.errors import InputError, run

def main():
    distributed.init("cpu")
    rank, folder = distributed.rank(), pathlib.Path({folder!r})
    temporary = tempfile.TemporaryDirectory(dir=folder)
    atexit.register((folder / f"rank {{rank}}").touch)
    network = DistributedDataParallel(torch.nn.Linear(64, 64), gradient_as_bucket_view=True)
    for _ in range(4):
        network(torch.randn(8, 64)).square().mean().backward()
        distributed.barrier()
    # torchrun's -u has switched off the buffer of the stream
    sys.stdout = open(1, "w", closefd=False)
    print(f"rank {{rank}} has finished")
    if {fails} and rank == 1:
        raise InputError("rank 1 fails at the end")
    globals().update(network=network, temporary=temporary)
    distributed.shutdown()

run(main)
"""


def write_ending(folder, fails):
    script = folder / "end.py"
    script.write_text(
        ENDING.format(
            root=str(Path(__file__).resolve().parents[2]), folder=str(folder), fails=fails
        )
    )
    return script


def test_a_finished_run_exits_with_0(tmp_path):
    """While DistributedDataParallel is alive, which PyTorch aborts on now and then; nothing that
    was written or registered is lost."""
    from tests.commands import run

    text = run(write_ending(tmp_path, fails=False), ranks=3)
    assert all(f"rank {rank} has finished" in text for rank in range(3)), text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "end.py",
        "rank 0",
        "rank 1",
        "rank 2",
    ]


def test_a_failed_run_keeps_its_exit_status(tmp_path):
    from tests.commands import run

    assert "error: rank 1 fails at the end" in run(
        write_ending(tmp_path, fails=True), ranks=2, expect=1
    )


if __name__ == "__main__":
    from utils.losses import build_header

    distributed.init("cpu")
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    for classes in CLASSES[distributed.world_size()]:
        for method, loss in CASES:
            train_header(method, loss, classes, folder / f"{method}-{loss}-{classes}.pt")
        for method in ("standalone", "AMLDistill", "AdaDistill"):
            train_header(
                method,
                "AdaFace",
                classes,
                folder / f"sampled-{method}-{classes}.pt",
                sample_rate=0.5,
            )
    if distributed.world_size() < 3:
        for method in ("AMLDistill", "AdaDistill"):
            for weight in (0.5, 0.0):
                out = folder / f"feature-{method}-{weight}.pt"
                weights = dict(header_weight=weight, feature_weight=32.0)
                train_header(method, "AdaFace", 23, out, **weights)
    loss, _ = build_header("standalone", "ArcFace", SIZE, 8, sample_rate=0.1)(
        torch.randn(4, SIZE), torch.zeros(4, dtype=torch.int64)
    )
    if distributed.rank() == 0:
        (folder / "sampled.txt").write_text("finite" if torch.isfinite(loss) else "not finite")
    distributed.shutdown()


def test_a_collective_is_over_when_no_other_thread_holds_its_tensors():
    """As gloo's thread does, a moment longer than the collective takes."""
    tensor, ended, let_go = torch.zeros(3), threading.Event(), []

    def hold(held: list) -> None:
        ended.wait()
        let_go.append(True)
        held.clear()

    alone = sys.getrefcount(tensor)
    with distributed.settled(tensor):
        thread = threading.Thread(target=hold, args=([tensor],))
        thread.start()
        assert sys.getrefcount(tensor) > alone
        ended.set()
    assert let_go and sys.getrefcount(tensor) == alone
    thread.join()


def test_nobody_waits_for_tensors_that_nobody_holds(monkeypatch):
    def fail(_seconds):
        raise AssertionError("it waits")

    monkeypatch.setattr(distributed.time, "sleep", fail)
    with distributed.settled(torch.zeros(3), torch.zeros(4)):
        pass
