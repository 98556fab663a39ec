"""From a checkpoint to figures: the one evaluation path, and the flags, of run_full_eval.py and
run_batch_eval.py.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from easydict import EasyDict

from config.schema import ROOT, load_config
from eval.benchmarks import KINDS, make, run_benchmark
from eval.report.files import prepare_folder
from utils import distributed
from utils.errors import InputError
from utils.files import read_json
from utils.precision import PRECISIONS, choose_precision
from utils.teacher.load import Teacher
from utils.teacher.onnx import OnnxNetwork, weight_files
from utils.weights.colours import ORDERS
from utils.weights.load import empty_backbone, load_backbone, run_beside
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
        help="configuration (default: "
        "config/config.py, and the validation sets of the run's config.json); "
        "the network always is that of the config.json beside the checkpoint, if "
        "there is one",
    )
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--color-space",
        choices=ORDERS,
        help="order of the colours that the checkpoint was trained on (auto: as its file says; BGR "
        "for "
        "AdaFace's .ckpt files). A run's config.json does not count, it speaks of the run's teacher",
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
        help="keep features there and use "
        "what is there, by checkpoint and set: "
        "an interrupted evaluation goes on, a second one does not run the network",
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
        "overrides",
        nargs="*",
        metavar="key=value",
        help="other configuration values, e.g. network=iresnet50",
    )


class Job(NamedTuple):
    """One checkpoint, the configuration that names its network (an ONNX model is its own network),
    and what to measure it on.
    """

    checkpoint: Path
    network: EasyDict
    benchmarks: list

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
        self.features = arguments.features
        if self.features:
            prepare_folder(self.features, "--features")
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

    def color_space_of(self, job: "Job") -> str:
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
        return Job(
            checkpoint, network, self.find_benchmarks(self.cfg if self.config_named else network)
        )

    def find_benchmarks(self, cfg) -> list:
        """What is there of the sets that ``cfg`` or the command line names, each read once however
        many checkpoints need it.
        """
        kinds = [self.find_of_kind(kind, cfg) for kind in KINDS]
        found = [benchmark for of_kind, _, _ in kinds for benchmark in of_kind]
        missing = {path: name for _, of_kind, _ in kinds for path, name in of_kind.items()}
        errors = [error for _, _, error in kinds if error]
        self.skipped |= missing
        if not found:
            raise InputError(
                "nothing to evaluate on: "
                + (
                    "; ".join(f"{name}: no {path}" for path, name in missing.items())
                    or "no validation sets are configured"
                )
                + "; name a folder with --val-data (--ijb-root, --tinyface-root) and "
                "sets with --val-targets (--ijb-targets, --tinyface-targets)"
            )
        if errors:
            raise errors[0]
        return found

    def find_of_kind(self, kind, cfg) -> tuple[list, dict, InputError | None]:
        """(the benchmarks of a kind, {path: name} of those that are not there, why a folder that
        the command line names has none).
        """
        root_key, targets_key, *_ = kind.keys
        root, found, missing, why = Path(cfg[root_key]), [], {}, None
        if root_key in self.named and not root.is_dir():
            raise InputError(
                f"--{root_key.replace('_', '-').replace('val-rec', 'val-data')}: no folder {root}"
            )
        for name in dict.fromkeys(cfg[targets_key] if cfg[root_key] else []):
            try:
                path = kind.find(root, name)
            except InputError as error:
                if targets_key in self.named:
                    raise
                missing[root / kind.pattern.format(name)], why = name, error
                continue
            if path not in self.loaded:
                self.loaded[path] = kind.load(root, name)
            found.append(make(kind, name, self.loaded[path], cfg))
        return found, missing, why if root_key in self.named and not found else None

    def evaluate_checkpoint(self, job: Job, exhibits: list | None = None) -> dict:
        """{"verification": {set: figures}, "ijb": {set: figures}, "tinyface": {set: figures}} as
        the public functions of eval/ return them.

        exhibits: a list to which rank 0 adds what a report page shows.
        Raises InputError if the file is missing, unreadable, of another network, an image
        unreadable, or a feature not finite.
        """
        backbone = self.load(job)
        options = dict(
            device=self.device,
            precision=self.precision,
            channels_last=self.cfg.channels_last,
            features=self.features,
            checkpoint=job.sha256() if self.features else "",
            color_space=self.order(job),
            exhibits=exhibits,
        )
        results = {"verification": {}, "ijb": {}, "tinyface": {}}
        for benchmark in job.benchmarks:
            results[benchmark.kind][benchmark.name] = run_benchmark(benchmark, backbone, **options)
        return results

    def load(self, job: Job) -> torch.nn.Module:
        """The network on this rank's device, RGB images to features, whatever it was trained on."""
        asked = self.color_space_of(job)
        if job.is_onnx:
            network = OnnxNetwork(job.checkpoint, "checkpoint", asked)
            self.sources[job.checkpoint] = (network.color_space, network.choice)
            return Teacher(network).to(self.device)
        cfg = job.network
        network = empty_backbone(cfg.network, cfg.embedding_size, cfg.SE)
        loaded = load_backbone(network, job.checkpoint, "checkpoint", color_space=asked)
        place = f"weights of {loaded.place}" if loaded.place else ""
        self.sources[job.checkpoint] = (loaded.color_space, place)
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
        return (
            read_json(beside, "a dict of configuration values")
            if beside
            else {
                "config.json": "none in "
                f"{checkpoint.absolute().parent}: how this network was trained is not known"
            }
        )

    def settings(self, job: Job) -> dict:
        """What decides the figures besides the checkpoint: a report made with the same need not be
        made again.
        """
        network = (
            dict(network="onnx")
            if job.is_onnx
            else dict(
                network=job.network.network,
                embedding_size=job.network.embedding_size,
                SE=job.network.SE,
                precision=self.precision,
            )
        )
        return dict(
            **network,
            color_space=self.color_space_of(job),
            sets={
                f"{benchmark.kind}.{benchmark.name}": dict(
                    identity=benchmark.identity, flip=benchmark.options["flip"]
                )
                for benchmark in job.benchmarks
            },
        )


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """The flags that were named, as key=value, and the command line's own, some of which
    --val-targets and the like take for names when they follow them.
    """
    flags = {key: getattr(arguments, key) for key in FLAGS if getattr(arguments, key) is not None}
    behind = []
    for key, words in flags.items():
        if isinstance(words, list):
            behind += [word for word in words if "=" in word]
            flags[key] = ",".join(word for word in words if "=" not in word)
    return [f"{key}={value}" for key, value in flags.items()] + behind + arguments.overrides
