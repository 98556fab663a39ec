"""Where a run stands, and what it needs to go on: saved with the weights, and taken up again."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from utils import distributed
from utils.errors import InputError
from utils.files import read_json
from utils.run.folder import RunFolder
from utils.weights.load import load_backbone
from utils.weights.read import read_tensors

# What weights are made for: a run cannot go on from its own with another value, but for most
# losses.
SETTLED = ("network", "SE", "embedding_size", "num_classes", "loss")
# Bytes of class centres beyond which header_format="auto" leaves them in shares.
LARGE_HEADER = 1 << 30


@dataclass
class Position:
    """step: optimizer steps done; epoch: from 0; samples: images of it done, over all ranks."""

    step: int = 0
    epoch: int = 0
    samples: int = 0


class RunState:
    """Saves and resumes a run. ``engine``: whose backbone, header, optimizer, ... these are."""

    def __init__(self, engine, method: str):
        self.engine = engine
        self.method = method
        self.folder = engine.run.folder
        self.saved_step = -1

    def save(self) -> None:
        """Write weights and state of this step; a collective, written by rank 0."""
        engine = self.engine
        position = engine.position
        if self.saved_step == position.step:
            return
        self.saved_step = position.step
        centers = engine.header.centers
        moved = centers.momentum is not None
        header = momentum = None
        if self.wants_shards():
            self.save_shards()
        else:
            header = engine.header.state_dict()
            momentum = centers.whole(centers.momentum) if moved else None
        state = dict(
            method=self.method,
            settings={key: engine.cfg[key] for key in SETTLED},
            images=engine.feed.length,
            device=engine.run.device.type,
            step=position.step,
            epoch=position.epoch,
            samples=position.samples,
            optimizer=engine.optimizer.state_dict(),
            ema=engine.cfg.ema,
            header_momentum=momentum,
            header_moved=moved,
            scaler=engine.scaler.state_dict(),
            rng=distributed.all_gather_object(self.random_states()),
            highest=engine.validation.highest,
            best=engine.validation.best,
            bad_records=list(engine.feed.damaged.reasons.items()),
        )
        if distributed.is_main():
            self.folder.save(
                position.step,
                engine.backbone.state_dict(),
                header,
                state,
                engine.cfg.keep_states,
                engine.average.state_dict(),
            )

    def random_states(self) -> tuple:
        """This rank's random states: of the host, and of its GPU or None."""
        device = self.engine.run.device.type
        on_device = None if device == "cpu" else getattr(torch, device).get_rng_state()
        return torch.get_rng_state(), on_device

    def wants_shards(self) -> bool:
        """Whether every rank writes its share of the header, rather than rank 0 all of it."""
        centers = self.engine.header.centers
        size = centers.num_classes * centers.weight.shape[1] * centers.weight.element_size()
        return in_shards(self.engine.cfg.header_format, size)

    def save_shards(self) -> None:
        # torch.distributed.checkpoint takes a second to import
        from utils.run import header_shards

        folder = self.folder.shards(self.engine.position.step).with_suffix(".tmp")
        # no rank writes before the first has cleaned up at the start
        distributed.barrier()
        header_shards.save_header(folder, self.engine.header)

    def resume(self, step: int) -> None:
        """Take up all that ``save`` wrote; another number of ranks goes on from the same image.

        Where there is no state, the weights alone.
        """
        if not self.folder.file(step, "state").is_file():
            self.resume_weights(step)
            return
        engine = self.engine
        state = self.folder.load_state(step)
        check_settled(engine.cfg, self.method, self.folder, step, state)
        header = self.folder.load(step, engine.backbone)
        self.resume_header(step, header, state)
        # states of earlier versions do not say it
        self.resume_average(step, bool(state.get("ema")))
        engine.optimizer.load_state_dict(state["optimizer"])
        # the configuration's values count, also where they have changed
        for group in engine.optimizer.param_groups:
            group.update(
                momentum=engine.cfg.momentum,
                weight_decay=engine.cfg.weight_decay,
                fused=engine.optimizer.defaults["fused"],
            )
        if state["scaler"] and engine.scaler.is_enabled():
            engine.scaler.load_state_dict(state["scaler"])
        engine.feed.damaged.reasons = dict(state["bad_records"])
        if len(state["rng"]) == distributed.world_size():
            # states of before they named their device are of CUDA, or have none
            self.set_random_states(*state["rng"][distributed.rank()], state.get("device", "cuda"))
        self.resume_position(step, state)
        engine.validation.highest = state["highest"]
        engine.validation.best = state["best"]
        engine.validation.done_at_step = step
        self.saved_step = step

    def resume_weights(self, step: int) -> None:
        """Go on from <step>backbone.pth, and <step>header.pth if it is there, as other trainers
        leave them, with the first image of the epoch.

        Raises InputError if learned centres are missing.
        """
        engine, position = self.engine, self.engine.position
        check_settled(engine.cfg, self.method, self.folder, step, {})
        centers = engine.header.centers
        backbone, file = self.folder.file(step, "backbone"), self.folder.header(step)
        if centers.learned and not file.exists():
            raise InputError(
                f"global_step={step}: no {file}, whose class centres {self.method} goes on with; "
                f"start a new run (another output=) with pretrained_backbone_path={backbone}"
            )
        load_backbone(engine.backbone, backbone, "resume")
        if file.exists():
            header = None if file.is_dir() else read_tensors(file, "resume")
            self.resume_header(step, header, dict(header_moved=False, header_momentum=None))
        self.resume_average(step, self.folder.file(step, "ema").is_file())
        position.step = step
        position.epoch = min(step // engine.feed.steps_per_epoch, engine.cfg.num_epoch)
        if not distributed.is_main():
            return
        if centers.moves and not file.exists():
            logging.warning("no %s: the class centres start anew", file)
        logging.warning(
            "no %s: going on from the weights of step %d alone, without the optimizer's momentum, "
            "with the first image of epoch %d",
            self.folder.file(step, "state"),
            step,
            position.epoch,
        )

    def resume_position(self, step: int, state: dict) -> None:
        position, feed = self.engine.position, self.engine.feed
        position.step = state["step"]
        position.epoch = state["epoch"]
        position.samples = state["samples"]
        images = state.get("images", feed.length)
        if distributed.is_main() and images != feed.length:
            logging.warning(
                "the set has %d images, it had %d when step %d was saved: "
                "the order within an epoch is another one",
                feed.length,
                images,
                step,
            )
        # a larger global batch or a smaller set than before: the rest of the epoch fills no step
        if feed.steps_left(position.samples) <= 0:
            position.epoch += 1
            position.samples = 0
        logging.info(
            "Resumed at step %d, epoch %d, %d of its images done",
            position.step,
            position.epoch,
            position.samples,
        )

    def resume_header(self, step: int, header: dict | None, state: dict) -> None:
        """Take up class centres, their momentum and the margin's statistics.

        header: the whole one; None: all ranks read their shares.
        """
        own, file = self.engine.header, self.folder.header(step)
        centers = own.centers
        unused = not self.engine.cfg.header_weight
        configured = None if centers.moves or unused else centers.weight.clone()
        if header is None:
            # torch.distributed.checkpoint takes a second to import
            from utils.run import header_shards

            header_shards.load_header(file, own, state["header_moved"])
        else:
            try:
                own.load_state_dict(header)
            except InputError as error:
                raise InputError(f"resume: {file}: {error}") from error
            if state["header_momentum"] is not None:
                momentum = centers.shard(state["header_momentum"])
                centers.momentum = momentum.to(centers.weight)
        if configured is not None:
            self.refuse_other_centers(file, configured)

    def resume_average(self, step: int, was_kept: bool) -> None:
        """Take up the average of the weights; one that the run had not had begins at this step."""
        average = self.engine.average
        if not average.decay:
            return
        if was_kept:
            load_backbone(average.network, self.folder.file(step, "ema"), "resume")
        else:
            average.restart()
            logging.warning("no average of the weights of step %d: it begins there", step)

    def refuse_other_centers(self, file: Path, configured: torch.Tensor) -> None:
        """Raises InputError if centres that nothing moves are not those that were resumed."""
        cfg, saved = self.engine.cfg, self.engine.header.centers.weight
        # as far as both may have been rounded to bf16
        same = torch.allclose(saved.float(), configured.float(), rtol=2**-7, atol=0)
        if distributed.all_reduce(torch.tensor(float(not same))).item():
            path = cfg.pretrained_teacher_header_path or cfg.pretrained_header_path
            raise InputError(
                f"resume: {file} holds other class centres than {path}, and nothing moves these: "
                "set pretrained_teacher_header_path as it was, or another output= for a new run"
            )

    def set_random_states(self, host: torch.Tensor, device: torch.Tensor | None, kind: str) -> None:
        """kind: of the device whose state ``device`` is."""
        own = self.engine.run.device
        torch.set_rng_state(host)
        if device is not None and own.type == kind:
            getattr(torch, own.type).set_rng_state(device)


def in_shards(header_format: str, size: int) -> bool:
    """size: bytes of all class centres."""
    return header_format == "shards" or header_format == "auto" and size > LARGE_HEADER


def check_settled(cfg, method: str, folder: RunFolder, step: int, state: dict) -> None:
    """Refuse to go on from ``step``, whose ``state`` was read, with weights made for another run.

    Raises InputError if it is of another method, network or number of classes, or if exactly one
    of the two losses is AdaFace, whose statistics lie in the header.
    """
    # weights alone do not say it
    if state.get("method", method) != method:
        raise InputError(
            f"resume: {folder.path} holds a run of {state['method']}, this script "
            f"trains {method}: take that script, or another output="
        )
    config = folder.path / "config.json"
    # states of earlier versions do not say it themselves
    before = state.get("settings") or {}
    if not before and config.is_file():
        before = read_json(config, "a dict of configuration values")
    changed = [key for key in SETTLED if key in before and before[key] != cfg[key]]
    if "loss" in changed and "AdaFace" not in (before["loss"], cfg["loss"]):
        changed.remove("loss")
    if not changed:
        return
    backbone, header = folder.file(step, "backbone"), folder.header(step)
    again = f"(another output=) with pretrained_backbone_path={backbone}"
    if changed == ["loss"]:
        file, mend = header, f"start a new run {again}"
        # AMLDistill's centres are the teacher's again
        if method != "AMLDistill":
            mend += f" and pretrained_header_path={header}"
            if header.is_dir():
                mend += ", put into one file by train/export_header.py"
    elif set(changed) <= {"loss", "num_classes"}:
        file, mend = header, f"go on with the training set of that run, or start a new one {again}"
    else:
        file, mend = backbone, "set what it had, or another output= for a new run"
    then = ", ".join(f"{key}={before[key]}" for key in changed)
    this = ", ".join(f"{key}={cfg[key]}" for key in changed)
    raise InputError(f"resume: {file} is of a run with {then}, this one has {this}: {mend}")
