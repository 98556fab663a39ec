"""The learning rate of every schedule against its closed formula."""

import math

import pytest
from easydict import EasyDict

from config.config import config
from train.schedule import factor, learning_rate


def settings(**values):
    """A configuration of 20 epochs, milestones [8, 14]."""
    return EasyDict(dict(config, num_epoch=20, warmup_epoch=0, milestones=[8, 14]) | values)


def test_milestones_and_warm_up():
    cfg = settings(lr=0.1, batch_size=128, warmup_epoch=2)
    base = 0.1 / 512 * 128
    assert learning_rate(cfg, 0, 0.0) == pytest.approx(base * (1 / 3) ** 2)
    assert learning_rate(cfg, 1, 0.5) == pytest.approx(base * (2.5 / 3) ** 2)
    assert learning_rate(cfg, 2, 0.9) == learning_rate(cfg, 6, 0.9) == pytest.approx(base)
    assert learning_rate(cfg, 7, 0.0) == learning_rate(cfg, 12, 0.9) == pytest.approx(base * 0.1)
    assert learning_rate(cfg, 13, 0.0) == pytest.approx(base * 0.01)


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
