"""What every training script does first: ranks, device, output folder, log, where to resume."""

import logging
import os
import signal
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import cv2
import torch

from utils import distributed
from utils.dataset.workers import STOP_SIGNALS
from utils.errors import InputError
from utils.files import read_json, write_json
from utils.precision import choose_precision
from utils.run.folder import RunFolder
from utils.run.log import start_log

# How often, and after how long, ranks that see different files in the shared folder look again.
RETRIES = 12
RETRY_SECONDS = 5


class Run(NamedTuple):
    """Where and how this process trains."""

    device: torch.device
    # "fp32", "bf16" or "fp16": "auto" is resolved
    precision: str
    folder: RunFolder
    # 0: from the start
    resume_step: int


@contextmanager
def start(cfg, resume: bool):
    """Join the ranks, take the device, prepare ``cfg.output``, start the log, seed the weights.

    At the end, leave the ranks.
    """
    # images of 112x112 are too small to share out among threads
    cv2.setNumThreads(0)
    patience = distributed.PATIENCE
    if cfg.timeout:
        patience = max(distributed.TIMEOUT, timedelta(minutes=cfg.timeout + 5))
    device = distributed.init(cfg.device, patience)
    check_device(cfg, device)
    precision = choose_precision(cfg.precision, device)
    folder = RunFolder(cfg.output)
    resume_step, passed_over = where_to_resume(folder, cfg.global_step, resume)
    if distributed.is_main():
        folder.prepare()
    distributed.barrier()
    start_log(cfg.output, append=resume_step > 0)
    if distributed.is_main():
        folder.sweep()
    logging.info(
        "%d process%s on %s, %s, output %s%s",
        distributed.world_size(),
        "es" if distributed.world_size() > 1 else "",
        device,
        precision,
        cfg.output,
        launch_name(),
    )
    # scripts of people who come from AdaDistill look for this line
    logging.info("rank_id: %d", distributed.rank())
    for step, damage in passed_over:
        logging.warning("step %d cannot be resumed from: %s; taking the one before", step, damage)
    torch.manual_seed(cfg.seed)
    yield Run(device, precision, folder, resume_step)
    # not after an error: closing the connections would end the other ranks before this one says why
    distributed.shutdown()


def check_device(cfg, device: torch.device) -> None:
    """Raises InputError if ``device`` cannot do what the configuration asks of a CUDA GPU."""
    for key, elsewhere in (("cuda_graphs", False), ("header_precision", "fp32")):
        if cfg[key] != elsewhere and device.type != "cuda":
            raise InputError(
                f"{key}={cfg[key]} needs a CUDA GPU, but this run is on {device}: "
                f"set {key}={elsewhere}"
            )
    if cfg.header_precision == "tf32" and not torch.cuda.is_tf32_supported():
        name = torch.cuda.get_device_name(device)
        raise InputError(
            f"header_precision=tf32: {name} does not multiply in tf32; set header_precision=fp32"
        )


def where_to_resume(
    folder: RunFolder, global_step: int, resume: bool
) -> tuple[int, list[tuple[int, str]]]:
    """(step to go on from, [(newer step that cannot be read, what is wrong)]); 0: a fresh start.

    Processes that torchrun has restarted take the newest state of their own run. A step that is
    named may have weights alone. A collective.
    Raises InputError if a state was asked for and is not there, or if a fresh start would overwrite
    another run's checkpoints.
    """
    steps = agreed_steps(folder)
    # a machine that came back starts anew, the others restart: one that was restarted decides
    restarted = any(distributed.all_gather_object(was_restarted(folder.path / "training.log")))
    # states before global_step are of another run: this one has gone on from weights
    if restarted and steps and steps[-1] >= global_step:
        return newest_sound(folder, steps)
    if global_step:
        check_weights(folder, global_step, steps)
        return global_step, []
    if restarted:
        return 0, []
    if resume and not steps:
        raise InputError(
            "--resume: no complete state (<step>backbone.pth, <step>header.pth, "
            f"<step>state.pth) in {folder.path}; start without --resume, or go on from weights "
            "alone with global_step="
        )
    if resume:
        return newest_sound(folder, steps)
    if folder.steps("backbone"):
        raise InputError(
            f"output: {folder.path} already holds checkpoints of a run; go on with "
            "--resume or choose another folder with output="
        )
    return 0, []


def check_weights(folder: RunFolder, step: int, complete: list[int]) -> None:
    """Raises InputError if there are no weights of a step. A collective; rank 0 looks."""
    weights = folder.file(step, "backbone")
    if step not in complete and not distributed.main_computes(weights.is_file):
        raise InputError(
            f"global_step={step}: no complete state and no {weights.name} in {folder.path} "
            f"(complete: {', '.join(map(str, complete)) or 'none'})"
        )


def agreed_steps(folder: RunFolder) -> list[int]:
    """The complete steps in the folder, as all ranks see them.

    A network file system may show a machine what it looked like half a minute ago. Raises
    InputError if the ranks go on seeing different ones: it is not one folder.
    """
    for _ in range(1 + RETRIES):
        steps = folder.complete_steps()
        of_ranks = distributed.all_gather_object(steps)
        if all(other == steps for other in of_ranks):
            return steps
        time.sleep(RETRY_SECONDS)
    states = "; ".join(", ".join(map(str, steps)) or "none" for steps in of_ranks)
    raise InputError(
        f"output: the ranks find different states in {folder.path} ({states}): "
        "all machines must see one shared folder"
    )


def newest_sound(folder: RunFolder, steps: list[int]) -> tuple[int, list[tuple[int, str]]]:
    """The newest of these steps whose files can be read to the end, and the damage of newer ones.

    Rank 0 reads them. Raises InputError if there is none.
    """

    def find():
        passed_over = []
        for step in reversed(steps):
            damage = folder.damage(step)
            if not damage:
                return step, passed_over
            passed_over.append((step, damage))
        raise InputError(
            f"resume: no state in {folder.path} can be read (tried: "
            f"{', '.join(map(str, steps))}); the first of them: {passed_over[-1][1]}"
        )

    return distributed.main_computes(find)


def launch_name() -> str:
    """A name that torchrun's processes keep over restarts; "" without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f", launch {name}" if name else ""


def was_restarted(log: Path) -> bool:
    """Whether the run in the folder is of this launch, and this process so not the first.

    One that was refused must not resume another's when it is restarted. torchrun counts no restart
    where machines only join again, so where restarts are allowed the launch's own name (RDZV_ID)
    is enough.
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not restarts:
        most = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        if not most or os.environ["TORCHELASTIC_RUN_ID"] == "none":
            return False
    return log.is_file() and f"{launch_name()}\n" in log.read_text("utf-8", "replace")


def write_config(cfg, method: str, resume_step: int) -> None:
    """Write config.json; when resuming, say what has changed since the run was started.

    method: stands beside the configuration, which is the same for several of them.
    """
    path = Path(cfg.output) / "config.json"
    if resume_step and path.exists():
        before = read_json(path, "a dict of configuration values")
        for key, value in cfg.items():
            if key in before and before[key] != value and key != "global_step":
                logging.warning(
                    "resumed with another %s: %r instead of %r", key, value, before[key]
                )
        unknown = [f"{key}={value!r}" for key, value in cfg.items() if key not in before]
        if unknown:
            logging.info("begun by an earlier version, which had no %s", ", ".join(unknown))
    write_json(path, dict(cfg) | {"method": method})


class StopRequest:
    """SIGTERM, SIGUSR1 or Ctrl-C asks a run to finish its step and save; all ranks agree on it.

    A second Ctrl-C ends it at once.
    The ranks' flags are summed on the hosts while the next step computes, so the agreement costs no
    waiting and comes one step later.
    """

    def __init__(self):
        self.received = False
        self.sum = None
        self.pending = None
        for number in STOP_SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, number, frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True

    def agreed(self) -> bool:
        """True once any rank was asked to stop; called by all ranks after every step."""
        if distributed.world_size() == 1:
            return self.received
        before = False
        if self.pending is not None:
            self.pending.wait()
            before = bool(self.sum.item())
        self.sum = torch.tensor([float(self.received)])
        self.pending = distributed.all_reduce_async(self.sum)
        return before
