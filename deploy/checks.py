"""The evidence that deploy/export_onnx.py checks a model by, and what it finds."""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config.load import load_config
from deploy.images import draw_images, read_images
from deploy.measure import agreement, measure, megabytes
from deploy.model import Model, load_model
from eval import verification
from eval.embed import embed
from eval.report.tables import Table, format_table
from eval.roc import check_norms
from utils.dataset.base import sampled
from utils.errors import InputError
from utils.weights.load import run_beside

# two full batches and one of a single image
IMAGES, BATCH = 33, 16
LEAST_COSINE = {"float32": 0.9999, "float16": 0.999}  # int8 is measured, not judged


class Evidence(NamedTuple):
    """images: (N, 112, 112, 3) uint8, from where ``source`` says. calibration: likewise, none of
    the former; None without --int8. sets: the pair sets.
    """

    images: np.ndarray
    source: str
    calibration: np.ndarray | None
    sets: dict[str, verification.DataSet]


def gather(args: argparse.Namespace) -> Evidence:
    """What the command line names, else what the config.json beside the checkpoint does and is
    there. Errors: InputError if something is missing or damaged.
    """
    beside = run_beside(args.checkpoint)
    cfg = load_config(beside) if beside else None
    own, calibration = training_set(cfg), None
    if args.int8:
        where = args.calibration_rec or own
        if where is None:
            why = f"the set that {beside} names is not there"
            if cfg is None:
                why = f"there is no {args.checkpoint.parent / 'config.json'} that names a set"
            raise InputError(
                f"--int8: nothing to calibrate on, {why}; name a training set with "
                "--calibration-rec"
            )
        images, calibration = divide(
            read_images(where, args.calibration_images + IMAGES, "--calibration-rec"),
            words_of(where),
        )
        source = f"images of {words_of(where)}"
    elif own and not args.images:
        images, source = read_images(own, IMAGES, "rec"), f"images of {words_of(own)}"
    elif not args.images:
        images, source = draw_images(IMAGES), "drawn faces"
    if args.images:
        images, source = read_images(args.images, IMAGES, "--images"), f"images of {args.images}"
    return Evidence(images, source, calibration, pair_sets(args, cfg) if args.int8 else {})


def divide(images: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """(IMAGES of them to check on, spread evenly, or half of all if there are fewer; the others, to
    calibrate on).
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
    where = cfg and (cfg.rec if cfg.db_file_format == "rec" else cfg.data_path)
    paths = where if isinstance(where, list) else [where]
    return where if all(path and Path(path).exists() for path in paths) else None


def words_of(where: str | Path | list[str]) -> str:
    return ", ".join(where) if isinstance(where, list) else str(where)


def pair_sets(args: argparse.Namespace, cfg) -> dict[str, verification.DataSet]:
    """The sets that the command line names, all of which must be there, or those of the run that
    are.
    """
    root = args.val_data or (cfg and cfg.val_rec)
    names = [name for word in args.val_targets or () for name in word.split(",") if name]
    if not root:
        if names:
            raise InputError("--val-targets: in which folder? name it with --val-data")
        return {}
    if not names:
        known = [path.stem for path in sorted(Path(root).glob("*.bin"))]
        if args.val_data and not known:
            raise InputError(f"--val-data: no pair set *.bin in {Path(root).absolute()}")
        names = known if args.val_data else [name for name in cfg.val_targets if name in known]
    return verification.load_targets(root, names)


def check(original: Model, paths: dict[str, Path], evidence: Evidence) -> dict[str, dict]:
    """{file's name: figures} of the original and of each model.

    Errors: InputError if one does not agree with the original.
    """
    wanted = features(original, evidence.images)
    rows = {original.path.name: figures_of(original)}
    for numbers, path in paths.items():
        model = load_model(path, "deploy")
        if model.embedding_size != original.embedding_size:
            raise InputError(
                f"{path.name} gives {model.embedding_size}-d features, "
                f"{original.path.name} {original.embedding_size}-d ones"
            )
        found = agreement(features(model, evidence.images), wanted)
        if not found.least_cosine >= LEAST_COSINE.get(numbers, -1.0):
            raise InputError(
                f"{path.name} ({numbers}) disagrees with {original.path.name}: cosine "
                f"{found.least_cosine:.6f} on {evidence.source}, "
                f"below {LEAST_COSINE[numbers]}; nothing was written"
            )
        rows[path.name] = (
            figures_of(model)
            | found._asdict()
            | {
                name: verification.test(pairs, model.network, BATCH)
                for name, pairs in evidence.sets.items()
            }
        )
    return rows


def features(model: Model, images: np.ndarray) -> np.ndarray:
    """(N, D) float32 as the network gives them.

    Errors: InputError naming the model if one is not finite or zero.
    """
    try:
        found = embed(model.network, images, BATCH, flip=False, name="checking")[0].numpy()
        check_norms(found)
        return found
    except InputError as error:
        raise InputError(f"{model.path.name}: {error}; nothing was written") from error


def figures_of(model: Model) -> dict:
    return {
        "megabytes": megabytes(model.path),
        "milliseconds": 1000 * measure(model.network, 1, torch.device("cpu"), seconds=0.3).latency,
    }


def show(original: Model, evidence: Evidence, rows: dict[str, dict]) -> str:
    """What was checked and the figures of all models, as a table."""
    columns = [
        "MB",
        "ms an image",
        "max. difference",
        "least cosine",
        "mean cosine",
        *(f"{name} (%)" for name in evidence.sets),
    ]
    table = Table(
        "", "", columns, {name: cells(figures, evidence.sets) for name, figures in rows.items()}
    )
    return (
        f"{original.name}, {original.parameters:,} parameters, {original.embedding_size}-d "
        f"features; compared on {len(evidence.images)} {evidence.source}, "
        f"CPU with {torch.get_num_threads()} "
        f"thread{'s'[: torch.get_num_threads() > 1]}\n{format_table(table)}"
    )


def cells(figures: dict, sets) -> list[str]:
    made = "difference" in figures
    alike = (
        [
            f"{figures['difference']:.1e} of {figures['largest']:.1f}",
            f"{figures['least_cosine']:.6f}",
            f"{figures['mean_cosine']:.6f}",
        ]
        if made
        else [""] * 3
    )
    accuracies = [
        f"{100 * figures[name]['Accuracy-Flip']:.2f} ± {100 * figures[name]['Accuracy-Std']:4.2f}"
        if made
        else ""
        for name in sets
    ]
    return [f"{figures['megabytes']:.2f}", f"{figures['milliseconds']:.2f}", *alike, *accuracies]
