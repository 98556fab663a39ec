"""How much faster this is than the plain way (bench/plain.py), as ratios measured in one run: both
ways in turns, medians, the same figures from both.

    ./bench/run.sh                   on CPU cores, a few minutes
    ./bench/run.sh --cuda            on a GPU: training with 512 images a step
    ./bench/run.sh --only header     one part: data, header, training or evaluation
    ./bench/run.sh --full            evaluation at the full sizes of IJB-C and TinyFace

It ends with a table. "floor": what the ratio is meant to reach; "limit": time or memory of what no
way can do without; "allowed": how many times that ours may take.
"""

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import data_path, evaluation, header, training
from bench.processes import Process, run_tool
from utils.errors import InputError, run
from utils.files import replacing

CPU_HAS_BF16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


class Row(NamedTuple):
    """plain and ours in ``unit``; floor: smallest ratio of them, None: none is set; limit in
    ``unit``, and how many times it ours may be.
    """

    what: str
    unit: str
    plain: float
    ours: float
    floor: float | None = None
    limit: float | None = None
    allowed: float | None = None


def main() -> None:
    arguments = parse_arguments()
    device = "cuda" if arguments.cuda else "cpu"
    if arguments.cuda and not torch.cuda.is_available():
        raise InputError("--cuda: PyTorch sees no GPU here")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for rows_of, words in (
            (data_rows, "data path"),
            (header_rows, "header"),
            (training_rows, "training"),
            (evaluation_rows, "evaluation"),
        ):
            if arguments.only in words:
                rows += rows_of(Path(folder), device, arguments)
    print("\n" + table(rows))
    if arguments.json:
        with replacing(str(arguments.json), "w") as file:
            file.write(json.dumps([row._asdict() for row in rows], indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--cuda", action="store_true", help="measure on the GPU")
    parser.add_argument(
        "--only", default="", choices=("data", "header", "training", "evaluation"), help="one part"
    )
    parser.add_argument(
        "--full", action="store_true", help="evaluation at full size: seven minutes more"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    return parser.parse_args()


# --- the rows
# --------------------------------------------------


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
            plain, ours, *limit = (1e6 * median(found) / images for found in calls.values())
            rows.append(
                Row(
                    f"data path, one core, {what}{', decoded before' if decoded else ''}",
                    "us/image",
                    plain,
                    ours,
                    8,
                    *limit,
                    *([1 / 0.7] if limit else []),
                )
            )
    return say(rows)


def header_rows(folder: Path, device: str, arguments) -> list[Row]:
    rows = []
    for method, floor in (("AdaDistill", 6), ("standalone", 2.5)):
        adaptive = method == "AdaDistill"
        calls = in_turns(
            "bench.header", dict(method=method, device=device), rounds=7, limit=adaptive
        )
        for figure in ("loss", "gradient"):
            check_equal(f"{method} header", calls, figure, 1e-4)
        limit = (1e3 * median(calls["Ours.limit"]), 1.4) if adaptive else ()
        rows.append(
            Row(
                f"{method} header step, B={header.B}, C={header.C:,}",
                "ms",
                *(1e3 * median(calls[way]) for way in ("Plain.step", "Ours.step")),
                floor,
                *limit,
            )
        )
        if adaptive:
            peak = [calls[way][0]["bytes"] / 1e6 for way in ("Plain.step", "Ours.step")]
            rows.append(
                Row(
                    "the same: peak memory beyond the centres",
                    "MB",
                    *peak,
                    3,
                    2 * 4 * header.B * header.C / 1e6,
                    1,
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
    rows, floors = [], (4, 8) if cuda else (2.5 if CPU_HAS_BF16 else 1.3, 3.5)
    for live, floor, what in (
        (True, floors[0], "live iResNet-50 teacher"),
        (False, floors[1], "cached teacher features"),
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
        for figure, tolerance in (("loss", 0.005), ("gradient", 0.03)):  # fp32 against bf16
            check_equal(what, calls, figure, tolerance, "compare")
        plain, ours = (1e3 * median(calls[way][1:]) / steps for way in ("Plain.step", "Ours.step"))
        limit = () if live else (1e3 * median(calls["Ours.limit"][1:]) / steps, 1.1)
        rows.append(
            Row(f"AdaDistill training step, B={batch}, {what}", "ms", plain, ours, floor, *limit)
        )
        for way, seconds, is_live in (("Plain", plain / 1e3, True), ("Ours", ours / 1e3, live)):
            call = calls[f"{way}.step"][-1]
            rate, best = (
                training.gigaflops(batch, is_live) / seconds / 1e3,
                calls["Ours.matrix_rate"][-1]["teraflops"],
            )
            print(
                f"  {way.lower()}, {what if way == 'Ours' else 'live teacher'}: "
                f"{batch / seconds:,.0f} images/s, {rate:.2f} TFLOP/s in the networks = "
                f"{100 * rate / best:.1f} % of the bf16 "
                f"matrix rate ({best:.1f}), {100 * call['waiting']:.1f} % of the time waiting "
                f"for data, {memory(calls[f'{way}.step'])}",
                flush=True,
            )
    return say(rows)


def memory(calls: list[dict]) -> str:
    on_device = max(call["peak"] for call in calls)
    return (
        f"peak {on_device / 1e9:.2f} GB of GPU memory"
        if on_device
        else (
            "peak "
            f"{max(call['bytes'] for call in calls) / 1e9:.2f} GB beyond what is there before the "
            "first step"
        )
    )


def evaluation_rows(folder: Path, device: str, arguments) -> list[Row]:
    """In this process: both ways are NumPy and PyTorch on the host."""
    scale = 1 if arguments.full else 8
    floors = {"pair set, ten folds": 50, "IJB-C 1:1, three variants": 12}
    rows = []
    for work in evaluation.workloads(scale):
        found = evaluation.measure_both(work)
        what = work.name + (
            f" (1/{scale})" if scale > 1 and not work.name.startswith("pair") else ""
        )
        limit = (evaluation.three_passes(scale), 2) if work.name.startswith("IJB-C 1:1") else ()
        rows += say([Row(what, "s", found["plain"], found["ours"], floors.get(work.name), *limit)])
    return rows


# --- measuring
# --------------------------------------------------


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
    """{"Plain.step": calls, "Ours.step": calls, "Ours.limit": calls}, alternating, ``rounds`` of
    each after one that warms up and is kept as the first.

    ours: options of ours alone. first: a method of both to call before; extra: one of ours to call
    at the end. repeats: how often ours and its limit are called in a round.
    """
    with ExitStack() as stack:
        ways = {
            name: stack.enter_context(
                Process(module, name, options | (ours or {} if name == "Ours" else {}))
            )
            for name in ("Plain", "Ours")
        }
        methods = [("Plain", "step"), ("Ours", "step"), *([("Ours", "limit")] if limit else [])]
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
    """Errors: InputError if the two ways do not give the same figure, call by call."""
    for plain, ours in zip(calls[f"Plain.{method}"], calls[f"Ours.{method}"], strict=True):
        if not abs(plain[figure] - ours[figure]) <= tolerance * abs(plain[figure]):
            raise InputError(
                f"{what}: {figure} is {plain[figure]} the plain way, {ours[figure]} by ours"
            )


# --- the table
# --------------------------------------------------

COLUMNS = ("plain", "ours", "ratio", "floor", "limit", "ours/limit", "allowed")


def say(rows: list[Row]) -> list[Row]:
    for row in rows:
        print(line(row), flush=True)
    return rows


def table(rows: list[Row]) -> str:
    return "\n".join(
        [f"{'':62}" + "".join(f"{column:>11}" for column in COLUMNS), *map(line, rows)]
    )


def line(row: Row) -> str:
    against = (
        [None] * 3
        if row.limit is None
        else [f"{row.limit:,.4g}", f"{row.ours / row.limit:.2f}", f"{row.allowed:.2f}"]
    )
    cells = [
        f"{row.plain:,.4g}",
        f"{row.ours:,.4g}",
        f"{row.plain / row.ours:.1f}",
        row.floor,
        *against,
    ]
    return f"{row.what + ', ' + row.unit:62}" + "".join(
        f"{'-' if cell is None else cell:>11}" for cell in cells
    )


if __name__ == "__main__":
    run(main)
