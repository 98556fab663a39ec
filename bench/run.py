"""How much faster this is than the plain way (bench/plain.py), as ratios measured in one run.

Both ways in turns, medians, the same figures from both.

    ./bench/run.sh                   on CPU cores, a few minutes
    ./bench/run.sh --cuda            on a GPU, eight minutes: training with 512 images a step
    ./bench/run.sh --cuda --dry-run  the same code on the CPU, at sizes that show nothing
    ./bench/run.sh --only header     one part: data, augmentation, header, training, evaluation
    ./bench/run.sh --full            evaluation at the full sizes of IJB-C and TinyFace

It ends with a table. "floor": what the ratio is meant to reach; "limit": time or memory of what no
way can do without; "allowed": how many times that ours may take.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import augmentation, data_path, evaluation, header, training
from bench.processes import Process, run_tool
from utils.command_line import command_parser
from utils.dataset.workers import cores
from utils.errors import InputError, run
from utils.files import write_json


class Sizes(NamedTuple):
    """How much is measured.

    images: of the data path; header_batch: embeddings of a header step; batch, steps, rounds,
    repeats: images of a training step, such steps a call, calls of each way after the first, and
    how many of ours for one of the plain way; workers: reading processes of training.
    """

    images: int
    header_batch: int
    batch: int
    steps: int
    rounds: int
    repeats: int
    workers: int
    classes: int = training.C
    teacher: str = "iresnet50"


ON_CPU = Sizes(4096, header.B, 64, steps=1, rounds=4, repeats=4, workers=1)
# a header step of milliseconds, and a second or more a call; two of 16 cores are left to training
# and its copies to the GPU
ON_GPU = Sizes(32_768, 1024, 512, steps=20, rounds=3, repeats=2, workers=min(cores(), 14))
DRY = Sizes(data_path.BATCH, 4, 4, 1, 1, 1, 1, classes=1000, teacher="iresnet18")
CPU_HAS_BF16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


class Row(NamedTuple):
    """None: not set."""

    what: str
    unit: str
    # plain, ours and limit are in ``unit``
    plain: float
    ours: float
    # the smallest ratio of plain and ours that is meant
    floor: float | None = None
    limit: float | None = None
    # how many times the limit ours may be
    allowed: float | None = None


def main() -> None:
    arguments = parse_arguments()
    if arguments.cuda and not arguments.dry_run and not torch.cuda.is_available():
        raise InputError("--cuda: PyTorch sees no GPU here")
    parts = [arguments.only] if arguments.only else list(PARTS)
    if arguments.cuda and not arguments.only:
        # NumPy and PyTorch on the host: nothing that a GPU changes
        parts.remove("evaluation")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            rows += PARTS[part](Path(folder), arguments)
    print("\n" + table(rows))
    if arguments.json:
        write_json(arguments.json, [row._asdict() for row in rows])


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--cuda", action="store_true", help="measure on the GPU")
    parser.add_argument(
        "--dry-run", action="store_true", help="on the CPU at small sizes: does everything run?"
    )
    parser.add_argument("--only", default="", choices=tuple(PARTS), help="one part")
    parser.add_argument(
        "--full", action="store_true", help="evaluation at full size: seven minutes more"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    arguments = parser.parse_args()
    arguments.device = "cuda" if arguments.cuda and not arguments.dry_run else "cpu"
    arguments.size = ON_GPU if arguments.cuda else ON_CPU
    if arguments.dry_run:
        arguments.size = DRY
    return arguments


# --- the rows


def data_rows(folder: Path, arguments) -> list[Row]:
    """On one core; beside a GPU, which that would starve, with a process for every core."""
    images = arguments.size.images
    data_path.write_set(folder / "images", images, training.C)
    run_tool("data/decode_rec.py", folder / "images", "--output", folder / "decoded")
    one_core = not arguments.cuda
    ways = [(1, "one core, a reading process"), (0, "one core, no other process")]
    if arguments.cuda:
        ways = [(cores(), f"{cores()} reading processes")]
    rows = []
    for decoded in (False, True):
        for workers, what in ways:
            limited = one_core and not decoded
            options = dict(
                folder=str(folder / "images"),
                device=arguments.device,
                workers=workers,
                one_core=one_core,
            )
            calls = in_turns(
                "bench.data_path",
                options,
                rounds=1 if arguments.dry_run else 5,
                limit=limited,
                ours=dict(folder=str(folder / "decoded")) if decoded else None,
            )
            for figure in ("images", "red", "green", "blue"):
                # ours is bf16 where training takes that; in float32 they are the same, as a test
                # asserts
                check_equal("data path", calls, figure, 5e-3)
            suffix = ", decoded before" if decoded else ""
            row = Row(
                f"data path, {what}{suffix}",
                "us/image",
                plain=1e6 * median(calls["Plain.step"]) / images,
                ours=1e6 * median(calls["Ours.step"]) / images,
                floor=8 if one_core else None,
            )
            if limited:
                limit = 1e6 * median(calls["Ours.limit"]) / images
                row = row._replace(limit=limit, allowed=1 / 0.7)
            rows.append(row)
    return say(rows)


def augmentation_rows(folder: Path, arguments) -> list[Row]:
    options = dict(device=arguments.device)
    rounds = 1 if arguments.dry_run else 7
    calls = in_turns("bench.augmentation", options, rounds, limit=False)
    check_equal("augmentation", calls, "sum", 1e-3)
    images = augmentation.BATCH * augmentation.BATCHES
    plain, ours = (1e6 * median(calls[f"{way}.step"]) / images for way in ("Plain", "Ours"))
    return say([Row(f"augmentation, B={augmentation.BATCH}", "us/image", plain, ours, floor=3)])


def header_rows(folder: Path, arguments) -> list[Row]:
    batch, classes = arguments.size.header_batch, arguments.size.classes
    rows = []
    for method, floor in (("AdaDistill", 6), ("standalone", 2.5)):
        adaptive = method == "AdaDistill"
        options = dict(method=method, device=arguments.device, batch=batch, classes=classes)
        rounds = 1 if arguments.dry_run else 7
        calls = in_turns("bench.header", options, rounds, limit=adaptive)
        for figure in ("loss", "gradient"):
            check_equal(f"{method} header", calls, figure, 1e-4)
        row = Row(
            f"{method} header step, B={batch}, C={classes:,}",
            "ms",
            plain=1e3 * median(calls["Plain.step"]),
            ours=1e3 * median(calls["Ours.step"]),
            floor=floor,
        )
        if not adaptive:
            rows.append(row)
            continue
        rows.append(row._replace(limit=1e3 * median(calls["Ours.limit"]), allowed=1.4))
        rows.append(
            Row(
                "the same: peak memory beyond the centres",
                "MB",
                # of the first call: ours keeps its matrix for the next
                plain=calls["Plain.step"][0]["bytes"] / 1e6,
                ours=calls["Ours.step"][0]["bytes"] / 1e6,
                floor=3,
                # (B, C) float32, twice
                limit=2 * 4 * batch * classes / 1e6,
                allowed=1,
            )
        )
    return say(rows)


def training_rows(folder: Path, arguments) -> list[Row]:
    """Plain with live teacher against ours with live teacher, and with cached features."""
    size = arguments.size
    batch, steps = size.batch, size.steps
    images = batch * steps * (size.rounds * size.repeats + 2)
    training.prepare(
        folder / "training",
        images,
        arguments.device,
        size.workers,
        size.classes,
        size.teacher,
    )
    options = dict(
        folder=str(folder / "training"),
        device=arguments.device,
        batch=batch,
        workers=size.workers,
        steps=steps,
        classes=size.classes,
        teacher=size.teacher,
        # minutes of a CPU
        compiled=not arguments.dry_run,
    )
    if arguments.cuda:
        live_floor, cached_floor = 4, 8
    else:
        live_floor, cached_floor = 2.5 if CPU_HAS_BF16 else 1.3, 3.5
    kinds = [
        (True, False, live_floor, "live iResNet-50 teacher"),
        (False, False, cached_floor, "cached teacher features"),
    ]
    if arguments.cuda:
        kinds.append((False, arguments.device == "cuda", cached_floor, "cached, CUDA graphs"))
    rows = []
    for live, graphs, floor, what in kinds:
        calls = in_turns(
            "bench.training",
            options,
            size.rounds,
            limit=not live,
            ours=dict(live=live, graphs=graphs),
            extra="matrix_rate",
            first="compare",
            repeats=1 if live else size.repeats,
        )
        # fp32 against bf16, and centres drawn anew, among which chance counts where they are few
        looser = 40 if arguments.dry_run else 1
        for figure, tolerance in (("loss", 0.005), ("gradient", 0.03)):
            check_equal(what, calls, figure, looser * tolerance, "compare")
        plain = median(calls["Plain.step"]) / steps
        ours = median(calls["Ours.step"]) / steps
        row = Row(
            f"AdaDistill training step, B={batch}, {what}", "ms", 1e3 * plain, 1e3 * ours, floor
        )
        if not live:
            limit = 1e3 * median(calls["Ours.limit"]) / steps
            row = row._replace(limit=limit, allowed=1.1)
        rows.append(row)
        best = calls["Ours.matrix_rate"][-1]["teraflops"]
        work = training.gigaflops(batch, True, size.teacher)
        training.say_rates("plain, live teacher", batch, work, plain, best, calls["Plain.step"])
        work = training.gigaflops(batch, live, size.teacher)
        training.say_rates(f"ours, {what}", batch, work, ours, best, calls["Ours.step"])
    return say(rows)


def evaluation_rows(folder: Path, arguments) -> list[Row]:
    """In this process: both ways are NumPy and PyTorch on the host."""
    scale = 1 if arguments.full else 8
    floors = {"pair set, ten folds": 50, "IJB-C 1:1, three variants": 12}
    rows = []
    for figures in evaluation.measure_all(scale, evaluation.measure_both):
        what = figures["what"]
        row = Row(what, "s", figures["plain"], figures["ours"], floors.get(what))
        if scale > 1 and not what.startswith("pair"):
            row = row._replace(what=f"{what} (1/{scale})")
        if what.startswith("IJB-C 1:1"):
            row = row._replace(limit=evaluation.three_passes(scale), allowed=2)
        rows += say([row])
    return rows


PARTS = {
    "data": data_rows,
    "augmentation": augmentation_rows,
    "header": header_rows,
    "training": training_rows,
    "evaluation": evaluation_rows,
}


# --- measuring


def in_turns(
    module: str,
    options: dict,
    rounds: int,
    limit: bool,
    ours: dict | None = None,
    extra: str = "",
    first: str = "",
    repeats: int = 1,
) -> dict[str, list[dict]]:
    """{"Plain.step": calls, "Ours.step": calls, "Ours.limit": calls}, alternating.

    ``rounds`` of each after one that warms up and is kept as the first.

    ours: options of ours alone
    first: a method of both to call before
    extra: one of ours to call at the end
    repeats: how often ours and its limit are called in a round
    """
    with (
        Process(module, "Plain", options) as plain_process,
        Process(module, "Ours", options | (ours or {})) as our_process,
    ):
        ways = {"Plain": plain_process, "Ours": our_process}
        methods = [("Plain", "step"), ("Ours", "step")]
        if limit:
            methods.append(("Ours", "limit"))
        calls = {f"{way}.{method}": [] for way, method in methods}
        if first:
            calls |= {f"{way}.{first}": [ways[way].call(first)] for way in ways}
        for number in range(rounds + 1):
            for way, method in methods[:1] + methods[1:] * (repeats if number else 1):
                calls[f"{way}.{method}"].append(ways[way].call(method))
        if extra:
            calls[f"Ours.{extra}"] = [ways["Ours"].call(extra)]
        return calls


def median(calls: list[dict]) -> float:
    """Seconds of a call; the first one warms up."""
    return statistics.median(call["seconds"] for call in calls[1:])


def check_equal(
    what: str, calls: dict, figure: str, tolerance: float, method: str = "step"
) -> None:
    """Raises InputError if the two ways do not give the same figure, call by call."""
    for plain, ours in zip(calls[f"Plain.{method}"], calls[f"Ours.{method}"], strict=True):
        if not abs(plain[figure] - ours[figure]) <= tolerance * abs(plain[figure]):
            raise InputError(
                f"{what}: {figure} is {plain[figure]} the plain way, {ours[figure]} by ours"
            )


# --- the table

COLUMNS = ("plain", "ours", "ratio", "floor", "limit", "ours/limit", "allowed")


def say(rows: list[Row]) -> list[Row]:
    for row in rows:
        print(line(row), flush=True)
    return rows


def table(rows: list[Row]) -> str:
    head = f"{'':62}" + "".join(f"{column:>11}" for column in COLUMNS)
    return "\n".join([head, *map(line, rows)])


def line(row: Row) -> str:
    ratio = row.plain / row.ours
    cells = [f"{row.plain:,.4g}", f"{row.ours:,.4g}", f"{ratio:.1f}"]
    cells.append("-" if row.floor is None else row.floor)
    if row.limit is None:
        cells += ["-"] * 3
    else:
        cells += [f"{row.limit:,.4g}", f"{row.ours / row.limit:.2f}", f"{row.allowed:.2f}"]
    return f"{row.what + ', ' + row.unit:62}" + "".join(f"{cell:>11}" for cell in cells)


if __name__ == "__main__":
    run(main)
