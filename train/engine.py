"""The training loop that all three methods share. It knows nothing of the method:

    loss_of(student, batch, epoch) -> (loss, stats)

is what a script hands it. student: the network of student.py, called with images; batch: an Inputs;
epoch: fractional; loss: 0-d; stats: named 0-d tensors for the log. Batches come from feed.py, the
log line from progress.py, accuracies from validation.py, and what a run needs to go on lies in
run_state.py.
"""

import logging
import math
from contextlib import nullcontext

import torch

from train.build import compiled, input_dtype, memory_format
from train.feed import Feed
from train.gradients import NO_SCALER, FiniteGuard, make_scaler
from train.progress import Progress
from train.run_state import Position, RunState
from train.schedule import learning_rate
from train.start_up import StopRequest, write_config
from train.student import Average, Student
from utils import distributed
from utils.precision import cudnn_benchmark
from utils.run.hang_watch import Watch


class Engine:
    """One training run: ``Engine(...).train()``."""

    def __init__(self, cfg, run, method, dataset, student, header, loss_of, validation):
        self.cfg = cfg
        self.run = run
        self.loss_of = loss_of
        self.validation = validation
        self.position = Position()
        self.feed = Feed(cfg, dataset, run.device, input_dtype(cfg, run))
        self.backbone = student.to(run.device, memory_format=memory_format(cfg))
        self.student = Student(self.backbone, run, compiled(self.backbone, cfg))
        self.average = Average(self.backbone, cfg.ema)
        self.weights = [p for p in self.backbone.parameters() if p.requires_grad]
        self.header = header.to(run.device)
        # their step() below needs no gradient as large as the centres
        self.header.centers.defer = True
        self.optimizer = torch.optim.SGD(
            self.weights,
            lr=cfg.lr,
            momentum=cfg.momentum,
            weight_decay=cfg.weight_decay,
            # fp16's scaler may skip the first step: a fused optimizer would then keep
            # uninitialised momentum
            fused=run.precision != "fp16" and run.device.type in ("cpu", "cuda"),
        )
        self.lr = cfg.lr
        self.loss_scaler = make_scaler(run)
        self.finite = FiniteGuard(self)
        self.state = RunState(self, method)
        # dropout and sampled classes differ between the ranks
        torch.manual_seed(cfg.seed + 1 + distributed.rank())
        if run.resume_step:
            self.state.resume(run.resume_step)
        epochs_after = cfg.num_epoch - self.position.epoch - 1
        steps_of_epoch = self.feed.steps_left(self.position.samples)
        steps_after = epochs_after * self.feed.steps_per_epoch
        self.total_steps = self.position.step + steps_of_epoch + steps_after

    def train(self) -> None:
        """Train to the last epoch or until a signal asks to stop; verify and save on the way."""
        cfg, run, step = self.cfg, self.run, self.position.step
        if distributed.is_main():
            if later := run.folder.rewind(step):
                steps = ", ".join(map(str, later))
                logging.warning(
                    "going back to step %d: the states of steps %s are removed", step, steps
                )
            write_config(cfg, self.state.method, run.resume_step)
        # scripts of people who come from AdaDistill look for this line
        logging.info("Total Step is: %d", self.total_steps)
        self.progress = Progress(cfg, run.device, self.feed, self.total_steps, step)
        stop = StopRequest()
        if cfg.run_eval_at_start and step == 0:
            self.verify()
            self.run_benchmarks(self.position.epoch)
        try:
            with Watch(cfg.timeout), cudnn_benchmark(True):
                self.make_up_for_benchmarks()
                self.train_epochs(stop)
        finally:
            self.feed.close()
        step = self.position.step
        if self.position.epoch < cfg.num_epoch:
            logging.info(
                "Stopped by a signal at step %d of %d; go on with --resume", step, self.total_steps
            )
        else:
            logging.info("Finished at step %d: %s", step, run.folder.file(step, "backbone"))
        self.progress.close()

    def train_epochs(self, stop: StopRequest) -> None:
        """Train, and after every epoch save and measure, to the end or until asked to stop."""
        stopped = False
        while self.position.epoch < self.cfg.num_epoch and not stopped:
            epoch = self.position.epoch
            stopped = self.train_epoch(stop)
            # first: an evaluation that fails after hours loses nothing
            self.save()
            ended = self.position.epoch > epoch
            if ended and self.validation.benchmarks_are_due(epoch) and not stopped:
                self.run_benchmarks(epoch)

    def train_epoch(self, stop: StopRequest) -> bool:
        """Train from where this epoch stands to its end; True if a signal asks to stop."""
        position = self.position
        self.student.freeze(position.epoch < self.cfg.freeze)
        batches = self.feed.read(position)
        while self.feed.steps_left(position.samples):
            epoch = position.epoch
            loss, stats = self.train_step(batches)
            position.step += 1
            position.samples += self.feed.step_samples
            ended = self.feed.steps_left(position.samples) == 0
            self.progress.add(loss, stats)
            if self.progress.is_due(position.step, ended):
                self.finite.check()
                self.progress.write(position, epoch, self.lr)
            if self.validation.is_due(position.step, epoch, ended):
                self.verify()
            stopped = stop.agreed()
            if ended:
                self.feed.tell_resized()
                position.epoch, position.samples = epoch + 1, 0
            elif position.step % self.cfg.state_every == 0:
                self.save()
            if ended or stopped:
                return stopped
        return False

    def train_step(self, batches) -> tuple[torch.Tensor, dict]:
        """One optimizer step; its loss and statistics, still on the device."""
        cfg = self.cfg
        fraction = self.feed.fraction(self.position)
        processes = distributed.world_size()
        self.lr = learning_rate(cfg, self.position.epoch, fraction, processes)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * cfg.backbone_lr
        if cfg.cuda_graphs:
            self.student.own_gradients()
        total = 0.0
        means = {}
        for part in range(cfg.accumulate):
            distributed.begin()
            batch = next(batches)
            if cfg.cuda_graphs:
                # nothing that the graphs returned before is used any more
                torch.compiler.cudagraph_mark_step_begin()
            last = part == cfg.accumulate - 1
            with nullcontext() if last else self.student.no_sync():
                loss, stats = self.loss_of(self.student, batch, self.position.epoch + fraction)
                self.scaler.scale(loss / cfg.accumulate).backward()
            total = total + loss.detach() / cfg.accumulate
            for name, value in stats.items():
                means[name] = means.get(name, 0.0) + value / cfg.accumulate
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, cfg.grad_clip or math.inf)
        self.finite.note(total, norm)
        self.scaler.step(self.optimizer)
        self.move_centers(norm)
        self.scaler.update()
        self.average.update()
        self.optimizer.zero_grad(set_to_none=not cfg.cuda_graphs)
        return total, means

    @property
    def scaler(self):
        """fp16's loss scaler; a frozen student has no gradients to scale."""
        return NO_SCALER if self.student.frozen else self.loss_scaler

    def move_centers(self, norm: torch.Tensor) -> None:
        """The learned centres' part of the step; others do not move by it.

        fp16's scaler leaves out a step whose gradients are not finite, and so do the centres.
        """
        centers = self.header.centers
        if not centers.learned:
            return
        scale = 1.0
        if self.scaler.is_enabled():
            if not torch.isfinite(norm):
                centers.forget()
                return
            scale = self.scaler.get_scale()
        centers.step(self.lr, self.cfg.momentum, self.cfg.weight_decay, scale)

    # --- between steps

    def verify(self) -> None:
        self.finite.check()
        with self.progress.paused():
            self.validation.verify(self.average.network, self.run, self.progress.log, self.position)

    def run_benchmarks(self, epoch: int) -> None:
        self.finite.check()
        step = self.position.step
        with self.progress.paused():
            self.validation.run_benchmarks(
                self.average.network, self.run, self.progress.log, step, epoch
            )

    def make_up_for_benchmarks(self) -> None:
        """Measure if the run was ended between an epoch's last state and its figures."""
        epoch, step = self.position.epoch - 1, self.position.step
        if self.position.samples or not self.validation.benchmarks_are_due(epoch):
            return
        if not distributed.main_computes(lambda: self.progress.log.has_benchmarks(step)):
            self.run_benchmarks(epoch)

    def save(self) -> None:
        self.finite.check()
        with self.progress.paused():
            self.state.save()
