"""The training loop that all three methods share. It knows nothing of the method: a script hands it
a function that returns a loss.

    loss_of(student, batch, epoch) -> (loss, stats)

student: the network as the engine wraps it (autocast, compiled, DistributedDataParallel); batch: an
Inputs; epoch: fractional; loss: 0-d; stats: named 0-d tensors for the log.
"""

import logging
import math
import time
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from eval import verification
from eval.test_sets import run_test_set
from train.build import input_dtype
from train.start_up import SETTLED, StopRequest, check_settled, write_config
from utils import distributed
from utils.dataset.loader import open_loader
from utils.dataset.order import EpochBatches, mirrored
from utils.dataset.read_ahead import ReadAhead, RecordBlocks
from utils.dataset.workers import end_workers, next_batch, to_device
from utils.errors import InputError
from utils.inputs import to_input
from utils.precision import autocast
from utils.run import folder
from utils.run.hang_watch import Watch
from utils.run.log import RunLog

# bytes of class centres beyond which header_format "auto" leaves them in shares
LARGE_HEADER = 1 << 30


def learning_rate(cfg, epoch: int, fraction: float) -> float:
    """Learning rate at ``fraction`` of ``epoch``: lr per 512 images, squared warm-up, x 0.1 from
    epoch index m - 1 for every milestone m.
    """
    base = cfg.lr / 512 * cfg.batch_size * distributed.world_size()
    if epoch < cfg.warmup_epoch:
        return base * ((epoch + fraction + 1) / (cfg.warmup_epoch + 1)) ** 2
    return base * 0.1 ** sum(milestone - 1 <= epoch for milestone in cfg.milestones)


def features_shown(features: torch.Tensor, flip: torch.Tensor | None) -> torch.Tensor:
    """(B, 2, D) float16 features of images and mirror images -> (B, D) float32 of those that
    ``flip`` (B,) bool shows; None: none is mirrored.
    """
    plain, mirrored = features.unbind(1)
    return (plain if flip is None else torch.where(flip[:, None], mirrored, plain)).float()


def get_device_rng(device: torch.device) -> torch.Tensor | None:
    """The state of a GPU's random numbers; None for the CPU, whose state is the host's."""
    return None if device.type == "cpu" else getattr(torch, device.type).get_rng_state()


def set_device_rng(device: torch.device, state: torch.Tensor) -> None:
    getattr(torch, device.type).set_rng_state(state)


class Inputs(NamedTuple):
    """What a rank computes with at a time, on its device: images (B, 3, 112, 112) in [-1, 1]
    (float32 or bfloat16), labels (B,) int64, and the teacher's features (B, D) float32 of these
    images, mirrored or not, if the data set has them."""

    images: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor | None


class Engine:
    """One training run: ``Engine(...).train()``."""

    def __init__(self, cfg, run, method, dataset, student, header, loss_of, validation):
        self.cfg = cfg
        self.run = run
        self.method = method
        self.loss_of = loss_of
        self.rank = distributed.rank()
        self.world = distributed.world_size()
        self.validation_sets, self.benchmarks = validation

        read_ahead = (
            ReadAhead(
                RecordBlocks(dataset.shards(), cfg.shuffle_block), *distributed.place_on_node()
            )
            if cfg.shuffle_block
            else None
        )
        self.batches = EpochBatches(
            len(dataset), cfg.batch_size, self.rank, self.world, cfg.seed, cfg.shuffle, read_ahead
        )
        self.step_samples = self.batches.global_batch * cfg.accumulate
        self.steps_per_epoch = len(dataset) // self.step_samples
        if self.steps_per_epoch == 0:
            raise InputError(
                f"the set has {len(dataset)} images, one step takes "
                f"{self.step_samples} (batch_size x processes x accumulate): lower batch_size"
            )
        self.loader = open_loader(
            dataset, self.batches, cfg.batch_size, cfg.num_workers, run.device
        )
        self.reading = None
        self.bad_records = {}
        self.shared_bad_records = 0

        layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
        self.backbone = student.to(run.device, memory_format=layout)
        self.header = header.to(run.device)
        self.student = self.wrap(self.backbone)
        self.weights = [p for p in self.backbone.parameters() if p.requires_grad]
        self.learned = header.centers if header.centers.learned else None
        if self.learned:
            # the engine calls their step(), which needs no gradient as large as the centres
            self.learned.defer = True
        # not fused with fp16, whose scaler may skip the first step: the momentum would stay
        # uninitialised
        fused = run.precision != "fp16" and run.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.SGD(
            self.weights,
            lr=cfg.lr,
            momentum=cfg.momentum,
            weight_decay=cfg.weight_decay,
            fused=fused,
        )
        scaling = dict(device=run.device.type, enabled=run.precision == "fp16")
        if scaling["enabled"] and self.world > 1:
            # all ranks skip a step together; takes seconds to import
            from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

            self.scaler = ShardedGradScaler(**scaling)
        else:
            self.scaler = torch.amp.GradScaler(**scaling)

        # samples: images of this epoch that are done, over all ranks
        self.step = 0
        self.epoch = 0
        self.samples = 0
        self.highest = {}
        self.best = 0.0
        self.validated = -1
        self.saved = -1
        self.first_bad_step = torch.full((), -1, device=run.device)
        # dropout and sampled classes differ between the ranks
        torch.manual_seed(cfg.seed + 1 + self.rank)
        if run.resume_step:
            self.resume(run.resume_step)
        self.total_steps = (
            self.step
            + self.steps_left(self.samples)
            + (cfg.num_epoch - self.epoch - 1) * self.steps_per_epoch
        )

    def steps_left(self, samples: int) -> int:
        """Whole steps of an epoch of which ``samples`` images are done."""
        return (len(self.loader.dataset) - samples) // self.step_samples

    def wrap(self, backbone):
        network = torch.compile(backbone) if self.cfg.compile else backbone
        if self.world > 1:
            network = DistributedDataParallel(
                network,
                gradient_as_bucket_view=True,
                device_ids=[self.run.device] if self.run.device.type == "cuda" else None,
            )

        def student(images):
            with autocast(self.run.device, self.run.precision):
                return network(images)

        student.no_sync = getattr(network, "no_sync", nullcontext)
        return student

    # --- the loop

    def train(self) -> None:
        """Train to the last epoch, or until a signal asks to stop; verifies and saves on the
        way.
        """
        if distributed.is_main():
            if later := self.run.folder.rewind(self.step):
                logging.warning(
                    "going back to step %d: the states of steps %s are removed",
                    self.step,
                    ", ".join(map(str, later)),
                )
            write_config(self.cfg, self.run.resume_step)
        self.log = RunLog(self.cfg.output, self.total_steps, self.step)
        self.bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            disable=None if distributed.is_main() else True,
            unit="step",
            dynamic_ncols=True,
        )
        stop = StopRequest()
        self.open_window()
        if self.cfg.run_eval_at_start and self.step == 0:
            self.validate()
            self.run_benchmarks(self.epoch)
        stopped = False
        try:
            with Watch(self.cfg.timeout):
                if (
                    self.benchmarks_are_due(self.epoch - 1)
                    and self.samples == 0
                    and not distributed.main_computes(lambda: self.log.has_benchmarks(self.step))
                ):
                    # the run was ended between an epoch's last state and these figures
                    self.run_benchmarks(self.epoch - 1)
                while self.epoch < self.cfg.num_epoch and not stopped:
                    epoch, stopped = self.epoch, self.train_epoch(stop)
                    # first: an evaluation that fails after hours loses nothing
                    self.save()
                    if self.epoch > epoch and self.benchmarks_are_due(epoch) and not stopped:
                        self.run_benchmarks(epoch)
        finally:
            end_workers(self.reading)
        if self.epoch < self.cfg.num_epoch:
            logging.info(
                "Stopped by a signal at step %d of %d; go on with --resume",
                self.step,
                self.total_steps,
            )
        else:
            logging.info(
                "Finished at step %d: %s", self.step, self.run.folder.file(self.step, "backbone")
            )
        self.bar.close()
        self.log.close()

    def train_epoch(self, stop) -> bool:
        """Train from where this epoch stands to its end; returns True if a signal asks to stop."""
        cfg, stopped = self.cfg, False
        self.batches.seek(self.epoch, self.samples)
        source = self.read_batches()
        while self.steps_left(self.samples) and not stopped:
            epoch = self.epoch
            loss, stats = self.train_step(source)
            self.step = self.step + 1
            self.samples = self.samples + self.step_samples
            ended = self.steps_left(self.samples) == 0
            self.record(epoch, loss, stats, ended)
            if self.wants_validation(epoch, ended):
                self.validate()
            stopped = stop.agreed()
            if ended:
                self.epoch = epoch + 1
                self.samples = 0
                break
            if self.step % cfg.state_every == 0:
                self.save()
        return stopped

    def wants_validation(self, epoch: int, ended: bool) -> bool:
        """At every eval_step-th step, after every val_eval_every_n_epoch-th epoch, and at the end
        of the run.
        """
        cfg = self.cfg
        every = cfg.val_eval_every_n_epoch
        return (
            bool(cfg.eval_step and self.step % cfg.eval_step == 0)
            or ended
            and (epoch + 1 == cfg.num_epoch or bool(every) and (epoch + 1) % every == 0)
        )

    def benchmarks_are_due(self, epoch: int) -> bool:
        """After every eval_every_n_epoch-th epoch and at the end of the run."""
        every = self.cfg.eval_every_n_epoch
        return (
            bool(self.benchmarks)
            and epoch >= 0
            and (epoch + 1 == self.cfg.num_epoch or bool(every) and (epoch + 1) % every == 0)
        )

    def train_step(self, source):
        """One optimizer step; returns its loss and statistics, still on the device."""
        cfg = self.cfg
        fraction = self.samples / (self.steps_per_epoch * self.step_samples)
        lr = learning_rate(cfg, self.epoch, fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total, means = 0.0, {}
        for part in range(cfg.accumulate):
            distributed.begin()
            batch = next(source)
            with self.student.no_sync() if part < cfg.accumulate - 1 else nullcontext():
                loss, stats = self.loss_of(self.student, batch, self.epoch + fraction)
                self.scaler.scale(loss / cfg.accumulate).backward()
            total = total + loss.detach() / cfg.accumulate
            means = {
                name: means.get(name, 0.0) + value / cfg.accumulate for name, value in stats.items()
            }
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, cfg.grad_clip or math.inf)
        self.note_finite(total, norm)
        self.scaler.step(self.optimizer)
        if self.learned:
            self.move_centers(lr, norm)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total, means

    def move_centers(self, lr: float, norm) -> None:
        """The learned centres' part of the step; the fp16 scaler leaves out steps whose gradients
        are not finite.
        """
        if self.scaler.is_enabled() and not torch.isfinite(norm):
            self.learned.forget()
        else:
            self.learned.step(
                lr,
                self.cfg.momentum,
                self.cfg.weight_decay,
                self.scaler.get_scale() if self.scaler.is_enabled() else 1.0,
            )

    def read_batches(self):
        """Yield the Inputs of this epoch, mirrored and augmented as a function of the position
        alone.
        """
        samples, batches = self.batches.samples, iter(self.loader)
        self.reading = batches
        while True:
            started = time.monotonic()
            batch = next_batch(batches)
            self.waited += time.monotonic() - started
            if batch is None:
                return
            self.note_bad_records(batch.bad)
            # kept in no variable here: the next one takes its memory
            yield self.inputs_of(batch, samples)
            samples += self.batches.global_batch

    def inputs_of(self, batch, samples: int) -> Inputs:
        """The batch of this rank in the global batch that starts after ``samples`` images of the
        epoch.
        """
        cfg, device = self.cfg, self.run.device
        # some of torchvision's resizing, which augmenting is in part, does not exist on MPS
        prepared_on = torch.device("cpu") if cfg.augment and device.type == "mps" else device
        flip = (
            mirrored(cfg.seed, self.epoch, samples, self.batches.global_batch)[
                self.rank * cfg.batch_size :
            ][: cfg.batch_size]
            if cfg.flip
            else None
        )
        flip = None if flip is None else to_device(flip, prepared_on)
        images = to_input(
            to_device(batch.images, prepared_on),
            flip,
            cfg.channels_last,
            input_dtype(cfg, self.run),
        )
        if cfg.augment:
            from utils.augment import augment  # torchvision takes a second to import

            images = augment(images, [cfg.seed, self.epoch, samples, self.rank])
        flip = None if flip is None else to_device(flip, device)
        features = (
            None
            if batch.features is None
            else features_shown(to_device(batch.features, device), flip)
        )
        return Inputs(to_device(images, device), to_device(batch.labels, device), features)

    # --- what is watched

    def note_finite(self, loss, norm) -> None:
        """Remember the first step with a non-finite loss or gradient; on CPUs stop before the
        weights see it, on GPUs when the loss is read.

        With the fp16 scaler an infinite gradient is normal: that step is skipped and the scale
        halved.
        """
        finite = torch.isfinite(loss)
        if not self.scaler.is_enabled():
            # a centre's gradient that is not finite makes the features' not finite either
            finite = finite & torch.isfinite(norm)
        bad = ~finite
        self.first_bad_step = torch.where(
            bad & (self.first_bad_step < 0), self.step + 1, self.first_bad_step
        )
        if self.run.device.type == "cpu":
            self.check_finite()

    def check_finite(self) -> None:
        """Errors: InputError if a loss or gradient was not finite. Called before anything is saved
        or verified.
        """
        step = int(self.first_bad_step)
        collapsed = self.scaler.is_enabled() and self.scaler.get_scale() < 1e-3
        if step >= 0 or collapsed:
            raise InputError(
                "the loss or a gradient is not finite at step "
                f"{step if step >= 0 else self.step} (learning rate "
                f"{self.optimizer.param_groups[0]['lr']:g}, "
                f"{self.run.precision}); try a lower lr, warmup_epoch=1 or more, or "
                "precision=fp32. Earlier checkpoints are untouched"
            )

    def note_bad_records(self, bad) -> None:
        for key, reason in bad:
            if key not in self.bad_records:
                self.bad_records[key] = reason
                logging.warning("damaged record %s, another one takes its place: %s", key, reason)
        if len(self.bad_records) > self.cfg.max_bad_records:
            self.refuse_bad_records(self.bad_records)

    def refuse_bad_records(self, bad: dict) -> None:
        raise InputError(
            f"{len(bad)} damaged records are more than "
            f"max_bad_records={self.cfg.max_bad_records}: "
            f"{', '.join(map(str, sorted(bad, key=str)))}"
        )

    def share_bad_records(self) -> None:
        """Let every rank know the damaged records that others have met, and stop all together when
        there are too many.
        """
        fresh = len(self.bad_records) - self.shared_bad_records
        if distributed.all_reduce(torch.tensor(float(fresh))).item():
            self.bad_records = {
                key: reason
                for found in distributed.all_gather_object(self.bad_records)
                for key, reason in found.items()
            }
        self.shared_bad_records = len(self.bad_records)
        if len(self.bad_records) > self.cfg.max_bad_records:
            self.refuse_bad_records(self.bad_records)

    def open_window(self) -> None:
        """Start the figures of the next log line."""
        self.window_started = time.monotonic()
        self.window_steps = 0
        self.waited = 0.0
        self.sums = {}

    def record(self, epoch: int, loss, stats: dict, epoch_ended: bool) -> None:
        """Add one step to the log window; every log_every steps, and at step 1 and each epoch's
        end, write the means. Only then is the device waited for.
        """
        self.bar.update()
        self.window_steps += 1
        for name, value in dict(stats, loss=loss).items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        if not (epoch_ended or self.step == 1 or self.step % self.cfg.log_every == 0):
            return
        self.check_finite()
        means = {name: float(value) / self.window_steps for name, value in self.sums.items()}
        seconds = time.monotonic() - self.window_started
        self.log.train(
            self.step,
            epoch,
            means.pop("loss"),
            self.optimizer.param_groups[0]["lr"],
            self.window_steps * self.step_samples / seconds,
            self.waited / seconds,
            self.memory(),
            means,
        )
        self.share_bad_records()
        self.open_window()

    def memory(self) -> float:
        """The most GB that this rank's GPU has held since the last call; 0 without one, and on MPS,
        which keeps no such count.
        """
        if self.run.device.type != "cuda":
            return 0.0
        peak = torch.cuda.max_memory_allocated(self.run.device) / 1e9
        torch.cuda.reset_peak_memory_stats(self.run.device)
        return peak

    # --- verification and checkpoints

    def validate(self) -> None:
        """Verify on all ranks together, log with this step, and keep the best student so far."""
        if not self.validation_sets or self.validated == self.step:
            return
        started = time.monotonic()
        self.check_finite()
        self.validated = self.step
        distributed.sync_buffers(self.backbone)
        results = {
            name: verification.test(
                pairs,
                self.backbone,
                self.cfg.val_batch_size,
                device=self.run.device,
                precision=self.run.precision,
                channels_last=self.cfg.channels_last,
            )
            for name, pairs in self.validation_sets.items()
        }
        for name, figures in results.items():
            self.highest[name] = max(self.highest.get(name, 0.0), figures["Accuracy-Flip"])
        self.log.validation(self.step, self.epoch, results, self.highest)
        mean = sum(figures["Accuracy-Flip"] for figures in results.values()) / len(results)
        if mean > self.best:
            self.best = mean
            if distributed.is_main():
                folder.save(self.backbone.state_dict(), self.run.folder.path / "best_backbone.pth")
        self.window_started += time.monotonic() - started  # no part of the training speed

    def run_benchmarks(self, epoch: int) -> None:
        """Measure IJB and TinyFace on all ranks together, with the state of this step on disk, and
        log with this step of ``epoch``.
        """
        if not self.benchmarks:
            return
        started = time.monotonic()
        self.check_finite()
        distributed.sync_buffers(self.backbone)
        results = {}
        for benchmark in self.benchmarks:
            results.setdefault(benchmark.kind, {})[benchmark.name] = run_test_set(
                benchmark,
                self.backbone,
                device=self.run.device,
                precision=self.run.precision,
                channels_last=self.cfg.channels_last,
            )
        self.log.benchmarks(self.step, epoch, results)
        self.window_started += time.monotonic() - started

    def save(self) -> None:
        """Write weights and state of this step; a collective, written by rank 0."""
        if self.saved == self.step:
            return
        started = time.monotonic()
        self.check_finite()
        self.saved = self.step
        sharded, header, momentum = self.wants_shards(), None, None
        if sharded:
            self.save_shards()
        else:
            header = self.header.state_dict()
            if self.learned and self.learned.momentum is not None:
                momentum = self.learned.whole(self.learned.momentum)
        rng = (torch.get_rng_state(), get_device_rng(self.run.device))
        state = dict(
            method=self.method,
            settings={key: self.cfg[key] for key in SETTLED},
            images=len(self.loader.dataset),
            device=self.run.device.type,
            step=self.step,
            epoch=self.epoch,
            samples=self.samples,
            optimizer=self.optimizer.state_dict(),
            header_momentum=momentum,
            header_moved=self.learned is not None and self.learned.momentum is not None,
            scaler=self.scaler.state_dict(),
            rng=distributed.all_gather_object(rng),
            highest=self.highest,
            best=self.best,
            bad_records=list(self.bad_records.items()),
        )
        if distributed.is_main():
            self.run.folder.save(
                self.step, self.backbone.state_dict(), header, state, self.cfg.keep_states
            )
        self.window_started += time.monotonic() - started

    def wants_shards(self) -> bool:
        """Whether the header is written by all ranks, each its share, rather than gathered into one
        file.
        """
        rows, size = (
            self.header.centers.num_classes,
            self.header.centers.weight.shape[1] * self.header.centers.weight.element_size(),
        )
        return (
            self.cfg.header_format == "shards"
            or self.cfg.header_format == "auto"
            and rows * size > LARGE_HEADER
        )

    def save_shards(self) -> None:
        from utils.run import header_shards  # torch.distributed.checkpoint takes a second to import

        folder = self.run.folder.shards(self.step).with_suffix(".tmp")
        distributed.barrier()  # no rank writes before the first has cleaned up in start()
        header_shards.save_header(folder, self.header)

    def resume(self, step: int) -> None:
        """Take up everything that ``save`` wrote; on another number of ranks, go on from the same
        step and image.
        """
        state = self.run.folder.load_state(step)
        check_settled(self.cfg, self.method, self.run.folder, step, state)
        header = self.run.folder.load(step, self.backbone)
        self.resume_header(step, header, state)
        self.optimizer.load_state_dict(state["optimizer"])
        # the configuration's values count, also where they have changed
        for group in self.optimizer.param_groups:
            group.update(
                momentum=self.cfg.momentum,
                weight_decay=self.cfg.weight_decay,
                fused=self.optimizer.defaults["fused"],
            )
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.bad_records = dict(state["bad_records"])
        if len(state["rng"]) == self.world:
            on_host, on_device = state["rng"][self.rank]
            torch.set_rng_state(on_host)
            # states of before they named their device are of CUDA, or have none
            if on_device is not None and self.run.device.type == state.get("device", "cuda"):
                set_device_rng(self.run.device, on_device)
        self.step = state["step"]
        self.epoch = state["epoch"]
        self.samples = state["samples"]
        if distributed.is_main() and state.get("images", len(self.loader.dataset)) != len(
            self.loader.dataset
        ):
            logging.warning(
                "the set has %d images, it had %d when step %d was saved: the order "
                "within an epoch is another one",
                len(self.loader.dataset),
                state["images"],
                step,
            )
        # a larger global batch or a smaller set than before: what is left of the epoch fills no
        # step
        if self.steps_left(self.samples) <= 0:
            self.epoch = self.epoch + 1
            self.samples = 0
        self.highest = state["highest"]
        self.best = state["best"]
        self.validated = self.step
        self.saved = self.step
        logging.info(
            "Resumed at step %d, epoch %d, %d of its images done",
            self.step,
            self.epoch,
            self.samples,
        )

    def resume_header(self, step: int, header: dict | None, state: dict) -> None:
        """Take up class centres, their momentum and the margin's statistics; ``header`` None: all
        ranks read their shares.
        """
        centers, file = self.header.centers, self.run.folder.header(step)
        configured = None if centers.moved else centers.weight.clone()
        if header is None:
            from utils.run import header_shards

            header_shards.load_header(file, self.header, state["header_moved"])
        else:
            try:
                self.header.load_state_dict(header)
            except InputError as error:
                raise InputError(f"resume: {file}: {error}") from error
            if state["header_momentum"] is not None:
                self.learned.momentum = self.learned.shard(state["header_momentum"]).to(
                    self.learned.weight
                )
        # as far as both may have been rounded to bf16
        differ = configured is not None and not torch.allclose(
            centers.weight.float(), configured.float(), rtol=2**-7, atol=0
        )
        if distributed.all_reduce(torch.tensor(float(differ))).item():
            raise InputError(
                f"resume: {file} holds other class centres than "
                f"{self.cfg.pretrained_teacher_header_path or self.cfg.pretrained_header_path}, "
                "and nothing moves these: set pretrained_teacher_header_path as it "
                "was, or another output= for a new run"
            )
