"""The learning rate of every schedule against its closed formula."""

import math

import pytest
from easydict import EasyDict

from config.config import config
from config.load import ROOT, load_config
from train.schedule import factor, learning_rate


def settings(**values):
    """A configuration of 20 epochs, milestones [8, 14]."""
    return EasyDict(dict(config, num_epoch=20, warmup_epoch=0, milestones=[8, 14]) | values)


def test_milestones_and_warm_up():
    cfg = settings(lr=0.1, batch_size=128, warmup_epoch=2)
    base = 0.1 / 512 * 128

    def rate(epoch, fraction):
        return learning_rate(cfg, epoch, fraction, processes=1)

    assert rate(0, 0.0) == pytest.approx(base * (1 / 3) ** 2)
    assert rate(1, 0.5) == pytest.approx(base * (2.5 / 3) ** 2)
    assert rate(2, 0.9) == rate(6, 0.9) == pytest.approx(base)
    assert rate(7, 0.0) == rate(12, 0.9) == pytest.approx(base * 0.1)
    assert rate(13, 0.0) == pytest.approx(base * 0.01)


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(
    "schedule, power, formula",
    [
        ("poly", 1.0, lambda done: 1 - done),
        ("poly", 2.0, lambda done: (1 - done) ** 2),
        ("cosine", 1.0, lambda done: math.cos(math.pi * done / 2) ** 2),
    ],
)
def test_decay_is_counted_in_steps_after_the_warm_up(schedule, power, formula, warmup):
    """t of T steps of 7 an epoch; half-angle form of the cosine, so rounding differs by a few ulp
    of 1.
    """
    cfg = settings(schedule=schedule, schedule_power=power, warmup_epoch=warmup)
    total = 7 * (20 - warmup)
    for t in range(total):
        epoch, step = divmod(7 * warmup + t, 7)
        assert factor(cfg, epoch, step / 7) == pytest.approx(formula(t / total), abs=1e-14)
    assert factor(cfg, warmup, 0.0) == 1.0
    for epoch in range(warmup):
        assert factor(cfg, epoch, 0.5) == pytest.approx(((epoch + 1.5) / (warmup + 1)) ** 2)


def test_the_values_of_lr_func_are_the_whole_factor():
    values = [0.25 * epoch for epoch in range(20)]
    cfg = settings(lr_func=values, warmup_epoch=3, schedule="poly")
    assert [factor(cfg, epoch, 0.5) for epoch in range(20)] == values


# {recipe: [(epoch, how much of it is done, factor)]}: the first step, around each milestone, in the
# middle and the last step, for 10 steps an epoch
STEPS = [
    *[(0, 0.0, 1), (6, 0.9, 1), (7, 0.0, 0.1), (12, 0.9, 0.1), (13, 0.0, 0.01), (18, 0.9, 0.01)],
    *[(19, 0.0, 1e-3), (23, 0.9, 1e-3), (24, 0.0, 1e-4), (25, 0.9, 1e-4)],
]
SQUARES = [(0, 0.0, 1), (20, 0.0, 0.25), (39, 0.9, (0.1 / 40) ** 2)]
RECIPES = {
    "adadistill_paper": STEPS,
    "adaface_geometry": STEPS,
    "arcface_mbf": SQUARES,
    "adadistill_mbf": SQUARES,
    "small_set": [
        *[(0, 0.0, 1), (3, 0.9, 1), (4, 0.0, 0.1), (5, 0.9, 0.1), (6, 0.0, 0.01), (7, 0.9, 0.01)]
    ],
}
# images a step in the run that the recipe speaks of, and the rate there
RATES = {
    "adadistill_paper": (4 * 128, 0.1),
    "adaface_geometry": (2 * 384, 0.15),
    "arcface_mbf": (8 * 128, 0.1),
    "adadistill_mbf": (8 * 128, 0.1),
    "small_set": (64, 0.1),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    file = ROOT / "config" / "recipes" / f"{name}.py"
    cfg = load_config(file)
    for epoch, fraction, expected in RECIPES[name]:
        assert factor(cfg, epoch, fraction) == pytest.approx(expected), (epoch, fraction)
    last, _, _ = RECIPES[name][-1]
    assert last == cfg.num_epoch - 1
    images, rate = RATES[name]
    processes = images // cfg.batch_size
    assert learning_rate(cfg, 0, 0.0, processes) == pytest.approx(rate)
    about = file.read_text().split('"""')[1]
    assert f"--config config/recipes/{name}.py" in about
    assert "Their figure" in " ".join(about.split()) and "Not known:" in about


def test_every_recipe_is_tested():
    assert RECIPES.keys() == {file.stem for file in (ROOT / "config" / "recipes").glob("*.py")}
