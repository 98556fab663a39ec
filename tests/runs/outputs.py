"""Sets of drawn faces to train on, and what a run leaves of them, for comparisons."""

import json
from pathlib import Path

import torch

from data.make_synthetic import write_pair_set, write_training_set
from data.synth.render_pool import open_studio


def draw_faces(folder: Path, people: int, pair_sets=()) -> Path:
    """Eight images of each person, and pair sets of 20 pairs."""
    with open_studio(1, 3, 1.0) as studio:
        write_training_set(folder, studio, people, 8)
        for name in pair_sets:
            write_pair_set(folder, studio, name, 20)
    return folder


def everything(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a step: weights, their average, centres, statistics and momentum, by name."""
    backbone, header, state = (
        torch.load(folder / f"{step}{part}.pth", weights_only=True)
        for part in ("backbone", "header", "state")
    )
    momentum = {
        f"momentum/{key}": value["momentum_buffer"]
        for key, value in state["optimizer"]["state"].items()
    }
    if state["header_momentum"] is not None:
        momentum["momentum/header"] = state["header_momentum"]
    average = {}
    if (folder / f"{step}ema.pth").is_file():
        average = torch.load(folder / f"{step}ema.pth", weights_only=True)
    return backbone | header | momentum | {f"ema/{key}": value for key, value in average.items()}


def same(folder: Path, other: Path, step: int) -> bool:
    """Whether all tensors of a step are the same, bit for bit."""
    ours, theirs = everything(folder, step), everything(other, step)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(folder) if "loss" in row}
