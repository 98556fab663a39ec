"""From a checkpoint to figures: the one evaluation path, and the flags, of run_full_eval.py and run_batch_eval.py."""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from easydict import EasyDict

from backbones import build_backbone
from config.schema import ROOT, load_config
from eval import verification
from utils import distributed
from utils.checkpoint import ADAFACE_PREFIX, load_backbone
from utils.errors import InputError
from utils.precision import PRECISIONS, choose_precision
from utils.teacher import Teacher

FLAGS = ("device", "val_rec", "val_targets", "val_batch_size")      # each is another name of a configuration key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the flags that say how to evaluate, whatever the number of checkpoints."""
    parser.add_argument("--config", metavar="FILE", help="configuration (default: config/config.py, and the validation sets of the run's config.json); "
                        "the network always is that of the config.json beside the checkpoint, if there is one")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", default="fp32", choices=("auto", *PRECISIONS), help="default fp32: the same figures on every machine")
    parser.add_argument("--val-data", dest="val_rec", metavar="DIR", help="folder of the pair sets <name>.bin")
    parser.add_argument("--val-targets", dest="val_targets", metavar="NAME", nargs="+", help="pair sets, by spaces or commas: lfw cfp_fp agedb_30; all named must be there")
    parser.add_argument("--val-batch-size", dest="val_batch_size", metavar="N", help="images at a time on each rank")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="other configuration values, e.g. network=iresnet50")


class Job(NamedTuple):
    """One checkpoint, the configuration that names its network, and the pair sets to verify it on."""

    checkpoint: Path
    network: EasyDict
    sets: dict[str, verification.DataSet]


class Evaluator:
    """Evaluates checkpoints as the command line asks; all ranks call it together.

    skipped: {path: name} of the validation sets that only the configuration's defaults name and that were not found.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.overrides = overrides_of(arguments)
        self.config_named = arguments.config is not None
        self.sets_named = any(override.startswith("val_targets=") for override in self.overrides)
        self.folder_named = any(override.startswith("val_rec=") for override in self.overrides)
        self.cfg = load_config(arguments.config or ROOT / "config" / "config.py", self.overrides)
        self.device = distributed.init(self.cfg.device)
        self.precision = choose_precision(arguments.precision, self.device)
        self.loaded, self.skipped = {}, {}

    def plan(self, checkpoint: Path) -> Job:
        """Find what the evaluation of a checkpoint needs, before any network runs.

        Errors: InputError if the run's config.json is wrong, or a validation set damaged, missing though the command line names it, or none there.
        """
        beside = checkpoint.parent / "config.json"
        network = load_config(beside, self.overrides) if beside.is_file() else self.cfg
        wanted = self.cfg if self.config_named else network
        return Job(checkpoint, network, self.load_sets(Path(wanted.val_rec), wanted.val_targets))

    def load_sets(self, root: Path, names: list[str]) -> dict[str, verification.DataSet]:
        """Read the pair sets that are there, each once however many checkpoints need it."""
        if self.folder_named and not root.is_dir():
            raise InputError(f"--val-data: no folder {root}")
        paths = {name: root / f"{name}.bin" for name in names}
        found = [name for name, path in paths.items() if path.is_file() or self.sets_named]
        self.skipped |= {path: name for name, path in paths.items() if name not in found}
        if not found:
            raise InputError("nothing to evaluate on: " + ("; ".join(f"{name}: no {path}" for name, path in paths.items()) or "no validation sets are configured")
                             + "; name a folder with --val-data and sets with --val-targets")
        for name in found:
            if paths[name] not in self.loaded:
                self.loaded[paths[name]] = verification.load_targets(root, [name])[name]
        return {name: self.loaded[paths[name]] for name in found}

    def evaluate_checkpoint(self, job: Job) -> dict:
        """{"verification": {set: {"Accuracy-Flip", "Accuracy-Std", "XNorm"}}, "ijb": {}, "tinyface": {}}, accuracies as fractions.

        Errors: InputError if the file is missing, unreadable, of another network, or gives features that are not finite.
        """
        backbone = self.load(job)
        options = dict(device=self.device, precision=self.precision, channels_last=self.cfg.channels_last)
        figures = {name: verification.test(pairs, backbone, self.cfg.val_batch_size, **options) for name, pairs in job.sets.items()}
        return {"verification": figures, "ijb": {}, "tinyface": {}}

    def load(self, job: Job) -> torch.nn.Module:
        """The network on this rank's device, RGB images to features; AdaFace's releases get the BGR they were trained on."""
        network = build_backbone(job.network.network, job.network.embedding_size, use_se=job.network.SE)
        prefix = load_backbone(network, job.checkpoint, "checkpoint")
        layout = torch.channels_last if self.cfg.channels_last else torch.contiguous_format
        return Teacher(network, bgr=prefix == ADAFACE_PREFIX).to(self.device, memory_format=layout)

    def describe(self, job: Job) -> str:
        """The network and how it was run, in words."""
        network = f"{job.network.network}{' with SE' if job.network.SE else ''}, embedding_size {job.network.embedding_size}"
        return f"{network}, {self.precision} on {distributed.world_size()} x {self.device.type}"


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """The flags that were named, as key=value, and the command line's own, some of which --val-targets takes for names when they follow it."""
    flags = {key: getattr(arguments, key) for key in FLAGS if getattr(arguments, key) is not None}
    behind = [word for word in flags.get("val_targets", []) if "=" in word]
    if "val_targets" in flags:
        flags["val_targets"] = ",".join(word for word in flags["val_targets"] if "=" not in word)
    return [f"{key}={value}" for key, value in flags.items()] + behind + arguments.overrides
