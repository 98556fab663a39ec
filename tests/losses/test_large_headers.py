"""Class centres for millions of identities: gradients in factors, samples of classes, bf16, and
files that every rank writes its share of.
"""

import shutil
import sys
from pathlib import Path

import pytest

# also started by torchrun, below
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rounding import UBF16, U, logit
from utils import distributed
from utils.losses import build_header
from utils.losses.center_storage import store
from utils.precision import float64_device

SIZE, CLASSES = 8, 41
LR, MOMENTUM, DECAY = 0.3, 0.9, 5e-4


def inputs(step, batch=6):
    generator = torch.Generator().manual_seed(step)
    return 3 * torch.randn(batch, SIZE, generator=generator), torch.randint(
        CLASSES, (batch,), generator=generator
    )


def near(one, other, tolerance):
    return (one.double() - other.double()).norm() <= tolerance * other.double().norm()


@pytest.mark.parametrize("loss", ["ArcFace", "AdaFace"])
def test_deferred_steps_are_those_of_sgd(loss):
    """The same products; only the two gradients of a step are added in another order.

    A step starts from centres that are off by a few U, its logits by 64 times as much. The first
    one makes the centres a thousand times as long, so that the later ones turn them by a hundredth.
    """
    tolerance = 64 * 4 * U
    torch.manual_seed(0)
    plain, deferred = (
        build_header("standalone", loss, SIZE, CLASSES),
        build_header("standalone", loss, SIZE, CLASSES),
    )
    deferred.load_state_dict(plain.state_dict())
    deferred.centers.defer = True
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    for step in range(4):
        for part in (2 * step, 2 * step + 1):  # two forward passes to a step
            features, labels = inputs(part)
            for header in (plain, deferred):
                (8 * header(features, labels)[0]).backward()
        for parameter in plain.parameters():
            parameter.grad /= 8  # as a loss scaler does
        optimizer.step()
        optimizer.zero_grad()
        deferred.centers.step(LR, MOMENTUM, DECAY, scale=8)
        assert not deferred.centers.pending and deferred.centers.weight.grad is None
        assert near(deferred.centers.weight, plain.centers.weight, tolerance)
    assert near(
        deferred.centers.momentum,
        optimizer.state[plain.centers.weight]["momentum_buffer"],
        tolerance,
    )


def test_sampled_steps_against_a_float64_oracle():
    """Two forward passes with samples of their own: the loss over the chosen classes, their
    gradient summed, everything else untouched.
    """
    torch.manual_seed(1)
    header = build_header("standalone", "CosFace", SIZE, CLASSES, s=16, sample_rate=0.4)
    header.centers.defer = True
    weight, momentum = (
        header.centers.weight.detach().double().clone(),
        torch.zeros(CLASSES, SIZE, dtype=torch.float64),
    )
    for step in range(3):
        oracle, touched = weight.clone().requires_grad_(), torch.zeros(CLASSES, dtype=torch.bool)
        for part in (0, 1):
            features, labels = inputs(10 * step + part)
            loss, _ = header(features, labels)
            loss.backward()
            chosen = header.centers.pending[-1].chosen
            assert (
                len(chosen) == round(0.4 * CLASSES)
                and torch.isin(labels, chosen).all()
                and len(chosen.unique()) == len(chosen)
            )
            own = torch.searchsorted(chosen, labels)
            cosine = F.normalize(features.double()) @ F.normalize(oracle[chosen]).t()
            expected = F.cross_entropy(16 * (cosine - 0.35 * F.one_hot(own, len(chosen))), own)
            assert loss.item() == pytest.approx(expected.item(), abs=2 * logit(SIZE, scale=16))
            expected.backward()
            touched[chosen] = True
        with torch.no_grad():
            momentum[touched] = (
                MOMENTUM * momentum[touched] + (oracle.grad + DECAY * weight)[touched]
            )
            weight[touched] -= LR * momentum[touched]
        header.centers.step(LR, MOMENTUM, DECAY)
        # probabilities are off by twice a logit's error, and those of the step before moved the
        # centres
        assert near(header.centers.weight, weight, 4 * logit(SIZE, scale=16))
        assert near(header.centers.momentum, momentum, 4 * logit(SIZE, scale=16))
        assert not touched.all()


@pytest.mark.parametrize("method", ["standalone", "AMLDistill", "AdaDistill"])
def test_bf16_and_host_centers_give_the_loss_of_their_rounded_selves(method):
    torch.manual_seed(0)
    rounded = build_header(
        method,
        "ArcFace",
        SIZE,
        CLASSES,
        sample_rate=0.5,
        centers_dtype=torch.bfloat16,
        centers_on_host=True,
    )
    exact = build_header(method, "ArcFace", SIZE, CLASSES, sample_rate=0.5)
    exact.load_kernel(rounded.state_dict()["kernel"])
    # centers_on_host: nothing moves them
    assert rounded.to("meta").centers.weight.device.type == "cpu"
    losses, gradients = [], []
    for header in (rounded, exact):
        torch.manual_seed(2)
        features, labels = inputs(0)
        features.requires_grad_()
        loss, _ = header(features, labels, features.detach() + 1)
        loss.backward()
        losses.append(loss.item())
        gradients.append(features.grad)
    # the same numbers; only AdaDistill's centres have moved, and are rounded again, up or down at
    # random: by 2 UBF16 of each number, which turns the centre, and moves a logit, by 2 UBF16 /
    # sqrt(3)
    off = logit(SIZE) if method != "AdaDistill" else 64 * 2 * UBF16 / 3**0.5
    assert losses[0] == pytest.approx(losses[1], abs=2 * off) and near(*gradients, 2 * off)


def test_bf16_steps_below_its_resolution_count_on_average():
    torch.manual_seed(0)
    tensor = torch.ones(20_000, dtype=torch.bfloat16)
    # an eighth of the step to the next number
    store(tensor, slice(None), torch.full((20_000,), 1 + 2**-10))
    # 20,000 draws of a step of 2^-7 with a chance of 1/8: five standard deviations
    deviation = 2**-7 * (1 / 8 * 7 / 8 / 20_000) ** 0.5
    assert set(tensor.tolist()) == {
        1.0,
        1 + 2**-7,
    } and tensor.double().mean().item() == pytest.approx(1 + 2**-10, abs=5 * deviation)


class Waits(TorchDispatchMode):
    """Counts the operations for which the host would have to wait for a GPU: values read, sizes
    that depend on values.
    """

    NAMES = (
        "_local_scalar_dense",
        "nonzero",
        "unique",
        "masked_select",
        "bincount",
        "item",
        "equal",
    )

    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if any(name in function.overloadpacket.__name__ for name in self.NAMES):
            self.functions.append(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("method", ["standalone", "AMLDistill", "AdaDistill"])
def test_a_step_never_waits_for_the_gpu(method, rate, monkeypatch):
    # which looks on CPUs only
    monkeypatch.setattr("utils.losses.header.check_labels", lambda *_: None)
    header = build_header(
        method, "AdaFace", SIZE, CLASSES, sample_rate=rate, use_geom_margin=method != "standalone"
    )
    header.centers.defer = True
    features, labels = inputs(0)
    with Waits() as waits:
        header(features.requires_grad_(), labels, features.detach() + 1)[0].backward()
        if header.centers.learned:
            header.centers.step(LR, MOMENTUM, DECAY)
    assert waits.functions == []


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("method", ["standalone", "AMLDistill", "AdaDistill"])
def test_float64_is_computed_in_one_place_only(method, rate, monkeypatch):
    """Which leaves the device for it on MPS, where there is no float64."""
    assert float64_device(torch.device("mps")) == torch.device("cpu") and float64_device(
        torch.device("cuda", 1)
    ) == torch.device("cuda", 1)

    def in_float32(moved, same):
        return same.float() @ moved / same.sum(1, keepdim=True).clamp_min(1)

    monkeypatch.setattr("utils.losses.centers.mean_of_same", in_float32)
    header = build_header(
        method, "AdaFace", SIZE, CLASSES, sample_rate=rate, use_geom_margin=method != "standalone"
    )
    header.centers.defer = True
    features, labels = inputs(0)
    with DoubleNumbers() as doubles:
        header(features.requires_grad_(), labels, features.detach() + 1)[0].backward()
        if header.centers.learned:
            header.centers.step(LR, MOMENTUM, DECAY)
    assert doubles.operations == []


class DoubleNumbers(TorchDispatchMode):
    """Remembers the operations that give float64."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if any(
            isinstance(value, torch.Tensor) and value.dtype == torch.float64
            for value in (result if isinstance(result, (tuple, list)) else [result])
        ):
            self.operations.append(function.overloadpacket.__name__)
        return result


# --- shares on disk
# --------------------------------------------------


def pass_on(source: str, target: str, classes: int) -> None:
    """Read the header in ``source`` ("": draw one and move it) on this number of ranks, and write
    it to ``target``, as shares and whole.
    """
    from utils.run.header_shards import load_header, save_header

    distributed.init("cpu")
    torch.manual_seed(0)
    header = build_header("standalone", "AdaFace", SIZE, classes)
    header.centers.defer = True
    if source:
        load_header(Path(source), header, moved=True)
    else:
        features, labels = inputs(distributed.rank())
        header(features, labels % classes)[0].backward()
        header.centers.step(LR, MOMENTUM, DECAY)
    save_header(Path(target), header)
    whole = dict(header.state_dict(), momentum=header.centers.whole(header.centers.momentum))
    if distributed.is_main():
        torch.save(whole, Path(target).with_suffix(".pt"))
    distributed.barrier()
    distributed.shutdown()


@pytest.fixture(scope="module")
def passed_on(tmp_path_factory):
    """A header of 2 ranks, read and written by 1, then by 3, then by 2."""
    from tests.commands import run

    folder = tmp_path_factory.mktemp("shares")
    before = ""
    for name, ranks in (("two", 2), ("one", 1), ("three", 3), ("again", 2)):
        run(Path(__file__), before, folder / name, CLASSES, ranks=ranks)
        before = folder / name
    return folder


@pytest.mark.processes
def test_shares_survive_any_number_of_ranks(passed_on):
    first = torch.load(passed_on / "two.pt", weights_only=True)
    assert (
        first["momentum"].abs().sum() > 0
        and len(list((passed_on / "three").glob("*.safetensors"))) == 6
    )
    for name in ("one", "three", "again"):
        other = torch.load(passed_on / f"{name}.pt", weights_only=True)
        assert first.keys() == other.keys() and all(
            torch.equal(first[key], other[key]) for key in first
        )


@pytest.mark.processes
def test_shares_of_ranks_without_classes(tmp_path):
    """Four classes: 2, 2, 0 on three ranks, then all of them on one, then on three again."""
    from tests.commands import run

    before = ""
    for name, ranks in (("three", 3), ("one", 1), ("again", 3)):
        run(Path(__file__), before, tmp_path / name, 4, ranks=ranks)
        before = tmp_path / name
    first = torch.load(tmp_path / "three.pt", weights_only=True)
    assert (
        first["kernel"].shape == first["momentum"].shape == (SIZE, 4)
        and first["momentum"].abs().sum() > 0
    )
    for name in ("one", "again"):
        other = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert first.keys() == other.keys() and all(
            torch.equal(first[key], other[key]) for key in first
        )


@pytest.mark.processes
def test_export_writes_the_published_file(passed_on, tmp_path):
    from tests.commands import ROOT, run

    script = ROOT / "train" / "export_header.py"
    output = run(script, passed_on / "three", "--output", tmp_path / "header.pth")
    assert "41 classes, 8-d" in output
    exported, whole = (
        torch.load(tmp_path / "header.pth", weights_only=True),
        torch.load(passed_on / "two.pt", weights_only=True),
    )
    del whole["momentum"]
    assert exported.keys() == whole.keys() and all(
        torch.equal(exported[key], whole[key]) for key in whole
    )

    damaged = tmp_path / "1header"
    for number, (wreck, message) in enumerate(
        (
            (lambda files: files[-1].unlink(), "some ranks' files are missing"),
            (lambda files: files[0].unlink(), "missing"),
            (lambda files: files[0].write_bytes(files[0].read_bytes()[:-9]), "damaged"),
            (lambda files: [file.unlink() for file in files], "no *.safetensors"),
        )
    ):
        shutil.copytree(passed_on / "three", damaged)
        wreck(
            sorted(
                damaged.glob("*00001-of-00002*") if number < 2 else damaged.glob("*.safetensors")
            )
        )
        assert (
            message in run(script, damaged, expect=1) and not damaged.with_suffix(".pth").exists()
        )
        shutil.rmtree(damaged)
    assert "is the single file already" in run(script, tmp_path / "header.pth", expect=1)


if __name__ == "__main__":
    pass_on(sys.argv[1], sys.argv[2], int(sys.argv[3]))
