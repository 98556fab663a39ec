"""How much faster this is than the plain way (bench/plain.py), as ratios measured in one run.

Both ways in turns, medians, the same figures from both.

    ./bench/run.sh                   on CPU cores, a few minutes
    ./bench/run.sh --cuda            on a GPU: training with 512 images a step
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
from utils.errors import InputError, run
from utils.files import write_json

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
    device = "cuda" if arguments.cuda else "cpu"
    if arguments.cuda and not torch.cuda.is_available():
        raise InputError("--cuda: PyTorch sees no GPU here")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for part, rows_of in PARTS.items():
            if arguments.only in ("", part):
                rows += rows_of(Path(folder), device, arguments)
    print("\n" + table(rows))
    if arguments.json:
        write_json(arguments.json, [row._asdict() for row in rows])


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--cuda", action="store_true", help="measure on the GPU")
    parser.add_argument("--only", default="", choices=tuple(PARTS), help="one part")
    parser.add_argument(
        "--full", action="store_true", help="evaluation at full size: seven minutes more"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    return parser.parse_args()


# --- the rows


def data_rows(folder: Path, device: str, arguments) -> list[Row]:
    images = 4096
    data_path.write_set(folder / "images", images, training.C)
    run_tool("data/decode_rec.py", folder / "images", "--output", folder / "decoded")
    rows = []
    for decoded in (False, True):
        for workers, what in ((1, "a reading process"), (0, "no other process")):
            options = dict(folder=str(folder / "images"), device=device, workers=workers)
            calls = in_turns(
                "bench.data_path",
                options,
                rounds=5,
                limit=not decoded,
                ours=dict(folder=str(folder / "decoded")) if decoded else None,
            )
            for figure in ("images", "red", "green", "blue"):
                # ours is bf16 where training takes that; in float32 they are the same, as a test
                # asserts
                check_equal("data path", calls, figure, 5e-3)
            suffix = ", decoded before" if decoded else ""
            row = Row(
                f"data path, one core, {what}{suffix}",
                "us/image",
                plain=1e6 * median(calls["Plain.step"]) / images,
                ours=1e6 * median(calls["Ours.step"]) / images,
                floor=8,
            )
            if not decoded:
                limit = 1e6 * median(calls["Ours.limit"]) / images
                row = row._replace(limit=limit, allowed=1 / 0.7)
            rows.append(row)
    return say(rows)


def augmentation_rows(folder: Path, device: str, arguments) -> list[Row]:
    calls = in_turns("bench.augmentation", dict(device=device), rounds=7, limit=False)
    check_equal("augmentation", calls, "mean", 1e-5)
    images = augmentation.BATCH * augmentation.BATCHES
    plain, ours = (1e6 * median(calls[f"{way}.step"]) / images for way in ("Plain", "Ours"))
    return say([Row(f"augmentation, B={augmentation.BATCH}", "us/image", plain, ours, floor=3)])


def header_rows(folder: Path, device: str, arguments) -> list[Row]:
    rows = []
    for method, floor in (("AdaDistill", 6), ("standalone", 2.5)):
        adaptive = method == "AdaDistill"
        calls = in_turns(
            "bench.header", dict(method=method, device=device), rounds=7, limit=adaptive
        )
        for figure in ("loss", "gradient"):
            check_equal(f"{method} header", calls, figure, 1e-4)
        row = Row(
            f"{method} header step, B={header.B}, C={header.C:,}",
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
                plain=calls["Plain.step"][0]["bytes"] / 1e6,
                ours=calls["Ours.step"][0]["bytes"] / 1e6,
                floor=3,
                # (B, C) float32, twice
                limit=2 * 4 * header.B * header.C / 1e6,
                allowed=1,
            )
        )
    return say(rows)


def training_rows(folder: Path, device: str, arguments) -> list[Row]:
    """Plain with live teacher against ours with live teacher, and with cached features."""
    cuda = device == "cuda"
    batch, steps, rounds, repeats = (512, 20, 5, 2) if cuda else (64, 1, 4, 4)
    training.prepare(folder / "training", batch * steps * (rounds * repeats + 2), device)
    options = dict(
        folder=str(folder / "training"),
        device=device,
        batch=batch,
        workers=12 if cuda else 1,
        steps=steps,
    )
    if cuda:
        live_floor, cached_floor = 4, 8
    else:
        live_floor, cached_floor = 2.5 if CPU_HAS_BF16 else 1.3, 3.5
    rows = []
    for live, floor, what in (
        (True, live_floor, "live iResNet-50 teacher"),
        (False, cached_floor, "cached teacher features"),
    ):
        calls = in_turns(
            "bench.training",
            options,
            rounds,
            limit=not live,
            ours=dict(live=live),
            extra="matrix_rate",
            first="compare",
            repeats=1 if live else repeats,
        )
        # fp32 against bf16
        for figure, tolerance in (("loss", 0.005), ("gradient", 0.03)):
            check_equal(what, calls, figure, tolerance, "compare")
        plain = median(calls["Plain.step"][1:]) / steps
        ours = median(calls["Ours.step"][1:]) / steps
        row = Row(
            f"AdaDistill training step, B={batch}, {what}", "ms", 1e3 * plain, 1e3 * ours, floor
        )
        if not live:
            limit = 1e3 * median(calls["Ours.limit"][1:]) / steps
            row = row._replace(limit=limit, allowed=1.1)
        rows.append(row)
        best = calls["Ours.matrix_rate"][-1]["teraflops"]
        say_rates("plain, live teacher", batch, True, plain, best, calls["Plain.step"])
        say_rates(f"ours, {what}", batch, live, ours, best, calls["Ours.step"])
    return say(rows)


def say_rates(
    what: str, batch: int, live: bool, seconds: float, best: float, calls: list[dict]
) -> None:
    """What ``seconds`` a step mean; best: TFLOP/s of a bf16 matrix product."""
    rate = training.gigaflops(batch, live) / seconds / 1e3
    waiting = calls[-1]["waiting"]
    print(
        f"  {what}: {batch / seconds:,.0f} images/s, {rate:.2f} TFLOP/s in the networks = "
        f"{100 * rate / best:.1f} % of the bf16 matrix rate ({best:.1f}), "
        f"{100 * waiting:.1f} % of the time waiting for data, {memory(calls)}",
        flush=True,
    )


def memory(calls: list[dict]) -> str:
    on_device = max(call["peak"] for call in calls)
    if on_device:
        return f"peak {on_device / 1e9:.2f} GB of GPU memory"
    beyond = max(call["bytes"] for call in calls)
    return f"peak {beyond / 1e9:.2f} GB beyond what is there before the first step"


def evaluation_rows(folder: Path, device: str, arguments) -> list[Row]:
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
    return statistics.median(call["seconds"] for call in calls)


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
