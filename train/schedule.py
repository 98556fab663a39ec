"""The learning rate of a step: a base for the images of a step, times the schedule's factor."""

import math

from utils.errors import InputError


def images_of_step(cfg, processes: int) -> int:
    return cfg.batch_size * processes * cfg.accumulate


def steps_of_epoch(cfg, images: int, processes: int) -> int:
    """Raises InputError if the set does not fill one step."""
    steps = images // images_of_step(cfg, processes)
    if steps == 0:
        raise InputError(
            f"the set has {images} images, one step takes {images_of_step(cfg, processes)} "
            "(batch_size x processes x accumulate): lower batch_size"
        )
    return steps


def learning_rate(cfg, epoch: int, fraction: float, processes: int) -> float:
    """Learning rate at ``fraction`` (0 to below 1) of ``epoch``, counted from 0.

    lr is for 512 images a step, of which accumulate counts one forward pass.
    """
    base = cfg.lr / 512 * cfg.batch_size * processes
    return base * factor(cfg, epoch, fraction)


def factor(cfg, epoch: int, fraction: float) -> float:
    """What the base is multiplied by: cfg.lr_func's value, or squared warm-up and then a schedule.

    step: x 0.1 from epoch index m - 1 for every milestone m. poly: (1 - t/T)^power and cosine:
    (1 + cos(pi t/T)) / 2, t and T counted in steps after the warm-up.
    """
    if cfg.lr_func is not None:
        return cfg.lr_func[epoch]
    if epoch < cfg.warmup_epoch:
        return ((epoch + fraction + 1) / (cfg.warmup_epoch + 1)) ** 2
    if cfg.schedule == "step":
        return 0.1 ** sum(milestone - 1 <= epoch for milestone in cfg.milestones)
    done = (epoch + fraction - cfg.warmup_epoch) / (cfg.num_epoch - cfg.warmup_epoch)
    if cfg.schedule == "poly":
        return (1 - done) ** cfg.schedule_power
    return (1 + math.cos(math.pi * done)) / 2
