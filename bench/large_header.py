"""A header of a million classes on two gloo ranks: memory of each rank, seconds a step.

    ./bench/large_header.sh            a few minutes, 6 GB

No network is around it. For each kind of centres: what a rank holds (its share of the centres and
of their momentum), the (B, C_local * rate) logits of one step, and the peak beyond what the process
had before the header was built, which must stay below share + momentum + 2.5 logits; then seconds
for a step, and peak and seconds of writing all shares to disk.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.processes import resident, return_memory, start_peak
from utils import distributed
from utils.losses import build_header
from utils.run.header_shards import save_header

CLASSES, SIZE, BATCH, STEPS = 1_000_000, 512, 64, 3
COLUMNS = ("held", "logits", "peak", "allowed", "s/step", "peak, save", "s, save")
KINDS = [
    ("standalone", 0.1, torch.float32),
    ("standalone", 0.1, torch.bfloat16),
    ("standalone", 1.0, torch.float32),
    ("AdaDistill", 0.1, torch.float32),
    ("AdaDistill", 0.1, torch.bfloat16),
    ("AdaDistill", 1.0, torch.float32),
]


def main() -> None:
    distributed.init("cpu")
    # libraries start before anything is measured
    build_and_move(*KINDS[0], classes=10_000)
    build_and_move(*KINDS[3], classes=10_000)
    say(line(f"GB of rank 0, {distributed.world_size()} ranks", COLUMNS))
    for method, rate, dtype in KINDS:
        figures = build_and_move(method, rate, dtype)
        what = f"{method}, rate {rate:g}, {str(dtype).removeprefix('torch.')}"
        say(line(what, [f"{figure:.3f}" for figure in figures]))
    distributed.shutdown()


def build_and_move(
    method: str, rate: float, dtype: torch.dtype, classes: int = CLASSES
) -> list[float]:
    """The figures of COLUMNS."""
    return_memory()
    before = resident("VmRSS")
    start_peak()
    torch.manual_seed(0)
    header = build_header(method, "ArcFace", SIZE, classes, sample_rate=rate, centers_dtype=dtype)
    header.centers.defer = True
    generator = torch.Generator().manual_seed(distributed.rank())
    labels = torch.randint(classes, (BATCH,), generator=generator)
    features = torch.randn(BATCH, SIZE)
    for _ in range(STEPS):
        started = time.perf_counter()
        f = features.clone().requires_grad_()
        header(f, labels, features)[0].backward()
        if header.centers.learned:
            header.centers.step(0.1, 0.9, 5e-4)
        distributed.barrier()
        seconds = time.perf_counter() - started
    peak = resident("VmHWM") - before
    weight = header.centers.weight
    share = weight.numel() * weight.element_size()
    # learned centres have a momentum
    held = 2 * share if header.centers.learned else share
    logits = 4 * distributed.world_size() * BATCH * rate * len(weight)
    start_peak()
    seconds_saving = save(header)
    peak_saving = resident("VmHWM") - before
    gigabytes = [held / 1e9, logits / 1e9, peak / 1e9, (held + 2.5 * logits) / 1e9]
    return [*gigabytes, seconds, peak_saving / 1e9, seconds_saving]


def save(header) -> float:
    folder = Path(distributed.main_computes(lambda: tempfile.mkdtemp(prefix="header")))
    started = time.perf_counter()
    save_header(folder, header)
    distributed.barrier()
    seconds = time.perf_counter() - started
    if distributed.is_main():
        shutil.rmtree(folder)
    return seconds


def line(what: str, cells: Sequence[str]) -> str:
    return f"{what:34}" + "".join(f"{cell:>11}" for cell in cells)


def say(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)


if __name__ == "__main__":
    main()
