"""What a run will be, before it starts: steps, learning rates, memory, files; --measure: hours.

    python train/plan.py --config config/recipes/arcface_mbf.py --method standalone
    NPROC_PER_NODE=8 python train/plan.py loss=CosFace output=output/cos
    python train/plan.py --measure loss=CosFace output=output/cos

takes what the run script of the method takes, and asks for the same number of processes
(NPROC_PER_NODE, NNODES). Where the training set is not there yet, its size is what num_classes and
num_image say. --measure trains for a minute in a folder of its own, by one process, and keeps
nothing.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from easydict import EasyDict

from backbones import build_backbone
from config import rules
from config.load import argument_parser, load_config
from deploy.measure import count_in_network
from train import build, start_up, train_AdaDistill, train_AMLDistill, train_standalone
from train.run_state import in_shards
from train.schedule import images_of_step, learning_rate, steps_of_epoch
from utils.errors import InputError, run
from utils.files import read_json
from utils.losses.center_storage import classes_sampled
from utils.losses.centers import CENTERS
from utils.precision import PRECISIONS
from utils.recordio.files import find_folders
from utils.teacher.names import ONNX, TEACHERS, full_name

SCRIPTS = {
    "standalone": train_standalone,
    "AMLDistill": train_AMLDistill,
    "AdaDistill": train_AdaDistill,
}
SECONDS = 60
# Steps before the measurement: memory is found, the network compiled.
WARM_UP = 2
# Lines and columns of the plot of the learning rate.
LINES = 20
BAR = 50


class Size(NamedTuple):
    """The training set, and what it is known from."""

    images: int
    classes: int
    source: str


def main() -> None:
    arguments = parse_arguments()
    cfg = load_config(arguments.config, arguments.overrides)
    method = arguments.method or method_of(arguments.config)
    rules.check_training(cfg, method)
    processes = count_processes(cfg)
    size = size_of_set(cfg)
    cfg = EasyDict(cfg, num_classes=size.classes)
    steps = steps_of_epoch(cfg, size.images, processes)
    print(f"{method}, {cfg.loss}, {cfg.network}, output {cfg.output}\n")
    describe_steps(cfg, size, steps, processes)
    plot_rates(cfg, processes)
    student = build_backbone(cfg.network, cfg.embedding_size, use_se=cfg.SE)
    line("student", describe(student, cfg.network))
    line("teacher", describe_teacher(cfg, method))
    line("a rank holds", describe_memory(cfg, method, processes))
    describe_files(cfg, method, steps, student)
    if not arguments.measure:
        line("time", "--measure trains for a minute to tell")
        return
    seconds = seconds_of_step(cfg, method)
    total = seconds * steps * cfg.num_epoch / 3600
    rate = images_of_step(cfg, processes) / seconds
    line(
        "time",
        f"{total:.1f} hours at {rate:,.0f} images a second ({seconds:.3f} s a step of one process "
        f"here; {processes} at once as fast), without verification and saving",
    )


def method_of(config: str) -> str:
    """Of the run whose config.json it is, else AdaDistill."""
    if Path(config).suffix != ".json":
        return "AdaDistill"
    return read_json(config, "a dict of configuration values").get("method", "AdaDistill")


def line(what: str, text: str) -> None:
    print(f"{what:<14} {text}")


def count_processes(cfg) -> int:
    """As many as the run scripts start. Raises InputError where torchrun would decide."""
    gpus = torch.cuda.device_count() if cfg.device in ("auto", "cuda") else 1
    processes = 1
    for name, otherwise in (("NPROC_PER_NODE", max(1, gpus)), ("NNODES", 1)):
        value = os.environ.get(name) or str(otherwise)
        if not value.isdecimal() or int(value) == 0:
            raise InputError(f"{name}={value}: a plan is for a number of processes, such as 8")
        processes *= int(value)
    return processes


def size_of_set(cfg) -> Size:
    """Of the set that is there, else what the configuration says of it.

    Raises InputError where neither tells, and if the set that is there cannot be trained on.
    """
    if not is_there(cfg) and cfg.num_image and cfg.num_classes:
        place = cfg.data_path if cfg.db_file_format == "folder" else cfg.rec
        source = f"num_image and num_classes say so; no set at {place}"
        return Size(cfg.num_image, cfg.num_classes, source)
    # a plan copies nothing
    dataset = build.build_dataset(EasyDict(cfg, stage_to=""))
    return Size(len(dataset), cfg.num_classes or dataset.num_classes, str(dataset.root_dir))


def is_there(cfg) -> bool:
    if cfg.db_file_format == "folder":
        return Path(cfg.data_path).exists()
    return any(folder.existing() for folder in find_folders(cfg.rec))


def describe_steps(cfg, size: Size, steps: int, processes: int) -> None:
    line("images", f"{size.images:,} of {size.classes:,} people ({size.source})")
    line(
        "global batch",
        f"{cfg.batch_size * processes} images: {cfg.batch_size} x {processes} processes",
    )
    line("step", f"{images_of_step(cfg, processes)} images, accumulate={cfg.accumulate}")
    left = size.images - steps * images_of_step(cfg, processes)
    line("epoch", f"{steps:,} steps; {left} images, others each time, are left out")
    line("run", f"{cfg.num_epoch} epochs, {steps * cfg.num_epoch:,} steps")


def plot_rates(cfg, processes: int) -> None:
    """The rate at the start of each epoch; epochs of the same rate, or of many, in one line.

    The highest and the last rate always have theirs.
    """
    rates = [learning_rate(cfg, epoch, 0.0, processes) for epoch in range(cfg.num_epoch)]
    shown = [e for e in range(cfg.num_epoch) if e == 0 or rates[e] != rates[e - 1]]
    if len(shown) > LINES:
        every = -(-len(shown) // LINES)
        shown = sorted({*shown[::every], rates.index(max(rates)), shown[-1]})
    print("\nepoch          learning rate")
    for epoch in shown:
        bar = "#" * round(BAR * rates[epoch] / max(rates)) if max(rates) else ""
        line(f"from {epoch}", f"{rates[epoch]:<10.4g} {bar}")
    print()


def describe(network: torch.nn.Module, name: str) -> str:
    """Parameters, and multiply-adds of convolutions and linear layers for one image."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    multiply_adds = count_in_network(network.eval()) / 1e6
    return f"{name}: {parameters:,} parameters, {multiply_adds:,.0f} M multiply-adds an image"


def describe_teacher(cfg, method: str) -> str:
    needed = CENTERS[method].follows_teacher
    if method == "AMLDistill":
        needed = cfg.use_geom_margin or cfg.feature_weight
    if not needed:
        return "none is run"
    if cfg.teacher_embeddings:
        return f"its features are in {cfg.teacher_embeddings}"
    if cfg.teacher.startswith(ONNX):
        return f"{cfg.teacher} (deploy/benchmark.py counts what it computes)"
    spec = TEACHERS[cfg.teacher]
    network = build_backbone(spec.network, cfg.embedding_size, use_se=spec.use_se)
    return describe(network, full_name(cfg.teacher))


def describe_memory(cfg, method: str, processes: int) -> str:
    """What the classes take on the rank that has the most of them."""
    rows = -(-cfg.num_classes // processes)
    batch = cfg.batch_size * processes
    text = f"{gigabytes(bytes_of_centers(cfg, rows))} of centres"
    matrices = 1
    if CENTERS[method].learned:
        text += ", as much of their momentum"
        # their gradients wait for the step
        matrices = cfg.accumulate
    if cfg.centers_device == "cpu":
        text += " (in the host's memory)"
    if not cfg.header_weight:
        return text
    logits = matrices * 4 * batch * classes_sampled(cfg.sample_rate, rows, batch)
    return f"{text}, {gigabytes(logits)} of logits"


def describe_files(cfg, method: str, steps: int, student: torch.nn.Module) -> None:
    """What is saved when, and the disk it takes."""
    weights = sum(value.nbytes for value in student.state_dict().values())
    # momentum
    state = sum(parameter.nbytes for parameter in student.parameters())
    centers = bytes_of_centers(cfg, cfg.num_classes)
    shards = in_shards(cfg.header_format, centers)
    header = centers if shards else 4 * cfg.num_classes * cfg.embedding_size
    if CENTERS[method].learned:
        # their momentum, which shards hold, too
        header += centers if shards else 0
        state += 0 if shards else centers
    kept = weights + header + (weights if cfg.ema else 0)
    line("saved", f"at the end of each epoch, every {cfg.state_every} steps, when asked to stop:")
    line("", f"{gigabytes(weights)} <step>backbone.pth")
    line("", f"{gigabytes(header)} <step>header{'/' if shards else '.pth'}")
    if cfg.ema:
        line("", f"{gigabytes(weights)} <step>ema.pth")
    line("", f"{gigabytes(state)} <step>state.pth")
    line(
        "kept", f"the weights of {cfg.num_epoch} epochs' ends, the newest {cfg.keep_states} states"
    )
    saves = cfg.num_epoch * -(-steps // cfg.state_every)
    at_end = cfg.num_epoch * kept + min(cfg.keep_states, saves) * state
    at_end += weights if cfg.val_targets else 0
    # a step is written before an old one goes; states within an epoch keep their weights
    most = at_end + state + kept
    if steps > cfg.state_every:
        most += cfg.keep_states * kept
    line("disk", f"{gigabytes(at_end)} in the end, up to {gigabytes(most)} on the way")


def bytes_of_centers(cfg, rows: int) -> int:
    dtype = PRECISIONS[cfg.centers_precision] or torch.float32
    return rows * cfg.embedding_size * dtype.itemsize


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def seconds_of_step(cfg, method: str) -> float:
    """Seconds of a step of one process, in a minute of training that leaves nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        own = dict(output=folder, global_step=0, val_targets=[], eval_ijb=False)
        cfg = EasyDict(cfg, **own, eval_tinyface=False)
        with start_up.start(cfg, False) as run_:
            engine = SCRIPTS[method].engine_of(cfg, run_)
            batches = engine.feed.read(engine.position)
            steps = engine.feed.steps_per_epoch
            uncounted = min(WARM_UP, steps - 1)
            for step in range(steps):
                if step == uncounted:
                    started = time.monotonic()
                loss, _ = engine.train_step(batches)
                # waits for the device
                float(loss)
                seconds = time.monotonic() - started if step >= uncounted else 0.0
                if seconds > SECONDS:
                    break
            engine.feed.close()
    return seconds / (step + 1 - uncounted)


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__, "loss=CosFace output=output/cos")
    parser.add_argument(
        "--method",
        choices=list(SCRIPTS),
        help="whose run it is (default: that of a run's config.json, else AdaDistill)",
    )
    parser.add_argument(
        "--measure", action="store_true", help="train for a minute to tell the time"
    )
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run(main)
