"""What every training script does before its method: ranks, device, output folder, log, data,
student.
"""

import json
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

from backbones import build_backbone
from config.schema import read_json
from eval.benchmarks import benchmarks_of
from eval.verification import load_targets
from utils import distributed
from utils.checkpoint import RunFolder
from utils.dataset import FaceDatasetFolder, MXFaceDataset, check_classes
from utils.errors import InputError
from utils.hub import find_weights
from utils.loading import STOP_SIGNALS
from utils.logging import start_log
from utils.onnx_network import weight_files
from utils.precision import PRECISIONS, autocast, choose_precision
from utils.record_set import find_folders
from utils.recordio import replacing
from utils.staging import stage
from utils.teacher import ONNX, load_teacher, repository_of
from utils.teacher_cache import TeacherCache, open_cache, read_manifest
from utils.weights.centers import read_kernel
from utils.weights.load import load_backbone, run_beside
from utils.weights.read import digest_of, sha256, split_mark

# What weights are made for: a run cannot go on from its own with another value, but for most
# losses.
SETTLED = ("network", "SE", "embedding_size", "num_classes", "loss")
# how long ranks may see different files in the shared folder
STALE_LOOKS, STALE_SECONDS = 12, 5


class Run(NamedTuple):
    """Where and how this process trains."""

    device: torch.device
    precision: str  # "fp32", "bf16" or "fp16": "auto" is resolved
    folder: RunFolder
    resume_step: int  # 0: from the start


@contextmanager
def start(cfg, resume: bool):
    """Join the other ranks, take the device, prepare ``cfg.output``, start the log and seed the
    weights; leave the ranks at the end.
    """
    cv2.setNumThreads(0)  # images of 112x112 are too small to share out among threads
    device = distributed.init(
        cfg.device,
        max(distributed.TIMEOUT, timedelta(minutes=cfg.timeout + 5))
        if cfg.timeout
        else distributed.PATIENCE,
    )
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
    for step, damage in passed_over:
        logging.warning("step %d cannot be resumed from: %s; taking the one before", step, damage)
    torch.manual_seed(cfg.seed)
    yield Run(device, precision, folder, resume_step)
    # not after an error: closing the connections would end the other ranks before this one has said
    # why
    distributed.shutdown()


def where_to_resume(
    folder: RunFolder, global_step: int, resume: bool
) -> tuple[int, list[tuple[int, str]]]:
    """The step to go on from, 0 for a fresh start, and newer ones that cannot be read, with what is
    wrong; processes that torchrun has restarted take the newest state of their own run.

    A collective.
    Errors: InputError if a state was asked for and is not there, or if a fresh start would
    overwrite another run's checkpoints.
    """
    steps = agreed_steps(folder)
    # a machine that came back starts anew, the others restart: one that was restarted speaks for
    # all
    if any(distributed.all_gather_object(was_restarted(folder.path / "training.log"))):
        return newest_sound(folder, steps) if steps else (0, [])
    if global_step and global_step not in steps:
        raise InputError(
            f"global_step={global_step}: no complete state in {folder.path} "
            f"(complete: {', '.join(map(str, steps)) or 'none'})"
        )
    if global_step:
        return global_step, []
    if resume and not steps:
        raise InputError(
            "--resume: no complete state (<step>backbone.pth, <step>header.pth, "
            f"<step>state.pth) in {folder.path}; start without --resume"
        )
    if resume:
        return newest_sound(folder, steps)
    if folder.steps("backbone"):
        raise InputError(
            f"output: {folder.path} already holds checkpoints of a run; go on with "
            "--resume or choose another folder with output="
        )
    return 0, []


def agreed_steps(folder: RunFolder) -> list[int]:
    """The complete steps in the folder, as all ranks find them. Errors: InputError if they go on
    finding different ones: it is not one folder.

    A network file system may show a machine what it looked like half a minute ago.
    """
    for attempt in range(1 + STALE_LOOKS):
        steps = folder.complete_steps()
        found = distributed.all_gather_object(steps)
        if all(other == steps for other in found):
            return steps
        time.sleep(STALE_SECONDS)
    raise InputError(
        f"output: the ranks find different states in {folder.path} "
        f"({'; '.join(', '.join(map(str, other)) or 'none' for other in found)}): "
        "all machines must see one shared folder"
    )


def newest_sound(folder: RunFolder, steps: list[int]) -> tuple[int, list[tuple[int, str]]]:
    """The newest of these steps whose files can be read to the end, and the damage of newer ones;
    rank 0 reads them. Errors: InputError if there is none.
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
    """Whether the run in the folder is of this launch, and this process therefore not the first:
    one that was refused must not resume another's when it is restarted.

    torchrun counts no restart where machines only join again, so where restarts are allowed the launch's own name (RDZV_ID) is enough.
    """
    allowed = (
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        and os.environ["TORCHELASTIC_RUN_ID"] != "none"
    )
    return (
        bool(allowed)
        and log.is_file()
        and f"{launch_name()}\n" in log.read_text("utf-8", "replace")
    )


def write_config(cfg, resume_step: int) -> None:
    """Write config.json; when resuming, say what has changed since the run was started."""
    path = Path(cfg.output) / "config.json"
    if resume_step and path.exists():
        before = read_json(path)
        for key, value in cfg.items():
            if before.get(key) != value and key != "global_step":
                logging.warning(
                    "resumed with another %s: %r instead of %r", key, value, before.get(key)
                )
    with replacing(path) as file:
        file.write((json.dumps(dict(cfg), indent=2) + "\n").encode())


def check_settled(cfg, method: str, folder: RunFolder, step: int, state: dict) -> None:
    """Raises InputError if this run cannot go on from ``step``, whose ``state`` was read: it is of
    another method, network or number of classes, or exactly one of the two losses is AdaFace, whose
    statistics lie in the header."""
    if state["method"] != method:
        raise InputError(
            f"resume: {folder.path} holds a run of {state['method']}, this script "
            f"trains {method}: take that script, or another output="
        )
    config = folder.path / "config.json"
    # states of earlier versions do not say it themselves
    before = state.get("settings") or (read_json(config) if config.is_file() else {})
    now = {key: cfg[key] for key in SETTLED if key in before and before[key] != cfg[key]}
    if "AdaFace" not in (now.get("loss"), before.get("loss")):
        now.pop("loss", None)
    if not now:
        return
    backbone, header = folder.file(step, "backbone"), folder.header(step)
    if now.keys() <= {"loss"}:
        file, mend = (
            header,
            (f"start a new run (another output=) with pretrained_backbone_path={backbone}"),
        )
        if method != "AMLDistill":  # whose centres are the teacher's again
            mend += f" and pretrained_header_path={header}" + (
                ", put into one file by train/export_header.py" if header.is_dir() else ""
            )
    elif now.keys() <= {"loss", "num_classes"}:
        file, mend = (
            header,
            (
                "go on with the training set of that run, or start a new one "
                f"(another output=) with pretrained_backbone_path={backbone}"
            ),
        )
    else:
        file, mend = backbone, "set what it had, or another output= for a new run"
    then, this = (", ".join(f"{key}={values[key]}" for key in now) for values in (before, now))
    raise InputError(f"resume: {file} is of a run with {then}, this one has {this}: {mend}")


def build_dataset(cfg):
    """The training images of ``cfg``, from a copy on this machine if ``cfg.stage_to`` is set.

    Raises InputError if they are missing, empty, of one class, have labels that are no class or
    more classes than cfg.num_classes, or cannot be copied.
    """
    if cfg.db_file_format == "folder":
        dataset = FaceDatasetFolder(cfg.data_path, cfg.sample or None)
    else:
        rec = (
            distributed.once_per_node(lambda: stage_records(cfg.rec, cfg.stage_to))
            if cfg.stage_to
            else cfg.rec
        )
        dataset = MXFaceDataset(rec, cfg.rec_backend, cfg.num_classes or None, cfg.rec_labels)
    if cfg.num_classes and cfg.num_classes < dataset.num_classes:
        raise InputError(
            f"num_classes={cfg.num_classes} is smaller than the {dataset.num_classes} "
            f"classes of {dataset.root_dir}"
        )
    # the first rank looks for all; on a slow disk the others wait for it
    distributed.all_succeed(
        lambda: check_classes(dataset) if distributed.is_main() else None,
        distributed.patient_group(),
    )
    if cfg.num_image and cfg.num_image != len(dataset):
        logging.warning(
            "%s holds %d images, num_image says %d", dataset.root_dir, len(dataset), cfg.num_image
        )
    cfg.num_classes = cfg.num_classes or dataset.num_classes
    logging.info(
        "%d images of %d classes in %s", len(dataset), dataset.num_classes, dataset.root_dir
    )
    return dataset


def stage_records(rec: str | list[str], to: str) -> list[str]:
    """Copy the files of a set, and return what ``rec`` names in the copies."""
    staged = []
    for folder in find_folders(rec):
        if missing := [name for name in folder.recs if name not in folder.existing()]:
            raise InputError(
                f"no record file {os.path.join(folder.path, missing[0])}; check the "
                "path or make one with data/make_rec.py"
            )
        copy = stage(folder.path, folder.existing(), to)
        staged += [str(copy / name) for name in folder.recs]
    return staged


def build_student(cfg) -> torch.nn.Module:
    """The network to train, from ``cfg.pretrained_backbone_path`` if that is set."""
    student = build_backbone(cfg.network, cfg.embedding_size, use_se=cfg.SE)
    if cfg.pretrained_backbone_path:
        load_pretrained_backbone(student, cfg)
    logging.info(
        "Student %s: %s parameters",
        cfg.network,
        f"{sum(p.numel() for p in student.parameters()):,}",
    )
    return student


def load_pretrained_backbone(student: torch.nn.Module, cfg) -> None:
    """Start the student from a file; one that was trained on BGR images takes RGB afterwards.

    color_space is the teacher's, too, so it does not count for a file that a run of this project
    wrote: all its networks take RGB.
    """
    path, color_space = cfg.pretrained_backbone_path, cfg.color_space
    if color_space != "auto" and run_beside(path):
        if color_space == "BGR":
            logging.warning(
                "color_space=BGR does not count for %s: a run of this project wrote it", path
            )
        color_space = "auto"
    loaded = load_backbone(student, path, "pretrained_backbone_path", color_space=color_space)
    logging.info("Student from %s, trained on %s", path, loaded.describe())
    if loaded.color_space == "BGR":
        logging.info("Its first layer takes RGB now")


def header_options(cfg) -> dict:
    """The keyword arguments of build_header that the configuration sets."""
    names = (
        "s",
        "m",
        "h",
        "t_alpha",
        "adaptive_alpha",
        "use_geom_margin",
        "geom_margin_w",
        "geom_margin_k",
        "geom_margin_warmup_epoch",
        "sample_rate",
    )
    return {name: cfg[name] for name in names} | dict(
        centers_dtype=PRECISIONS[cfg.centers_precision] or torch.float32,
        centers_on_host=cfg.centers_device == "cpu",
    )


def load_pretrained_centers(header, cfg) -> None:
    """Start the class centres from ``cfg.pretrained_header_path``, if that is set."""
    if cfg.pretrained_header_path:
        load_centers(header, cfg, cfg.pretrained_header_path, "pretrained_header_path")


def load_teacher_centers(header, cfg) -> None:
    """Take the teacher's class centres, which AMLDistill never moves, from
    pretrained_teacher_header_path (or pretrained_header_path, not both).
    """
    if cfg.pretrained_header_path and cfg.pretrained_teacher_header_path:
        raise InputError(
            "AMLDistill's centres are the teacher's: set "
            "pretrained_teacher_header_path or pretrained_header_path, not both"
        )
    load_centers(
        header,
        cfg,
        cfg.pretrained_teacher_header_path or cfg.pretrained_header_path,
        "teacher header (pretrained_teacher_header_path)",
        "train a teacher with run_standalone.sh and take its last <step>header.pth, or "
        "compute the centres with train/class_centers.py",
    )


def load_centers(header, cfg, path: str, what: str, hint: str = "") -> None:
    """Set the header's class centres from a published header file.

    Errors: InputError if it is missing or of another shape.
    """
    header.load_kernel(read_kernel(path, what, cfg.embedding_size, cfg.num_classes, hint))
    logging.info("Class centres from %s", path)


def open_teacher(cfg, run: Run, dataset):
    """The teacher as a function ``batch -> (B, D) float32`` features without gradient, on this
    process's device.

    With ``cfg.teacher_embeddings`` they are read with the images of ``dataset``, and no teacher is
    built; else the teacher runs, compiled like the student. Errors: InputError if weights or cache
    are missing, do not fit, or have other than cfg.embedding_size dimensions.
    """
    if cfg.teacher_embeddings:
        dataset.teacher_features = open_teacher_cache(cfg, dataset)
        teacher = dataset.teacher_features.manifest["teacher"]
        keep_to_one_teacher(run, teacher["sha256"] or teacher["imported"])
        size = dataset.teacher_features.embedding_size
        if size != cfg.embedding_size:
            raise InputError(
                f"teacher_embeddings: {cfg.teacher_embeddings} holds {size}-d "
                f"features, but embedding_size={cfg.embedding_size}: the student learns in the "
                f"teacher's space: set embedding_size={size}, or choose a teacher of "
                f"{cfg.embedding_size} dimensions"
            )
        return lambda batch: batch.features
    teacher = load_teacher(cfg, cfg.embedding_size).to(
        run.device,
        memory_format=torch.channels_last if cfg.channels_last else torch.contiguous_format,
    )
    keep_to_one_teacher(run, teacher.sha256)
    network = torch.compile(teacher) if cfg.compile else teacher

    def features(batch):
        with autocast(run.device, run.precision):
            return network(batch.images)

    return features


def input_dtype(cfg, run: Run) -> torch.dtype:
    """bfloat16 where the first convolution of every network would round the images to it anyway;
    float32 for all else that reads them.
    """
    others = cfg.augment or cfg.teacher.startswith(ONNX) and not cfg.teacher_embeddings
    return torch.bfloat16 if run.precision == "bf16" and not others else torch.float32


def keep_to_one_teacher(run: Run, digest: str) -> None:
    """Remember the SHA-256 of the teacher in the run's folder.

    Errors: InputError if the ranks have different teachers, or a resumed run had another.
    """
    found = distributed.all_gather_object(digest)
    if len(set(found)) > 1:
        raise InputError(
            "the ranks have different teachers, SHA-256 "
            f"{', '.join(dict.fromkeys(found))}: give all machines the same file"
        )
    file = run.folder.path / "teacher.json"

    def compare():
        before = (
            json.loads(file.read_text())["sha256"] if run.resume_step and file.is_file() else digest
        )
        if before != digest:
            raise InputError(
                f"resume: {run.folder.path} was trained from a teacher with SHA-256 "
                f"{before}, this one has {digest}: set the same, or another output="
            )
        with replacing(file) as out:
            out.write((json.dumps(dict(sha256=digest)) + "\n").encode())

    distributed.main_computes(compare)


def open_teacher_cache(cfg, dataset) -> TeacherCache:
    """The features in ``cfg.teacher_embeddings``.

    Errors: as ``open_cache``; where pretrained_teacher_path or an ONNX file is set, they must be of
    its weights.
    """
    weights = Path(cfg.pretrained_teacher_path) if cfg.pretrained_teacher_path else None
    if weights and weights.is_dir():
        weights = find_weights(weights)
    if weights and not split_mark(weights)[0].is_file():
        raise InputError(
            f"teacher: no file at {weights}, whose features teacher_embeddings should "
            "be; without pretrained_teacher_path they are taken as they are"
        )
    if cfg.teacher.startswith(ONNX):
        digest = sha256(*weight_files(Path(cfg.teacher.removeprefix(ONNX))))
    else:
        digest = digest_of(weights) if weights else None
    path = Path(cfg.teacher_embeddings)
    if cfg.stage_to:
        read_manifest(path)  # if it is not complete, say so
        path = distributed.once_per_node(
            lambda: stage(path, ["features.npy", "manifest.json"], cfg.stage_to)
        )
    cache = open_cache(path, dataset, digest, cfg.color_space, repository_of(cfg))
    logging.info("Teacher features from %s", cache.describe())
    return cache


class Validation(NamedTuple):
    """What a run is measured on: {name: (images, issame)} of the pair sets, and IJB and
    TinyFace.
    """

    pair_sets: dict
    benchmarks: list


def load_validation(cfg) -> Validation:
    """Read and check everything that is to be measured, before the first step: a set that is
    missing or damaged must not end a run after hours.
    """
    return Validation(
        load_targets(cfg.val_rec, cfg.val_targets) if cfg.val_targets else {}, benchmarks_of(cfg)
    )


class StopRequest:
    """SIGTERM, SIGUSR1 or Ctrl-C asks a run to finish its step and save (a second Ctrl-C ends it at
    once); all ranks agree on the step.

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
