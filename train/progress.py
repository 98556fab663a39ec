"""What a run says of itself between two log lines: means, speed, waiting, memory; and the bar."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

from train.run_state import Position
from utils import distributed
from utils.run.log import RunLog


class Progress:
    """Collects the figures of steps and writes them every ``log_every`` steps."""

    def __init__(self, cfg, device: torch.device, feed, total_steps: int, step: int):
        self.log_every = cfg.log_every
        self.device = device
        self.feed = feed
        self.log = RunLog(cfg.output, total_steps, step)
        self.bar = tqdm(
            total=total_steps,
            initial=step,
            # None: no bar where no terminal watches
            disable=None if distributed.is_main() else True,
            unit="step",
            dynamic_ncols=True,
        )
        self.start_window()

    def start_window(self) -> None:
        """Begin the figures of the next log line."""
        self.started = time.monotonic()
        self.steps = 0
        self.feed.waited = 0.0
        self.sums = {}

    def add(self, loss: torch.Tensor, stats: dict) -> None:
        """Add a step's figures, which stay on the device."""
        self.bar.update()
        self.steps += 1
        for name, value in dict(stats, loss=loss).items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()

    def is_due(self, step: int, epoch_ended: bool) -> bool:
        return epoch_ended or step == 1 or step % self.log_every == 0

    def write(self, position: Position, epoch: int, lr: float) -> None:
        """Write the means since the last line. Only here the device is waited for."""
        means = {name: float(value) / self.steps for name, value in self.sums.items()}
        seconds = time.monotonic() - self.started
        self.log.train(
            position.step,
            epoch,
            means.pop("loss"),
            lr,
            self.steps * self.feed.step_samples / seconds,
            self.feed.waited / seconds,
            self.memory(),
            means,
        )
        self.feed.damaged.share()
        self.start_window()

    def memory(self) -> float:
        """The most GB that this rank's GPU has held since the last call.

        0 without one, and on MPS, which keeps no such count.
        """
        if self.device.type != "cuda":
            return 0.0
        peak = torch.cuda.max_memory_allocated(self.device) / 1e9
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block, of validation and saving, is no part of the training speed."""
        began = time.monotonic()
        yield
        self.started += time.monotonic() - began

    def close(self) -> None:
        self.bar.close()
        self.log.close()
