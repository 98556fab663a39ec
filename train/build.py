"""What a run is made of, from its configuration: data set, student, header, teacher, validation."""

import logging
from inspect import signature
from pathlib import Path

import torch
from easydict import EasyDict

from backbones import build_backbone
from train.start_up import Run
from utils import distributed, losses
from utils.dataset.classes import check_classes
from utils.dataset.folder import FaceDatasetFolder
from utils.dataset.records import MXFaceDataset
from utils.dataset.staging import stage
from utils.errors import InputError
from utils.files import read_json, write_json
from utils.losses import Header
from utils.precision import PRECISIONS, autocast
from utils.recordio.files import find_folders
from utils.teacher.cache import TeacherCache, open_cache, read_manifest
from utils.teacher.hub import find_weights
from utils.teacher.load import load_teacher
from utils.teacher.names import ONNX, repository_of
from utils.teacher.onnx_graph import weight_files
from utils.weights.class_centers import read_kernel
from utils.weights.load import load_backbone, run_beside
from utils.weights.read import digest_of, sha256, split_mark


def build_dataset(cfg):
    """The training images of ``cfg``, from a copy on this machine if ``cfg.stage_to`` is set.

    Raises InputError if they are missing, empty, of one class, have labels that are no class or
    more classes than cfg.num_classes, or cannot be copied.
    """
    if cfg.db_file_format == "folder":
        dataset = FaceDatasetFolder(cfg.data_path, cfg.sample or None)
    else:
        rec = cfg.rec
        if cfg.stage_to:
            rec = distributed.once_per_node(lambda: stage_records(cfg.rec, cfg.stage_to))
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
    logging.info(
        "%d images of %d classes in %s", len(dataset), dataset.num_classes, dataset.root_dir
    )
    return dataset


def with_classes(cfg, dataset):
    """The configuration with the number of classes of ``dataset``, where it leaves that open."""
    return EasyDict(cfg, num_classes=cfg.num_classes or dataset.num_classes)


def stage_records(rec: str | list[str], to: str) -> list[str]:
    """Copy the files of a set, and return what ``rec`` names in the copies."""
    staged = []
    for folder in find_folders(rec):
        if missing := [name for name in folder.recs if name not in folder.existing()]:
            raise InputError(
                f"no record file {Path(folder.path, missing[0])}; check the path "
                "or make one with data/make_rec.py"
            )
        copy = stage(folder.path, folder.existing(), to)
        staged += [str(copy / name) for name in folder.recs]
    return staged


def build_student(cfg) -> torch.nn.Module:
    """The network to train, from ``cfg.pretrained_backbone_path`` if that is set."""
    student = build_backbone(cfg.network, cfg.embedding_size, use_se=cfg.SE)
    if cfg.pretrained_backbone_path:
        load_pretrained_backbone(student, cfg)
    parameters = sum(p.numel() for p in student.parameters())
    logging.info("Student %s: %s parameters", cfg.network, f"{parameters:,}")
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


def build_header(cfg, method: str) -> Header:
    """The header of ``method`` as the configuration describes it."""
    # parameters and configuration keys bear the same names
    options = {name: cfg[name] for name in signature(losses.build_header).parameters if name in cfg}
    return losses.build_header(
        method,
        centers_dtype=PRECISIONS[cfg.centers_precision] or torch.float32,
        centers_on_host=cfg.centers_device == "cpu",
        **options,
    )


def load_pretrained_centers(header, cfg) -> None:
    """Start the class centres from ``cfg.pretrained_header_path``, if that is set."""
    if cfg.pretrained_header_path:
        load_centers(header, cfg, cfg.pretrained_header_path, "pretrained_header_path")


def load_teacher_centers(header, cfg) -> None:
    """Take the teacher's class centres, which AMLDistill never moves.

    From pretrained_teacher_header_path or pretrained_header_path; raises InputError if both are
    set. Where header_weight=0 leaves the header out, neither need be.
    """
    if cfg.pretrained_header_path and cfg.pretrained_teacher_header_path:
        raise InputError(
            "AMLDistill's centres are the teacher's: set "
            "pretrained_teacher_header_path or pretrained_header_path, not both"
        )
    path = cfg.pretrained_teacher_header_path or cfg.pretrained_header_path
    if not path and not cfg.header_weight:
        return
    load_centers(
        header,
        cfg,
        path,
        "teacher header (pretrained_teacher_header_path)",
        "train a teacher with run_standalone.sh and take its last <step>header.pth, or "
        "compute the centres with train/class_centers.py",
    )


def load_centers(header, cfg, path: str, what: str, hint: str = "") -> None:
    """Set the header's class centres from a published header file.

    what, hint: of an error's message, what the file is and how to get it. Raises InputError if it
    is missing or of another shape.
    """
    header.load_kernel(read_kernel(path, what, cfg.embedding_size, cfg.num_classes, hint))
    logging.info("Class centres from %s", path)


def open_teacher(cfg, run: Run, dataset):
    """The teacher as a function ``batch -> (B, D) float32`` features, without gradient.

    They are on this process's device. With ``cfg.teacher_embeddings`` they are read with the images
    of ``dataset``, and no teacher is built; else the teacher runs, compiled like the student.
    Raises InputError if weights or cache are missing, do not fit, or have other than
    cfg.embedding_size dimensions.
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
    teacher = load_teacher(cfg, cfg.embedding_size)
    teacher.to(run.device, memory_format=memory_format(cfg))
    keep_to_one_teacher(run, teacher.sha256)
    network = torch.compile(teacher) if cfg.compile else teacher

    def features(batch):
        with autocast(run.device, run.precision):
            return network(batch.images)

    return features


def memory_format(cfg) -> torch.memory_format:
    """The layout in memory of networks and images."""
    return torch.channels_last if cfg.channels_last else torch.contiguous_format


def input_dtype(cfg, run: Run) -> torch.dtype:
    """bfloat16 where the first convolution of every network rounds the images to it anyway.

    float32 for all else that reads them: augmentation, a live ONNX teacher.
    """
    live_onnx = cfg.teacher.startswith(ONNX) and not cfg.teacher_embeddings
    if run.precision == "bf16" and not cfg.augment and not live_onnx:
        return torch.bfloat16
    return torch.float32


def keep_to_one_teacher(run: Run, digest: str) -> None:
    """Remember the SHA-256 of the teacher in the run's folder.

    Raises InputError if the ranks have different teachers, or a resumed run had another.
    """
    digests = distributed.all_gather_object(digest)
    if len(set(digests)) > 1:
        raise InputError(
            f"the ranks have different teachers, SHA-256 {', '.join(dict.fromkeys(digests))}: "
            "give all machines the same file"
        )
    file = run.folder.path / "teacher.json"

    def compare():
        if run.resume_step and file.is_file():
            before = read_json(file)["sha256"]
            if before != digest:
                raise InputError(
                    f"resume: {run.folder.path} was trained from a teacher with SHA-256 "
                    f"{before}, this one has {digest}: set the same, or another output="
                )
        write_json(file, dict(sha256=digest))

    distributed.main_computes(compare)


def open_teacher_cache(cfg, dataset) -> TeacherCache:
    """The features in ``cfg.teacher_embeddings``.

    Raises InputError as ``open_cache`` does, and where pretrained_teacher_path or an ONNX file is
    set and they are of other weights.
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
        # refuses one that is not complete
        read_manifest(path)
        path = distributed.once_per_node(
            lambda: stage(path, ["features.npy", "manifest.json"], cfg.stage_to)
        )
    cache = open_cache(path, dataset, digest, cfg.color_space, repository_of(cfg))
    logging.info("Teacher features from %s", cache.describe())
    return cache
