"""The log of a run: training.log and the console, metrics.jsonl and TensorBoard."""

import errno
import fcntl
import json
import logging
import sys
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from utils.distributed import is_main
from utils.errors import InputError
from utils.files import dumps, printable, replacing, utf8_path

# Of the benchmarks in TensorBoard.
BOARD_NAMES = {"ijb": "IJB", "tinyface": "TinyFace"}
# Their figures that training.log shows.
SHOWN = ("tpr_at_fpr_0.0001", "tpr_at_fpr_1e-05", "top1", "rank-1")


def start_log(output: str | Path, append: bool) -> None:
    """Send the root logger of rank 0 to the console and <output>/training.log.

    Other ranks show warnings only. training.log stays locked while the process lives. Raises
    InputError if another process holds it: two runs would overwrite each other.
    """
    root = logging.getLogger()
    root.handlers.clear()
    handlers = [logging.StreamHandler(sys.stdout)]
    if is_main():
        file = logging.FileHandler(
            Path(output) / "training.log", mode="a", encoding="utf-8", errors="backslashreplace"
        )
        try:
            fcntl.lockf(file.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise InputError(
                    f"output: {output} is on a file system without locks "
                    f"({error.strerror}); choose a folder on another one with output="
                ) from error
            raise InputError(
                f"output: another process is training into {output}; wait for it, end "
                "it, or choose another folder with output="
            ) from error
        if not append:
            file.stream.truncate(0)
        handlers.append(file)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("Training: %(asctime)s-%(message)s"))
        root.addHandler(handler)
    root.setLevel(logging.INFO if is_main() else logging.WARNING)


class RunLog:
    """Writes the figures of a run on rank 0; on the other ranks every call does nothing."""

    def __init__(self, output: str | Path, total_steps: int, resumed_step: int):
        self.path = Path(output) / "metrics.jsonl"
        self.total_steps = total_steps
        self.active = is_main()
        self.started = time.monotonic()
        self.first_step = resumed_step
        if self.active:
            if resumed_step:
                keep_rows_until(self.path, resumed_step)
            else:
                # what a run left that ended before its first checkpoint
                for old in (self.path, *Path(output).glob("tb/events.out.tfevents.*")):
                    old.unlink(missing_ok=True)
            folder = Path(output) / "tb"
            folder.mkdir(exist_ok=True)
            self.board = SummaryWriter(
                utf8_path(folder),
                purge_step=resumed_step + 1 if resumed_step else None,
            )

    def train(
        self,
        step: int,
        epoch: int,
        loss: float,
        lr: float,
        samples_per_sec: float,
        data_wait: float,
        memory: float,
        stats: dict,
    ) -> None:
        """One line, one JSON row and TensorBoard scalars.

        samples_per_sec: of all ranks; data_wait: the share of the time spent waiting for images;
        memory: rank 0's peak on its GPU since the last line, in GB, 0 without a GPU.
        """
        if not self.active:
            return
        seconds_per_step = (time.monotonic() - self.started) / max(step - self.first_step, 1)
        hours = seconds_per_step * (self.total_steps - step) / 3600
        named = f"Memory: {memory:.2f} GB   " if memory else ""
        named += "".join(f"{name}: {value:.4f}   " for name, value in stats.items())
        logging.info(
            "Speed %.1f samples/sec   Loss %.4f   LearningRate %.6f   Data: %.0f%%   "
            "%sEpoch: %d   Global Step: %d   Required: %.0f hours",
            samples_per_sec,
            loss,
            lr,
            100 * data_wait,
            named,
            epoch,
            step,
            hours,
        )
        figures = dict(samples_per_sec=samples_per_sec, data_wait=data_wait)
        if memory:
            figures["memory_gb"] = memory
        figures |= stats
        self.write(dict(step=step, epoch=epoch, loss=loss, lr=lr, **figures))
        # the last two as AdaDistill names them: people's notebooks look for these tags
        shown = dict(loss=loss, learning_rate=lr, **figures)
        shown |= dict(speed_samples_per_sec=samples_per_sec, epoch=epoch)
        for name, value in shown.items():
            self.board.add_scalar(f"train/{name}", value, step)

    def validation(self, step: int, epoch: int, results: dict, highest: dict) -> None:
        """Log a verification.

        results: {set: {"Accuracy-Flip", "Accuracy-Std", "XNorm"}}; highest: {set: best accuracy}.
        """
        if not self.active:
            return
        rows = {}
        for name, figures in results.items():
            accuracy, deviation = figures["Accuracy-Flip"], figures["Accuracy-Std"]
            logging.info("[%s][%d]XNorm: %f", name, step, figures["XNorm"])
            logging.info("[%s][%d]Accuracy-Flip: %.5f+-%.5f", name, step, accuracy, deviation)
            logging.info("[%s][%d]Accuracy-Highest: %.5f", name, step, highest[name])
            tag = f"val/{printable(name)}"
            self.board.add_scalar(f"{tag}/Accuracy_Flip", accuracy, step)
            self.board.add_scalar(f"{tag}/Accuracy_Highest", highest[name], step)
            self.board.add_scalar(f"{tag}/XNorm", figures["XNorm"], step)
            rows[name] = figures | {"Accuracy-Highest": highest[name]}
        self.write(dict(step=step, epoch=epoch, validation=rows))

    def benchmarks(self, step: int, epoch: int, results: dict) -> None:
        """results: {"ijb": {set: figures}, "tinyface": {set: figures}}.

        The figures of a 1:N search are a dict of their own.
        """
        if not self.active:
            return
        for kind, sets in results.items():
            for name, figures in sets.items():
                for key, value in flat(figures):
                    tag = f"{BOARD_NAMES[kind]}/{printable(name)}/{key}"
                    self.board.add_scalar(tag, value, step)
                    if key.endswith(SHOWN):
                        logging.info("[%s][%d]%s: %.5f", name, step, key, value)
        self.write(dict(step=step, epoch=epoch, **results))

    def has_benchmarks(self, step: int) -> bool:
        """Whether IJB's and TinyFace's figures at this step were logged, also before a resume."""
        rows = map(json.loads, self.path.read_text().splitlines()) if self.path.exists() else ()
        return any(row["step"] == step and row.keys() & BOARD_NAMES.keys() for row in rows)

    def write(self, row: dict) -> None:
        with open(self.path, "a") as file:
            file.write(dumps(row) + "\n")

    def close(self) -> None:
        if self.active:
            self.board.close()


def flat(figures: dict):
    """(key, value) of all figures, those of inner dicts as ``1N_G1/top1``."""
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{inner}", figure) for inner, figure in value.items())
        else:
            yield key, value


def keep_rows_until(path: Path, step: int) -> None:
    """Drop rows after ``step``, which a resumed run writes again, and a last line cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] <= step:
            kept.append(line + "\n")
    with replacing(path) as file:
        file.write("".join(kept).encode())
