"""train/teacher_report.py: closeness to classes against plain loops, the choice of a sample, and
the colour warning on a real command.
"""

import numpy as np
import pytest
import torch

from backbones import build_backbone
from data.make_synthetic import write_pair_set, write_training_set
from data.synth.render_pool import open_studio
from tests.commands import ROOT, run
from train import teacher_report
from train.teacher_report import Closeness, choose_sample, closeness, suspicions
from utils.errors import InputError

REPORT = ROOT / "train" / "teacher_report.py"


def test_closeness_equals_loops():
    random = np.random.default_rng(0)
    features, labels = (
        random.standard_normal((30, 5)).astype(np.float32),
        random.integers(0, 6, 30) * 7,
    )
    labels[:12] = (
        np.repeat(np.unique(labels), 2)[:12] if len(np.unique(labels)) == 6 else labels[:12]
    )
    measured = closeness(features, labels)
    unit = features / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    for i in range(30):
        own = unit[(labels == labels[i]) & (np.arange(30) != i)].mean(axis=0)
        others = [
            unit[labels == other].mean(axis=0) for other in np.unique(labels) if other != labels[i]
        ]
        assert measured.own[i] == pytest.approx(unit[i] @ own / np.linalg.norm(own))
        assert measured.other[i] == pytest.approx(
            max(unit[i] @ mean / np.linalg.norm(mean) for mean in others)
        )


class Labels:
    """A set of which only the labels are known."""

    root_dir = "somewhere"

    def __init__(self, labels):
        self.values = np.asarray(labels, np.int64)
        self.read = 0

    def __len__(self):
        return len(self.values)

    def labels(self, indices):
        self.read += len(indices)
        return self.values[np.asarray(indices)]


def test_a_grouped_set_is_sampled_without_reading_all_labels():
    grouped = Labels(np.repeat(np.arange(5000), 20))
    chosen = choose_sample(grouped, 1000, 0)
    assert (
        900 <= len(chosen) <= 1000
        and grouped.read < 5000
        and (np.unique(grouped.values[chosen], return_counts=True)[1] >= 2).all()
    )


def test_of_a_shuffled_set_whole_classes_are_taken():
    shuffled = Labels(np.random.default_rng(1).permutation(np.repeat(np.arange(5000), 10)))
    chosen = choose_sample(shuffled, 1000, 0)
    _, counts = np.unique(shuffled.values[chosen], return_counts=True)
    assert len(chosen) == 1000 and (counts == 10).all() and (np.diff(chosen) > 0).all()
    assert not np.array_equal(chosen, choose_sample(shuffled, 1000, 1))


@pytest.mark.parametrize("labels", [np.arange(300), np.zeros(300), np.full(300, -1)])
def test_a_set_without_two_classes_of_two_images_is_refused(labels):
    with pytest.raises(InputError, match="no two classes with 2 images among 300"):
        choose_sample(Labels(labels), 100, 0)


def test_suspicions():
    good = Closeness(np.full(100, 0.7), np.full(100, 0.3))
    worse = Closeness(np.full(100, 0.6), np.full(100, 0.3))
    none = Closeness(np.full(100, 0.9), np.full(100, 0.89))
    noise = np.random.default_rng(0).standard_normal(100)
    assert suspicions(good, worse) == []
    assert ["red and blue exchanged" in line for line in suspicions(worse, good)] == [True]
    assert ["hardly nearer" in line for line in suspicions(none, none)] == [True]
    assert suspicions(good, Closeness(good.own + 0.006 + noise, good.other)) == [], "chance"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with open_studio(1, 0, 0.0) as studio:
        write_training_set(folder, studio, 8, 6)
        write_pair_set(folder, studio, "frontal", 20)
    return folder


def figures(line: str) -> list[float]:
    """The three that stand at its end."""
    return [float(word) for word in line.split()[-3:]]


@pytest.mark.processes
def test_the_command_warns_of_wrong_colours(data, tmp_path, monkeypatch):
    """A network that tells people apart by how red they are next to blue: what it sees decides the
    colour order.
    """
    torch.manual_seed(0)
    torch.save(build_backbone("mobilefacenet", 32).state_dict(), tmp_path / "teacher.pth")
    arguments = [
        "dataset=synthetic",
        f"rec={data}",
        f"val_rec={data}",
        "teacher=mobilefacenet",
        "device=cpu",
        "precision=fp32",
        f"pretrained_teacher_path={tmp_path / 'teacher.pth'}",
        "--sample",
        40,
    ]
    output = run(REPORT, *arguments)
    assert (
        "frontal" in output
        and "pose              skipped: no " in output
        and ("40 training images of 8 classes") in output
    )
    assert "RGB, as set" in output and "exchanged" in output
    bgr = run(REPORT, *arguments, "color_space=BGR", ranks=2)
    own = {
        line[:16].strip(): figures(line)
        for text in (output, bgr)
        for line in text.splitlines()
        if line.startswith(("RGB, as set", "BGR, as set"))
    }
    exchanged = [
        figures(line)
        for text in (output, bgr)
        for line in text.splitlines()
        if line.startswith("exchanged")
    ]
    # two cosines of three digits and a percentage of 40 images, of other batches on two ranks: the
    # last digit may be another, or one image
    for one, other in ((own["RGB, as set"], exchanged[1]), (own["BGR, as set"], exchanged[0])):
        assert (np.abs(np.subtract(one, other)) <= [0.00101, 0.00101, 2.6]).all()
    assert "pose.bin not found" in run(REPORT, *arguments, "val_targets=frontal,pose", expect=1)
    output = run(REPORT, *arguments[:-3], "pretrained_teacher_path=/nowhere.pth", expect=1)
    assert "error: teacher: no file at /nowhere.pth" in output and "Traceback" not in output


def test_report_on_a_teacher_that_gets_the_wrong_colours(monkeypatch, capsys):
    """Features are the mean of each channel, but for blue, which is the same for all: with the
    channels exchanged nothing of the person is left.
    """
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 5)
    pixels = np.full((30, 8, 8, 3), 128, np.uint8)
    pixels[..., 2] = (40 * labels + random.integers(0, 4, 30))[:, None, None]

    class Red(torch.nn.Module):
        name, color_space = "red", "RGB"

        def forward(self, x):
            red = x[:, 0].mean(dim=(1, 2))
            return torch.stack([red.cos(), red.sin()], 1)

    from easydict import EasyDict

    teacher_report.report_sample(
        Red(),
        pixels,
        labels,
        EasyDict(val_batch_size=8),
        dict(device="cpu", precision="fp32", channels_last=False),
    )
    printed = capsys.readouterr().out
    assert "WARNING: the classes lie" in printed and "set color_space to the other order" in printed
    teacher_report.report_sample(
        Red(),
        pixels[..., ::-1].copy(),
        labels,
        EasyDict(val_batch_size=8),
        dict(device="cpu", precision="fp32", channels_last=False),
    )
    assert "WARNING: the classes lie" not in capsys.readouterr().out
