"""The evidence that deploy/export_onnx.py checks a model by, and what it finds."""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config.load import load_config
from deploy.images import draw_images, read_images
from deploy.measure import agreement, measure, megabytes, threads_in_words
from deploy.model import Model, load_model
from eval import verification
from eval.embed import embed
from eval.report.tables import Table, format_table
from eval.roc import check_norms
from utils.errors import InputError
from utils.recordio.image_records import sampled
from utils.weights.load import run_beside

# two full batches and one of a single image
IMAGES, BATCH = 33, 16
# int8 is measured, not judged
LEAST_COSINE = {"float32": 0.9999, "float16": 0.999}


class Evidence(NamedTuple):
    """What models are checked on.

    images: (N, 112, 112, 3) uint8, from where ``source`` says. calibration: likewise, none of the
    former; None without --int8. pair_sets: {name: set}.
    """

    images: np.ndarray
    source: str
    calibration: np.ndarray | None
    pair_sets: dict[str, verification.DataSet]


def gather(args: argparse.Namespace) -> Evidence:
    """What the command line names, else what the run's config.json names and is there.

    Raises InputError if something is missing or damaged.
    """
    beside = run_beside(args.checkpoint)
    cfg = load_config(beside) if beside else None
    own, calibration = training_set(cfg), None
    images = None
    if args.int8:
        folder = args.calibration_rec or own
        if folder is None:
            why = f"the set that {beside} names is not there"
            if cfg is None:
                why = f"there is no {args.checkpoint.parent / 'config.json'} that names a set"
            raise InputError(
                f"--int8: nothing to calibrate on, {why}; name a training set with "
                "--calibration-rec"
            )
        several = read_images(folder, args.calibration_images + IMAGES, "--calibration-rec")
        images, calibration = divide(several, path_text(folder))
        source = f"images of {path_text(folder)}"
    if args.images:
        images, source = read_images(args.images, IMAGES, "--images"), f"images of {args.images}"
    elif images is None and own:
        images, source = read_images(own, IMAGES, "rec"), f"images of {path_text(own)}"
    elif images is None:
        images, source = draw_images(IMAGES), "drawn faces"
    return Evidence(images, source, calibration, pair_sets(args, cfg) if args.int8 else {})


def divide(images: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images to check on, and the others, to calibrate on.

    The former are IMAGES of them, spread evenly, or half of all if there are fewer.
    """
    if len(images) < 2:
        raise InputError(
            f"--calibration-rec: {where} has a single image: one is needed to "
            "calibrate on and another to check on"
        )
    checked = np.zeros(len(images), bool)
    checked[sampled(len(images), min(IMAGES, len(images) // 2))] = True
    return images[checked], images[~checked]


def training_set(cfg) -> str | list[str] | None:
    """The set that a run was trained on, a path or several, if it is still there."""
    if cfg is None:
        return None
    folder = cfg.rec if cfg.db_file_format == "rec" else cfg.data_path
    paths = folder if isinstance(folder, list) else [folder]
    return folder if all(path and Path(path).exists() for path in paths) else None


def path_text(path: str | Path | list[str]) -> str:
    return ", ".join(path) if isinstance(path, list) else str(path)


def pair_sets(args: argparse.Namespace, cfg) -> dict[str, verification.DataSet]:
    """The sets that the command line names, which must be there, or those of the run that are."""
    root = args.val_data or (cfg and cfg.val_rec)
    names = [name for names in args.val_targets or () for name in names.split(",") if name]
    if not root:
        if names:
            raise InputError("--val-targets: in which folder? name it with --val-data")
        return {}
    if not names:
        known = verification.list_pair_sets(root)
        if args.val_data and not known:
            raise InputError(
                f"--val-data: no pair set, *.bin or an Arrow folder, in {Path(root).absolute()}"
            )
        names = known if args.val_data else [name for name in cfg.val_targets if name in known]
    return verification.load_targets(root, names)


def check(original: Model, paths: dict[str, Path], evidence: Evidence) -> dict[str, dict]:
    """{file's name: figures} of the original and of each model.

    Raises InputError if one does not agree with the original.
    """
    reference = features(original, evidence.images)
    rows = {original.path.name: figures_of(original)}
    for numbers, path in paths.items():
        model = load_model(path, "deploy")
        if model.embedding_size != original.embedding_size:
            raise InputError(
                f"{path.name} gives {model.embedding_size}-d features, "
                f"{original.path.name} {original.embedding_size}-d ones"
            )
        compared = agreement(features(model, evidence.images), reference)
        if not compared.least_cosine >= LEAST_COSINE.get(numbers, -1.0):
            raise InputError(
                f"{path.name} ({numbers}) disagrees with {original.path.name}: cosine "
                f"{compared.least_cosine:.6f} on {evidence.source}, "
                f"below {LEAST_COSINE[numbers]}; nothing was written"
            )
        accuracies = {
            name: verification.test(pairs, model.network, BATCH)
            for name, pairs in evidence.pair_sets.items()
        }
        rows[path.name] = figures_of(model) | compared._asdict() | accuracies
    return rows


def features(model: Model, images: np.ndarray) -> np.ndarray:
    """(N, D) float32 as the network gives them.

    Raises InputError naming the model if one is not finite or zero.
    """
    try:
        rows = embed(model.network, images, BATCH, flip=False, name="checking")[0].numpy()
        check_norms(rows)
    except InputError as error:
        raise InputError(f"{model.path.name}: {error}; nothing was written") from error
    return rows


def figures_of(model: Model) -> dict:
    return {
        "megabytes": megabytes(model.path),
        "milliseconds": 1000 * measure(model.network, 1, torch.device("cpu"), seconds=0.3).latency,
    }


def show(original: Model, evidence: Evidence, rows: dict[str, dict]) -> str:
    """What was checked and the figures of all models, as a table."""
    columns = ["MB", "ms an image", "max. difference", "least cosine", "mean cosine"]
    columns += [f"{name} (%)" for name in evidence.pair_sets]
    cells = {name: cells_of(figures, evidence.pair_sets) for name, figures in rows.items()}
    return (
        f"{original.name}, {original.parameters:,} parameters, {original.embedding_size}-d "
        f"features; compared on {len(evidence.images)} {evidence.source}, "
        f"CPU with {threads_in_words()}\n"
        f"{format_table(Table('', '', columns, cells))}"
    )


def cells_of(figures: dict, pair_sets) -> list[str]:
    cells = [f"{figures['megabytes']:.2f}", f"{figures['milliseconds']:.2f}"]
    if "difference" not in figures:
        # the original, with which the others are compared
        return cells + [""] * (3 + len(pair_sets))
    cells += [
        f"{figures['difference']:.1e} of {figures['largest']:.1f}",
        f"{figures['least_cosine']:.6f}",
        f"{figures['mean_cosine']:.6f}",
    ]
    for name in pair_sets:
        accuracy, std = (figures[name][key] for key in ("Accuracy-Flip", "Accuracy-Std"))
        cells.append(f"{100 * accuracy:.2f} ± {100 * std:4.2f}")
    return cells
