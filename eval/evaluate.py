"""From a checkpoint to figures: the one evaluation path, and the flags, of run_full_eval.py and
run_batch_eval.py.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from easydict import EasyDict

from config.load import ROOT, load_config
from eval.groups import check_names, read_groups
from eval.test_sets import KINDS, make, run_test_set
from eval.uncertainty import Uncertainty
from utils import distributed
from utils.errors import InputError
from utils.files import prepare_folder, read_json
from utils.precision import PRECISIONS, choose_precision
from utils.teacher.load import Teacher
from utils.teacher.onnx import OnnxNetwork
from utils.teacher.onnx_graph import weight_files
from utils.weights.color_order import ORDERS
from utils.weights.load import load_network, read_weights, run_beside
from utils.weights.read import digest_of, sha256

# each flag is another name of a configuration key
FLAGS = (
    "device",
    "color_space",
    "val_rec",
    "val_targets",
    "val_batch_size",
    "ijb_root",
    "ijb_targets",
    "ijb_batch_size",
    "ijb_num_workers",
    "ijb_flip",
    "tinyface_root",
    "tinyface_targets",
    "tinyface_batch_size",
    "tinyface_num_workers",
    "tinyface_flip",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the flags that say how to evaluate, whatever the number of checkpoints."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="configuration (default: config/config.py, and the validation sets of the run's "
        "config.json); the network always is that of the config.json beside the checkpoint, if "
        "there is one",
    )
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--color-space",
        choices=ORDERS,
        help="order of the colours that the checkpoint was trained on (auto: as its file says; "
        "BGR for AdaFace's .ckpt files). A run's config.json does not count, it speaks of the "
        "run's teacher",
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("auto", *PRECISIONS),
        help="default fp32: the same figures on every machine",
    )
    parser.add_argument(
        "--features",
        type=Path,
        metavar="DIR",
        help="keep features there and use what is there, by checkpoint and set: an interrupted "
        "evaluation goes on, a second one does not run the network",
    )
    parser.add_argument(
        "--val-data", dest="val_rec", metavar="DIR", help="folder of the pair sets <name>.bin"
    )
    parser.add_argument(
        "--val-targets",
        dest="val_targets",
        metavar="NAME",
        nargs="+",
        help="pair sets, by spaces or commas: lfw cfp_fp agedb_30; all named must be there",
    )
    parser.add_argument(
        "--val-batch-size", dest="val_batch_size", metavar="N", help="images at a time on each rank"
    )
    for kind, sets in (("ijb", "IJBB IJBC"), ("tinyface", "tinyface")):
        parser.add_argument(
            f"--{kind}-root", metavar="DIR", help="folder of the folders named next"
        )
        parser.add_argument(
            f"--{kind}-targets", metavar="NAME", nargs="+", help=f"{sets}; all named must be there"
        )
        parser.add_argument(
            f"--{kind}-batch-size", metavar="N", help="images at a time on each rank"
        )
        parser.add_argument(
            f"--{kind}-num-workers", metavar="N", help="reading processes of each rank"
        )
        parser.add_argument(
            f"--{kind}-flip",
            action=argparse.BooleanOptionalAction,
            help="add the features of the mirror images",
        )
    parser.add_argument(
        "--intervals",
        type=int,
        default=0,
        metavar="N",
        help="give every rate its 95 %% interval, from N draws of people (1000 are good; 0: none)",
    )
    parser.add_argument(
        "--groups",
        type=Path,
        metavar="FILE",
        help="csv with the lines name,group of people or images: figures by group",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="other configuration values, e.g. network=iresnet50",
    )


class Job(NamedTuple):
    """One checkpoint, the configuration that names its network (an ONNX model is its own network),
    and the test sets to measure it on.
    """

    checkpoint: Path
    network: EasyDict
    test_sets: list

    @property
    def is_onnx(self) -> bool:
        return self.checkpoint.suffix == ".onnx"

    def sha256(self) -> str:
        """Of the checkpoint; of an ONNX model with the files that hold its weights."""
        if self.is_onnx:
            return sha256(*weight_files(self.checkpoint, "checkpoint"))
        return digest_of(self.checkpoint)


class Evaluator:
    """Evaluates checkpoints as the command line asks; all ranks call it together.

    skipped: {path: name} of the sets that only the configuration's defaults name and that were not
    found.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.overrides = overrides_of(arguments)
        self.config_named = arguments.config is not None
        self.config_is_a_runs = Path(arguments.config or "").suffix == ".json"
        self.named = {override.partition("=")[0] for override in self.overrides}
        self.cfg = load_config(arguments.config or ROOT / "config" / "config.py", self.overrides)
        self.device = distributed.init(self.cfg.device)
        self.precision = choose_precision(arguments.precision, self.device)
        if arguments.intervals < 0:
            raise InputError(f"--intervals {arguments.intervals}: a number of draws, 0 for none")
        self.draws = arguments.intervals
        self.groups = read_groups(arguments.groups) if arguments.groups else None
        self.feature_folder = arguments.features
        if self.feature_folder:
            prepare_folder(self.feature_folder, "--features")
        # {path: what was read there}
        self.loaded = {}
        self.skipped = {}
        # {checkpoint: (its colour order, where in the file its weights or features are, in words)}
        self.sources = {}

    def network_of(self, checkpoint: Path) -> EasyDict:
        """The configuration of the checkpoint's run, if it is beside it.

        Raises InputError if it is wrong.
        """
        beside = run_beside(checkpoint)
        return load_config(beside, self.overrides) if beside else self.cfg

    def color_space_of(self, job: Job) -> str:
        """The colour order that was set for a checkpoint, "auto": its file says.

        A run's config.json speaks of the run's teacher, not of the student that it trained.
        """
        named = "color_space" in self.named
        students = run_beside(job.checkpoint) is not None or self.config_is_a_runs
        return self.cfg.color_space if named or not students else "auto"

    def plan(self, checkpoint: Path) -> Job:
        """Find what the evaluation of a checkpoint needs, before any network runs.

        Raises InputError if the run's config.json is wrong, or a set damaged, missing though the
        command line names it, or none there.
        """
        network = self.network_of(checkpoint)
        test_sets = self.find_test_sets(self.cfg if self.config_named else network)
        if self.groups:
            check_names(self.groups, test_sets)
        return Job(checkpoint, network, test_sets)

    def find_test_sets(self, cfg) -> list:
        """What is there of the sets that ``cfg`` or the command line names, each read once however
        many checkpoints need it.
        """
        test_sets, missing, errors = [], {}, []
        for kind in KINDS:
            of_kind, missing_of_kind, error = self.find_of_kind(kind, cfg)
            test_sets += of_kind
            missing |= missing_of_kind
            errors += [error] if error else []
        self.skipped |= missing
        if not test_sets:
            reasons = "; ".join(f"{name}: no {path}" for path, name in missing.items())
            raise InputError(
                f"nothing to evaluate on: {reasons or 'no validation sets are configured'}; "
                "name a folder with --val-data (--ijb-root, --tinyface-root) and "
                "sets with --val-targets (--ijb-targets, --tinyface-targets)"
            )
        if errors:
            raise errors[0]
        return test_sets

    def find_of_kind(self, kind, cfg) -> tuple[list, dict, InputError | None]:
        """(the test sets of a kind, {path: name} of those that are not there, why a folder that
        the command line names has none).
        """
        root_key, targets_key, *_ = kind.keys
        root = Path(cfg[root_key])
        test_sets, missing, reason = [], {}, None
        if root_key in self.named and not root.is_dir():
            flag = root_key.replace("_", "-").replace("val-rec", "val-data")
            raise InputError(f"--{flag}: no folder {root}")
        for name in dict.fromkeys(cfg[targets_key] if cfg[root_key] else []):
            try:
                path = kind.find(root, name)
            except InputError as error:
                if targets_key in self.named:
                    raise
                missing[root / kind.pattern.format(name)] = name
                reason = error
                continue
            if path not in self.loaded:
                self.loaded[path] = kind.load(root, name)
            test_sets.append(make(kind, name, self.loaded[path], cfg))
        folder_has_none = root_key in self.named and not test_sets
        return test_sets, missing, reason if folder_has_none else None

    def evaluate_checkpoint(
        self, job: Job, exhibits: list | None = None, uncertainty: Uncertainty | None = None
    ) -> dict:
        """{"verification": {set: figures}, "ijb": {set: figures}, "tinyface": {set: figures}} as
        the public functions of eval/ return them, with what eval/bootstrap.py and eval/groups.py
        add.

        exhibits: a list to which rank 0 adds what a report page shows. uncertainty: to which it
        adds what the draws gave, from ``self.uncertainty()``.
        Raises InputError if the file is missing, unreadable, of another network, an image
        unreadable, or a feature not finite.
        """
        backbone = self.load(job)
        uncertainty = uncertainty or self.uncertainty()
        options = dict(
            device=self.device,
            precision=self.precision,
            channels_last=self.cfg.channels_last,
            feature_folder=self.feature_folder,
            checkpoint=job.sha256() if self.feature_folder else "",
            color_space=self.order(job),
            exhibits=exhibits,
            uncertainty=uncertainty,
        )
        results = {"verification": {}, "ijb": {}, "tinyface": {}}
        for test_set in job.test_sets:
            results[test_set.kind][test_set.name] = run_test_set(test_set, backbone, **options)
        for (kind, name), groups in uncertainty.by_group.items():
            results.setdefault("groups", {}).setdefault(kind, {})[name] = groups
        return results

    def uncertainty(self) -> Uncertainty:
        """What the command line asks for beside figures."""
        return Uncertainty(self.draws, self.groups)

    def load(self, job: Job) -> torch.nn.Module:
        """The network on this rank's device, RGB images to features, whatever it was trained on."""
        asked = self.color_space_of(job)
        if job.is_onnx:
            network = OnnxNetwork(job.checkpoint, "checkpoint", asked)
            self.sources[job.checkpoint] = (network.color_space, network.choice)
            return Teacher(network).to(self.device)
        cfg = job.network
        weights = read_weights(job.checkpoint, "checkpoint")
        network, loaded = load_network(
            cfg.network, cfg.embedding_size, cfg.SE, weights, color_space=asked
        )
        self.sources[job.checkpoint] = (loaded.color_space, loaded.source)
        layout = torch.channels_last if self.cfg.channels_last else torch.contiguous_format
        return Teacher(network).to(self.device, memory_format=layout)

    def order(self, job: Job) -> str:
        """The colour order of the images that a checkpoint was trained on, once it is loaded."""
        return self.sources[job.checkpoint][0]

    def describe(self, job: Job) -> str:
        """The network and how it was run, in words, once it is loaded."""
        order, place = self.sources[job.checkpoint]
        source = f"{order} images" + (f", {place}" if place else "")
        ranks = f"{distributed.world_size()} x {self.device.type}"
        if job.is_onnx:
            return f"ONNX model, onnxruntime on {ranks}, {source}"
        network = (
            f"{job.network.network}{' with SE' if job.network.SE else ''}, embedding_size "
            f"{job.network.embedding_size}"
        )
        return f"{network}, {self.precision} on {ranks}, {source}"

    def run_configuration(self, checkpoint: Path) -> dict:
        """The configuration that the checkpoint's run wrote beside it, as it is."""
        beside = run_beside(checkpoint)
        if beside:
            return read_json(beside, "a dict of configuration values")
        folder = checkpoint.absolute().parent
        return {"config.json": f"none in {folder}: how this network was trained is not known"}

    def settings(self, job: Job) -> dict:
        """What decides the figures besides the checkpoint: a report made with the same need not be
        made again.
        """
        settings = dict(network="onnx")
        if not job.is_onnx:
            settings = dict(
                network=job.network.network,
                embedding_size=job.network.embedding_size,
                SE=job.network.SE,
                precision=self.precision,
            )
        settings["color_space"] = self.color_space_of(job)
        settings["intervals"] = self.draws
        if self.groups:
            settings["groups"] = sha256(self.groups.path)
        settings["sets"] = {
            f"{test_set.kind}.{test_set.name}": dict(
                identity=test_set.identity, flip=test_set.options["flip"]
            )
            for test_set in job.test_sets
        }
        return settings


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """The flags that were named, as key=value, and the command line's own, some of which
    --val-targets and the like take for names when they follow them.
    """
    flags = {key: getattr(arguments, key) for key in FLAGS if getattr(arguments, key) is not None}
    overrides_behind = []
    for key, value in flags.items():
        if isinstance(value, list):
            overrides_behind += [name for name in value if "=" in name]
            flags[key] = ",".join(name for name in value if "=" not in name)
    overrides = [f"{key}={value}" for key, value in flags.items()]
    return overrides + overrides_behind + arguments.overrides
