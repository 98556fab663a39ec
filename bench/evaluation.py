"""Evaluation protocols on given features: ours against straightforward loops.

    python bench/evaluation.py             # an eighth of the images and pairs: a minute or two
    python bench/evaluation.py --full      # all of them: about eight minutes and 5 GB
    python bench/evaluation.py --limits    # only ours, full size, beside time and memory limits

The data are made up, with the shapes of IJB-C, TinyFace and LFW. The loops do what published
evaluators do: search all images for those of each template, average media by media, fetch two rows
for each pair, sort the whole gallery for each probe, try every threshold on every fold. Intervals
come from 1,000 draws of people; the loop does a few of them, a weighted ROC of all pairs each, and
its seconds are those of all. Both must give the same figures, else this ends with an error. Both
run in this process, in turns; short ones several times, of which the median counts. Memory is the
process's peak, inputs included.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import plain_evaluation as plain
from bench.made_up_faces import (
    DIMENSIONS,
    IJBC,
    PAIRS,
    make_ijb,
    make_pairs_of_faces,
    make_tinyface,
)
from bench.processes import resident, start_peak
from eval import ijb, tinyface, verification
from eval.bootstrap import NOBODY, PairPeople, draw_people
from eval.roc import FPRS
from eval.uncertainty import make_pairs, measure_errors
from utils.command_line import command_parser
from utils.errors import InputError, run
from utils.files import write_json

# of people: those of ours, and those that the loop does
DRAWS, PLAIN_DRAWS = 1_000, 2
# repeat until one of both is reached: times, seconds
ROUNDS, ENOUGH = 7, 5.0


class Work(NamedTuple):
    name: str
    plain: Callable[[], dict]
    ours: Callable[[], dict]
    # limits of ours at full size, on 2 CPU cores
    seconds: float
    gigabytes: float | None = None
    # how much of the work the plain way does
    plain_share: float = 1


def main() -> None:
    arguments = parse_arguments()
    scale = 1 if arguments.full or arguments.limits else 8
    size = "full size" if scale == 1 else f"1/{scale} of the images and pairs"
    print(f"{size}; seconds, and peak memory of the process in GB")
    print(header(arguments.limits), flush=True)
    rows = []
    for row in measure_all(scale, measure_ours if arguments.limits else measure_both):
        rows.append(row)
        print(line(row), flush=True)
    if arguments.json:
        write_json(arguments.json, {"scale": scale, "rows": rows})


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="full sizes")
    size.add_argument(
        "--limits", action="store_true", help="only ours, full sizes, beside the limits"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser.parse_args()


# --- measuring


def measure_all(scale: int, measure: Callable[[Work], dict]) -> Iterator[dict]:
    """A row for each protocol, one after the other, so that memory holds the data of one."""
    yield from measure_ijb(scale, measure)
    yield measure_tinyface(scale, measure)
    yield measure_pairs(measure)
    yield measure_pair_intervals(measure)
    yield measure_ijb_intervals(scale, measure)


def measure_ijb(scale: int, measure: Callable[[Work], dict]) -> Iterator[dict]:
    images, pairs, searches = make_ijb(scale)
    yield measure(
        Work(
            "IJB-C 1:1, three variants",
            plain=lambda: plain.ijb_1to1(*images, *pairs),
            ours=lambda: ijb.evaluate(*images, *pairs),
            seconds=45,
            gigabytes=6,
        )
    )
    yield measure(
        Work(
            "IJB-C 1:N, two galleries",
            plain=lambda: join(plain.ijb_1ton(*images, *search) for search in searches),
            ours=lambda: join(ijb.evaluate_1n(*images, *search) for search in searches),
            seconds=10,
        )
    )


def measure_tinyface(scale: int, measure: Callable[[Work], dict]) -> dict:
    faces = make_tinyface(scale)
    return measure(
        Work(
            "TinyFace",
            plain=lambda: plain.tinyface(*faces),
            ours=lambda: tinyface.evaluate(*faces),
            seconds=15,
        )
    )


def measure_pairs(measure: Callable[[Work], dict]) -> dict:
    embeddings, issame = make_pairs_of_faces()

    def ours() -> dict:
        _, _, accuracy, val, *_ = verification.evaluate(embeddings, issame)
        return {"accuracy": accuracy, "val": val}

    return measure(
        Work(
            "pair set, ten folds",
            plain=lambda: plain.verification(embeddings, issame),
            ours=ours,
            seconds=0.1,
        )
    )


def measure_pair_intervals(measure: Callable[[Work], dict]) -> dict:
    """Accuracy, EER and FNMR at six FMRs, of people with one image in most pairs."""
    embeddings, issame = make_pairs_of_faces()
    person = np.arange(2 * PAIRS)
    second = np.where(issame, NOBODY, person[1::2])
    people = PairPeople(person[0::2], second, draw_people(2 * PAIRS, DRAWS))
    scores = np.einsum("nd,nd->n", embeddings[0::2], embeddings[1::2])

    def ours() -> dict:
        verification.sample_accuracy(embeddings, issame, people)
        return name_draws([measure_errors(scores, make_pairs(issame, people, 1)).samples])

    return measure(
        Work(
            "pair set, intervals",
            plain=lambda: plain.intervals([scores], issame, *few_draws(people)),
            ours=ours,
            seconds=2,
            plain_share=PLAIN_DRAWS / DRAWS,
        )
    )


def measure_ijb_intervals(scale: int, measure: Callable[[Work], dict]) -> dict:
    """Three variants; the loop does the first one."""
    rng = np.random.default_rng(3)
    size = {name: number // scale for name, number in IJBC.items()}
    pairs, people = size["genuine"] + size["impostor"], size["people"]
    same = np.zeros(pairs, bool)
    same[rng.permutation(pairs)[: size["genuine"]]] = True
    first = rng.integers(0, people, pairs, dtype=np.int32)
    second = (first + rng.integers(1, people, pairs, dtype=np.int32)) % people
    of_pairs = PairPeople(first, np.where(same, NOBODY, second), draw_people(people, DRAWS))
    variants = [
        (rng.standard_normal(pairs, np.float32) / 10 + 0.5 * same).astype(np.float32)
        for _ in range(3)
    ]

    def ours() -> dict:
        made = make_pairs(same, of_pairs, 1)
        return name_draws([measure_errors(scores, made).samples for scores in variants][:1])

    return measure(
        Work(
            "IJB-C 1:1, intervals",
            plain=lambda: plain.intervals(variants[:1], same, *few_draws(of_pairs)),
            ours=ours,
            seconds=60,
            gigabytes=6,
            plain_share=PLAIN_DRAWS / DRAWS / len(variants),
        )
    )


def few_draws(people: PairPeople) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return people.first, people.second, people.counts[:, :PLAIN_DRAWS]


def name_draws(samples: list[dict]) -> dict:
    return {
        f"variant {variant} fnmr_at_fmr_{fmr:g}": of_variant[f"fnmr_at_fmr_{fmr:g}"][:PLAIN_DRAWS]
        for variant, of_variant in enumerate(samples)
        for fmr in FPRS
    }


def measure_both(work: Work) -> dict:
    plain_calls, our_calls = in_turns(work.plain, work.ours)
    check_equal(work.name, plain_calls[-1].result, our_calls[-1].result)
    plain_seconds, our_seconds = median(plain_calls) / work.plain_share, median(our_calls)
    return {
        "what": work.name,
        "plain": plain_seconds,
        "ours": our_seconds,
        "ratio": plain_seconds / our_seconds,
        "plain_peak": max(call.peak for call in plain_calls),
        "ours_peak": max(call.peak for call in our_calls),
    }


def measure_ours(work: Work) -> dict:
    (calls,) = in_turns(work.ours)
    return {
        "what": work.name,
        "ours": median(calls),
        "limit": work.seconds,
        "ours_peak": max(call.peak for call in calls),
        "limit_peak": work.gigabytes,
    }


class Call(NamedTuple):
    seconds: float
    # of resident memory, in GB
    peak: float
    result: dict


def in_turns(*functions: Callable[[], dict]) -> list[list[Call]]:
    """The calls of each function, at least one."""
    calls = [[] for _ in functions]
    spent = 0.0
    while len(calls[0]) < ROUNDS and spent < ENOUGH:
        for function, done in zip(functions, calls, strict=True):
            done.append(timed(function))
            spent += done[-1].seconds
    return calls


def timed(function: Callable[[], dict]) -> Call:
    start_peak()
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    return Call(seconds, resident("VmHWM") / 1e9, result)


def median(calls: list[Call]) -> float:
    return statistics.median(call.seconds for call in calls)


def check_equal(name: str, by_loops: dict, by_ours: dict) -> None:
    """Raises InputError if the figures differ.

    The loops work in float64, ours in float32: scores that differ by less than that can change
    places, so a rate may differ by 1 in 5,000.
    """
    for key in by_loops.keys() | by_ours.keys():
        plain_figure, our_figure = by_loops[key], by_ours[key]
        if not np.allclose(plain_figure, our_figure, rtol=2e-4, atol=1e-6):
            raise InputError(f"{name}: {key} is {plain_figure} by the loops, {our_figure} by ours")


def header(limits: bool) -> str:
    columns = ("plain", "ours", "ratio", "peak plain", "peak ours")
    if limits:
        columns = ("ours", "limit", "peak", "limit")
    return f"{'':28}" + "".join(f"{column:>12}" for column in columns)


def line(row: dict) -> str:
    what, *values = row.values()
    return f"{what:28}" + "".join(f"{cell(value):>12}" for value in values)


def cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def three_passes(scale: int) -> float:
    """Seconds to fetch the two rows of every pair three times, at the speed at which this machine
    copies memory.
    """
    block = np.ones(1 << 26, np.float32)
    target = np.empty_like(block)
    copies = []
    for _ in range(5):
        start = time.perf_counter()
        torch.from_numpy(target).copy_(torch.from_numpy(block))
        copies.append(time.perf_counter() - start)
    bytes_a_second = 2 * block.nbytes / statistics.median(copies)
    pairs = 3 * (IJBC["genuine"] + IJBC["impostor"]) // scale
    return pairs * 2 * DIMENSIONS * 4 / bytes_a_second


def join(results: Iterator[dict]) -> dict:
    return {
        f"{number} {key}": value
        for number, result in enumerate(results, 1)
        for key, value in result.items()
    }


if __name__ == "__main__":
    run(main)
