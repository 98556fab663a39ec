"""What a student learns from besides the header, and how: its features' distance to the teacher's,
a moving average of its weights, frozen epochs; all of it in runs that are interrupted.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also started by torchrun, below

from backbones import build_backbone
from tests.commands import run
from tests.rounding import U, network
from tests.runs.outputs import draw_faces, losses, same
from train.student import Average, Student

CPU = SimpleNamespace(device=torch.device("cpu"), precision="fp32")


def small_network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def test_the_average_of_the_weights_against_float64():
    """Two multiplications and an addition a step, of numbers below 1: 3 U each."""
    images = torch.randn(4, 3, 6, 6)
    backbone = small_network(0)
    backbone(images)
    average = Average(backbone, 0.8)
    expected = {key: value.double() for key, value in weights_of(backbone).items()}
    for step in range(5):
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.uniform_(-1, 1)
        backbone(images + step)
        average.update()
        for key, parameter in backbone.named_parameters():
            expected[key] = 0.8 * expected[key] + 0.2 * parameter.detach().double()
    for key, parameter in average.network.named_parameters():
        assert (parameter - expected[key]).abs().max() < 5 * 3 * U and not parameter.requires_grad
    for own, buffer in zip(average.network.buffers(), backbone.buffers(), strict=True):
        assert torch.equal(own, buffer)
    average.restart()
    assert all(
        torch.equal(value, backbone.state_dict()[key])
        for key, value in average.state_dict().items()
    )


def test_without_a_decay_the_average_is_the_network():
    backbone = small_network(0)
    average = Average(backbone, 0.0)
    average.update()
    assert average.network is backbone and average.state_dict() is None


def test_a_frozen_student_stays_as_it_is_until_it_learns_again():
    images = torch.randn(4, 3, 6, 6)
    backbone = small_network(0)
    backbone(images)
    before = weights_of(backbone)
    student = Student(backbone, CPU, backbone)
    student.freeze(True)
    features = student(images)
    features.square().mean().backward()
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    with torch.no_grad():
        assert torch.equal(features, backbone.eval()(images))
    student.freeze(False)
    student(images).square().mean().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    assert not torch.equal(backbone[1].running_mean, before["1.running_mean"])


# --- runs: 4 steps of 2 x 4 images an epoch, of which the first is frozen

PEOPLE, STEPS = 4, 4
COMMON = [
    "dataset=synthetic",
    "embedding_size=16",
    "accumulate=2",
    "num_epoch=2",
    "num_workers=0",
    "log_every=1",
    "state_every=2",
    "lr=0.5",
    "precision=fp32",
    "device=cpu",
    "val_batch_size=16",
    "val_targets=[]",
    "teacher=mobilefacenet",
]
RUNS = {
    "standalone": [
        "val_targets=frontal",
        "freeze=1",
        "backbone_lr=0.5",
        "ema=0.9",
        "schedule=poly",
        "schedule_power=2",
    ],
    "AdaDistill": [
        "freeze=1",
        "ema=0.5",
        "loss=AdaFace",
        "feature_weight=16",
        "schedule=cosine",
        "warmup_epoch=1",
        "pretrained_teacher_path=teacher.pth",
    ],
    "AMLDistill": [
        "feature_weight=16",
        "header_weight=0.5",
        "teacher_embeddings=cache",
        "pretrained_teacher_header_path=header.pth",
    ],
    "features": ["feature_weight=16", "header_weight=0", "teacher_embeddings=cache"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{ranks: folder} of the runs of RUNS, "straight" and "broken" by a crash in the frozen epoch
    and one later.
    """
    folders = {}
    for ranks, names in ((1, "standalone,AdaDistill,features"), (2, "AdaDistill,AMLDistill")):
        folder = folders[ranks] = tmp_path_factory.mktemp("runs")
        draw_faces(folder / "faces", PEOPLE, pair_sets=["frontal"])
        torch.manual_seed(0)
        for name in ("teacher", "start"):
            torch.save(build_backbone("mobilefacenet", 16).state_dict(), folder / f"{name}.pth")
        torch.save({"kernel": torch.randn(16, PEOPLE)}, folder / "header.pth")
        run(Path(__file__), folder, names, ranks=ranks)
    return folders


@pytest.mark.processes
@pytest.mark.parametrize(
    "name, ranks",
    [("standalone", 1), ("AdaDistill", 1), ("features", 1), ("AdaDistill", 2), ("AMLDistill", 2)],
)
def test_interrupted_run_equals_uninterrupted(name, ranks, runs):
    straight, broken = (runs[ranks] / f"{name}_{kind}" for kind in ("straight", "broken"))
    assert same(straight, broken, 2 * STEPS)
    assert losses(straight) == losses(broken) and len(losses(straight)) == 2 * STEPS


@pytest.mark.processes
def test_only_the_centers_learn_in_frozen_epochs(runs):
    for name, ranks in (("standalone", 1), ("AdaDistill", 2)):
        folder = runs[ranks] / f"{name}_straight"
        start = torch.load(runs[ranks] / "start.pth", weights_only=True)
        frozen, learned = (read(folder, f"{step}backbone.pth") for step in (STEPS, 2 * STEPS))
        assert all(torch.equal(value, frozen[key]) for key, value in start.items())
        assert not any(
            torch.equal(value, learned[key]) for key, value in start.items() if "conv.weight" in key
        )
        headers = [read(folder, f"{step}header.pth")["kernel"] for step in (STEPS, 2 * STEPS)]
        assert not torch.equal(*headers)


@pytest.mark.processes
def test_ranks_move_the_centers_alike_in_frozen_epochs(runs):
    """BatchNorm takes no part, so that features differ by rounding; alpha, a product of two
    cosines, by as much, in each of 8 forward passes.
    """
    one, two = (
        read(runs[ranks] / "AdaDistill_straight", f"{STEPS}header.pth")["kernel"]
        for ranks in (1, 2)
    )
    assert (one - two).abs().max() < 2 * STEPS * 2 * 2 * network(50)


@pytest.mark.processes
def test_the_average_is_what_is_measured_and_kept(runs):
    folder = runs[1] / "standalone_straight"
    best = read(folder, "best_backbone.pth")
    averages = [read(folder, f"{epoch * STEPS}ema.pth") for epoch in (1, 2)]
    assert any(
        all(torch.equal(value, average[key]) for key, value in best.items()) for average in averages
    )
    plain = read(folder, f"{2 * STEPS}backbone.pth")
    assert not torch.equal(plain["conv1.conv.weight"], averages[1]["conv1.conv.weight"])


@pytest.mark.processes
def test_a_header_of_weight_0_is_saved_as_it_started(runs):
    folder = runs[1] / "features_straight"
    first, last = (read(folder, f"{epoch * STEPS}header.pth")["kernel"] for epoch in (1, 2))
    assert torch.equal(first, last)


def read(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)


class Crash(Exception):
    """The end of a run between two steps, with nothing saved."""


def train_all(names: list[str]) -> None:
    """What the fixture starts: all runs one after the other in one process, or in each of two."""
    from train import cache_teacher, train_AdaDistill, train_AMLDistill, train_standalone
    from train.engine import Engine
    from utils import distributed

    scripts = dict(
        standalone=train_standalone,
        AdaDistill=train_AdaDistill,
        AMLDistill=train_AMLDistill,
        features=train_AMLDistill,
    )
    leave, distributed.shutdown = distributed.shutdown, lambda: None
    train_step = Engine.train_step

    def start(script, *arguments, crash_at=0):
        def crashing_step(self, batches):
            if self.position.step == crash_at:
                raise Crash
            return train_step(self, batches)

        Engine.train_step = crashing_step if crash_at else train_step
        sys.argv = [script.__file__, *arguments]
        script.main()

    data = ["rec=faces", "val_rec=faces"]
    teacher = "pretrained_teacher_path=teacher.pth"
    start(cache_teacher, "teacher_embeddings=cache", teacher, *COMMON, *data)
    batch = f"batch_size={4 // distributed.world_size()}"
    for name in names:
        arguments = [*COMMON, *data, batch, "pretrained_backbone_path=start.pth", *RUNS[name]]
        start(scripts[name], *arguments, f"output={name}_straight")
        for resume, crash_at in ((False, 3), (True, 7), (True, 0)):
            command_line = [*(["--resume"] if resume else []), *arguments, f"output={name}_broken"]
            if crash_at:
                with pytest.raises(Crash):
                    start(scripts[name], *command_line, crash_at=crash_at)
            else:
                start(scripts[name], *command_line)
    leave()


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    train_all(sys.argv[2].split(","))
