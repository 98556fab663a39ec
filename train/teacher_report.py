"""Look at a teacher as it will be used, before a student is trained from it for days.

    python train/teacher_report.py --sample 5000 \\
        teacher=ir50 pretrained_teacher_path=adaface_ir50_ms1mv2.ckpt

prints the accuracy of the teacher on the pair sets of the configuration (those that are there; all,
if the command line names them) and, on a sample of the training set, the mean cosine of a feature
to the mean of its class's other images and to the nearest other class, and how often its own class
is the nearest: with the colours as the teacher gets them and with red and blue exchanged. A teacher
that does better with them exchanged gets the wrong ones (color_space), one that cannot tell the
classes apart is the wrong file for this set; both are said in a line that begins with WARNING. On
several ranks: torchrun --nproc_per_node 4 train/teacher_report.py ...
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from torch import nn

from config.load import argument_parser, load_config
from eval import verification
from eval.embed import embed
from train import build
from train.teacher_pass import log_to_console
from utils import distributed
from utils.errors import InputError, run
from utils.precision import choose_precision
from utils.teacher.load import load_teacher

# Places of the set where a sample is looked for, and the images of one of them at least.
WINDOWS = 50
SHORTEST_WINDOW = 20
# Images: the others' mean needs one.
SMALLEST_CLASS = 2
# A difference between the colour orders of fewer standard errors is chance, ...
SIGNIFICANT_ERRORS = 3.0
# ... of a smaller cosine of no consequence.
RELEVANT_COSINE = 0.005
# Cosine: a teacher that knows faces has several tenths between own and other classes.
LEAST_GAP = 0.05


class Closeness(NamedTuple):
    """Of each sampled image (n,): the cosine to two means.

    own: of its class's other images; other: of the nearest other class.
    """

    own: np.ndarray
    other: np.ndarray

    def describe(self) -> str:
        return (
            f"{self.own.mean():8.3f} {self.other.mean():14.3f} "
            f"{100 * (self.own > self.other).mean():18.1f}"
        )


def main():
    arguments = parse_arguments()
    cfg = load_config(arguments.config, arguments.overrides)
    device = distributed.init(cfg.device)
    log_to_console()
    teacher = load_teacher(cfg).to(device, memory_format=build.memory_format(cfg))
    dataset = build.build_dataset(cfg)
    images, labels = distributed.all_succeed(
        lambda: read_sample(dataset, choose_sample(dataset, arguments.sample, cfg.seed))
    )
    precision = choose_precision(cfg.precision, device)
    options = dict(device=device, precision=precision, channels_last=cfg.channels_last)
    say(f"{teacher.name}, {precision} on {distributed.world_size()} x {device.type}")
    report_pair_sets(teacher, cfg, options, arguments.sets_named)
    report_sample(teacher, images, labels, cfg, options)
    distributed.shutdown()


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__, "teacher=ir50 color_space=RGB")
    parser.add_argument(
        "--sample",
        type=int,
        default=5000,
        metavar="N",
        help="training images to look at (%(default)s)",
    )
    arguments = parser.parse_intermixed_args()
    if arguments.sample < 4:
        raise InputError(f"--sample {arguments.sample}: two classes of two images need 4")
    arguments.sets_named = any(
        override.startswith("val_targets=") for override in arguments.overrides
    )
    return arguments


def say(line: str) -> None:
    if distributed.is_main():
        print(line, flush=True)


def report_pair_sets(teacher: nn.Module, cfg, options: dict, all_must_be_there: bool) -> None:
    say("\npair set          Accuracy ± Std (%)")
    known = verification.list_pair_sets(cfg.val_rec)
    for name in cfg.val_targets:
        if not all_must_be_there and name not in known:
            say(f"{name:16}  skipped: no {Path(cfg.val_rec) / name}.bin and no such folder")
            continue
        pairs = verification.load_targets(cfg.val_rec, [name])[name]
        figures = verification.test(pairs, teacher, cfg.val_batch_size, **options)
        accuracy, deviation = 100 * figures["Accuracy-Flip"], 100 * figures["Accuracy-Std"]
        say(f"{name:16}  {accuracy:11.2f} ± {deviation:4.2f}")


def report_sample(
    teacher: nn.Module, images: np.ndarray, labels: np.ndarray, cfg, options: dict
) -> None:
    """Print how close images are to their classes in both colour orders, and what is suspicious."""
    say(
        f"\n{len(images)} training images of {len(np.unique(labels))} classes: mean cosine "
        "to\ncolours           own class    nearest other    own is nearest (%)"
    )
    networks = {f"{teacher.color_space}, as set": teacher, "exchanged": Exchanged(teacher)}
    by_order = []
    for name, network in networks.items():
        plain, mirrored = embed(network, images, cfg.val_batch_size, name=name, **options)
        by_order.append(closeness((plain + mirrored).numpy(), labels))
        say(f"{name:16}  {by_order[-1].describe()}")
    for warning in suspicions(*by_order):
        say(f"WARNING: {warning}")


class Exchanged(nn.Module):
    """A network that is shown images with red and blue exchanged."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images.flip(1))


def suspicions(as_set: Closeness, exchanged: Closeness) -> list[str]:
    """What is wrong with a teacher, by the gap between an image's own and nearest other class."""
    gap = as_set.own - as_set.other
    exchanged_gap = exchanged.own - exchanged.other
    gain = exchanged_gap - gap
    standard_error = gain.std() / np.sqrt(len(gain))
    warnings = []
    if gain.mean() > max(RELEVANT_COSINE, SIGNIFICANT_ERRORS * standard_error):
        warnings.append(
            f"the classes lie {gain.mean():.3f} further apart with red and blue "
            "exchanged: the teacher gets the wrong colours; set color_space to the other order"
        )
    if max(gap.mean(), exchanged_gap.mean()) < LEAST_GAP:
        warnings.append(
            "an image is hardly nearer to its own class than to another "
            f"({gap.mean():.3f}): the wrong weights, images of another alignment, or labels of "
            "another set"
        )
    return warnings


def closeness(features: np.ndarray, labels: np.ndarray) -> Closeness:
    """features (n, D), not normalised; labels (n,), each with at least SMALLEST_CLASS images.

    The own class's mean leaves the image itself out: with it even random features would seem close
    to their class.
    """
    lengths = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    if not lengths.all():
        raise InputError(
            f"the teacher's features of {int((lengths == 0).sum())} of "
            f"{len(features)} images are zero: these are no trained weights"
        )
    features = features / lengths
    classes, row = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(classes), features.shape[1]))
    np.add.at(sums, row, features)
    others = sums[row] - features
    own = np.einsum("nd,nd->n", features, others) / np.linalg.norm(others, axis=1)
    cosines = features @ (sums / np.linalg.norm(sums, axis=1, keepdims=True)).T
    cosines[np.arange(len(row)), row] = -np.inf
    return Closeness(own, cosines.max(axis=1))


def choose_sample(dataset, count: int, seed: int) -> np.ndarray:
    """Indices of about ``count`` images of classes with at least SMALLEST_CLASS of them, rising.

    Sets that are grouped by class, as InsightFace's, show most of a class at a few places; of
    shuffled ones all labels are read. Raises InputError if there are no two such classes.
    """
    count = min(count, len(dataset))
    windows = max(1, min(WINDOWS, count // SHORTEST_WINDOW))
    length = count // windows
    starts = np.linspace(0, len(dataset) - length, windows).astype(np.int64)
    in_windows = np.unique(starts[:, None] + np.arange(length))
    chosen = of_large_classes(in_windows, dataset.labels(in_windows))
    if len(chosen) < len(in_windows) / 2:
        every = np.arange(len(dataset))
        labels = dataset.labels(every)
        # whole classes, in random order, until there are enough
        order = np.random.default_rng(seed).permutation(labels.max() + 1)
        rank = np.append(order, len(order))[labels]
        members = every[np.argsort(rank, kind="stable")][:count]
        chosen = of_large_classes(members, labels[members])
    if len(np.unique(dataset.labels(chosen))) < 2:
        raise InputError(
            f"{dataset.root_dir}: no two classes with {SMALLEST_CLASS} images among "
            f"{len(dataset)} images: nothing to compare"
        )
    return np.sort(chosen)


def of_large_classes(indices: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Those whose class has SMALLEST_CLASS of them; labels below 0 are of damaged records."""
    _, row, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return indices[(counts[row] >= SMALLEST_CLASS) & (labels >= 0)]


def read_sample(dataset, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 112, 112, 3) uint8 RGB and labels (n,), of classes with SMALLEST_CLASS of them.

    Without damaged records.
    """
    images, labels, bad = dataset.read_batch(indices.tolist())
    damaged = {name for name, _ in bad}
    if damaged:
        logging.warning("%d damaged records are left out", len(damaged))
    is_good = [dataset.name_of(index) not in damaged for index in indices.tolist()]
    good = np.flatnonzero(is_good)
    good = of_large_classes(good, labels[good])
    if len(np.unique(labels[good])) < 2:
        raise InputError(
            f"{dataset.root_dir}: no two classes with {SMALLEST_CLASS} readable "
            "images in the sample: see data/README.md"
        )
    return images[good], labels[good]


if __name__ == "__main__":
    run(main)
