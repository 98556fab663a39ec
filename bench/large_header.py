"""A header of a million classes on two gloo ranks: memory of each rank, and seconds a step, without
a network around it.

    ./bench/large_header.sh            a few minutes, 6 GB

For each kind of centres: what a rank holds (its share of the centres and of their momentum), the
(B, C_local * rate) logits of one step, and the peak beyond what the process had before the header
was built, which must stay below share + momentum + 2.5 logits; then seconds for a step and for
writing all shares to disk.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.processes import resident, return_memory, start_peak
from utils import distributed
from utils.losses import build_header
from utils.run.header_shards import save_header

CLASSES, SIZE, BATCH, STEPS = 1_000_000, 512, 64, 3
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
    build_and_move(*KINDS[0], classes=10_000)  # libraries start before anything is measured
    build_and_move(*KINDS[3], classes=10_000)
    say(
        f"{'GB of rank 0, ' + str(distributed.world_size()) + ' ranks':34}"
        + "".join(
            f"{word:>11}"
            for word in ("held", "logits", "peak", "allowed", "s/step", "peak, save", "s, save")
        )
    )
    for method, rate, dtype in KINDS:
        say(build_and_move(method, rate, dtype))
    distributed.shutdown()


def build_and_move(method: str, rate: float, dtype: torch.dtype, classes: int = CLASSES) -> str:
    return_memory()
    before = resident("VmRSS")
    start_peak()
    torch.manual_seed(0)
    header = build_header(method, "ArcFace", SIZE, classes, sample_rate=rate, centers_dtype=dtype)
    header.centers.defer = True
    labels = torch.randint(
        classes, (BATCH,), generator=torch.Generator().manual_seed(distributed.rank())
    )
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
    shard = header.centers.weight.numel() * header.centers.weight.element_size()
    held, logits = (
        shard * (2 if header.centers.learned else 1),
        4 * distributed.world_size() * BATCH * rate * len(header.centers.weight),
    )
    start_peak()
    saving = save(header)
    saved = resident("VmHWM") - before
    return f"{method + f', rate {rate:g}, ' + str(dtype).removeprefix('torch.'):34}" + "".join(
        f"{value:11.3f}"
        for value in (
            held / 1e9,
            logits / 1e9,
            peak / 1e9,
            (held + 2.5 * logits) / 1e9,
            seconds,
            saved / 1e9,
            saving,
        )
    )


def save(header) -> float:
    folder = Path(distributed.main_computes(lambda: tempfile.mkdtemp(prefix="header")))
    started = time.perf_counter()
    save_header(folder, header)
    distributed.barrier()
    seconds = time.perf_counter() - started
    if distributed.is_main():
        shutil.rmtree(folder)
    return seconds


def say(line: str) -> None:
    if distributed.is_main():
        print(line, flush=True)


if __name__ == "__main__":
    main()
