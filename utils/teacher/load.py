"""The teacher: any published face network, loaded strictly, frozen, in eval mode, never random."""

import logging
from pathlib import Path

import torch
from torch import nn

from utils.errors import InputError
from utils.teacher.hub import fetch, find_weights
from utils.teacher.names import ONNX, TEACHERS, TeacherSpec, full_name, repository_of
from utils.teacher.onnx import OnnxNetwork
from utils.teacher.onnx_graph import NORMALISED
from utils.weights.cvlface import CONFIGURATIONS, PublishedConfig, read_configuration
from utils.weights.load import embedding_size_in, load_network, read_weights
from utils.weights.read import digest_of, sha256

HINT = (
    "train one with run_standalone.sh, set pretrained_teacher_path to a published backbone, or "
    "teacher=cvlface_ir50 to fetch one"
)

log = logging.getLogger(__name__)


class Teacher(nn.Module):
    """A frozen network: (B, 3, 112, 112) RGB in [-1, 1] -> (B, D) float32, without gradient.

    Of one that ``load_teacher`` made: name (the configuration's word), path and sha256 (of the file
    that its weights are from), color_space ("RGB" or "BGR": of the images it was trained on) and
    own_color_space (what that would be if the configuration did not set it), normalisation (of
    pixels x, in words), embedding_size (D).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str = "",
        path: str = "",
        sha256: str = "",
        normalisation: str = NORMALISED.description,
        embedding_size: int = 0,
        color_space: str = "RGB",
        own_color_space: str = "",
    ):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name = name
        self.path = path
        self.sha256 = sha256
        self.normalisation = normalisation
        self.embedding_size = embedding_size
        self.color_space = color_space
        self.own_color_space = own_color_space or color_space

    def train(self, mode: bool = True):
        # BatchNorm of a teacher must never follow the student's batches
        return super().train(False)

    @torch.no_grad()
    def forward(self, images):
        return self.network(images).float()


def load_teacher(cfg, embedding_size: int | None = None) -> Teacher:
    """The teacher that ``cfg`` names, with its published weights.

    What it is and what it sees is logged.
    cfg: teacher, pretrained_teacher_path, teacher_repo_id, teacher_cache and color_space are read.
    embedding_size: the number of dimensions its features must have; None: any.
    Raises InputError if the weights are missing, cannot be fetched or read, or are of another
    network, colour order or number of dimensions.
    """
    path, repo_id = cfg.pretrained_teacher_path, cfg.teacher_repo_id
    if path and repo_id:
        raise InputError(
            f"pretrained_teacher_path={path} and teacher_repo_id={repo_id} both name the teacher's "
            "weights: keep the one that is meant, empty the other"
        )
    if not cfg.teacher.startswith(ONNX):
        teacher, source = load_published(cfg)
    elif path or repo_id:
        raise InputError(
            f"teacher={cfg.teacher} names its file itself: empty "
            f"{'pretrained_teacher_path' if path else 'teacher_repo_id'}"
        )
    else:
        teacher, source = load_onnx(cfg)
    if embedding_size and teacher.embedding_size != embedding_size:
        raise InputError(
            f"teacher: {cfg.teacher} ({teacher.path}) has {teacher.embedding_size}-d features, but "
            f"embedding_size={embedding_size}: the student learns in the teacher's space: set "
            f"embedding_size={teacher.embedding_size}, or choose a teacher of {embedding_size} "
            "dimensions"
        )
    count = getattr(teacher.network, "parameter_count", 0)
    log.info(
        "Teacher %s: %s parameters, %d-d features, 112x112 %s input, %s, %s, SHA-256 %s",
        full_name(cfg.teacher),
        f"{count or sum(parameter.numel() for parameter in teacher.network.parameters()):,}",
        teacher.embedding_size,
        teacher.color_space,
        teacher.normalisation,
        source,
        teacher.sha256,
    )
    return teacher


def load_published(cfg) -> tuple[Teacher, str]:
    """A teacher that is one of our networks, and where its weights are from."""
    spec = TEACHERS[cfg.teacher]
    file, source, published = locate(cfg)
    check_published(published, cfg.teacher, spec)
    weights = read_weights(file, "teacher", HINT)
    size = embedding_size_in(weights.content, spec.network, spec.use_se) or 512
    network, loaded = load_network(
        spec.network,
        size,
        spec.use_se,
        weights,
        color_space=cfg.color_space,
        key="teacher",
        published=published,
    )
    # one file of a repository: its configuration may be beside it
    published = loaded.published
    check_published(published, cfg.teacher, spec)
    if published and published.embedding_size != size:
        raise InputError(
            f"teacher: {published.path} states output_dim {published.embedding_size}, but the "
            f"features of {file} have {size} dimensions"
        )
    own = loaded.own_color_space
    for quantity, value, expected in (
        ("colour order", own, spec.color_space),
        ("dimensions", size, spec.embedding_size),
    ):
        if expected and value != expected:
            raise InputError(
                f"teacher: {file} has {quantity} {value or 'unknown'}, but teacher={cfg.teacher} "
                f"has {expected}: set teacher={spec.network}"
            )
    teacher = Teacher(
        network,
        name=cfg.teacher,
        path=str(file),
        sha256=digest_of(file),
        embedding_size=size,
        color_space=loaded.color_space,
        own_color_space=own,
    )
    return teacher, source + (f" ({loaded.place})" if loaded.place else "")


def load_onnx(cfg) -> tuple[Teacher, str]:
    """A teacher that is an ONNX model, and its path; InsightFace's take RGB."""
    path = Path(cfg.teacher.removeprefix(ONNX)).expanduser()
    network = OnnxNetwork(path, color_space=cfg.color_space)
    teacher = Teacher(
        network,
        name=cfg.teacher,
        path=str(network.path),
        sha256=sha256(*network.files),
        normalisation=network.scale.description,
        embedding_size=network.embedding_size,
        color_space=network.color_space,
        own_color_space=network.own_color_space,
    )
    return teacher, str(network.path)


def locate(cfg) -> tuple[Path | str, str, PublishedConfig | None]:
    """The weights' file, where it is from in words, what the configuration beside it states.

    They are fetched where a repository is meant.
    """
    path, repo_id = cfg.pretrained_teacher_path, repository_of(cfg)
    if repo_id:
        folder = fetch(repo_id, cfg.teacher_cache)
        source = f"{repo_id} at revision {folder.name}"
        return find_weights(folder), source, configuration_of(folder)
    if path and Path(path).is_dir():
        file = find_weights(Path(path))
        return file, str(file), configuration_of(Path(path))
    return Path(path) if path else "", path, None


def configuration_of(folder: Path) -> PublishedConfig:
    published = read_configuration(folder)
    if published is None:
        raise InputError(
            f"teacher: {folder} has no configuration of CVLFace's "
            f"({' or '.join(CONFIGURATIONS)}); set pretrained_teacher_path to the weights' file"
        )
    return published


def check_published(published: PublishedConfig | None, name: str, spec: TeacherSpec) -> None:
    """Refuse a repository whose configuration is not that of the teacher ``name``."""
    if published is None:
        return
    if published.network != spec.full_name:
        raise InputError(
            f"teacher: {published.path} states the network {published.network}, not that of "
            f"teacher={name}: set teacher={published.network}"
        )
    for key, value, expected in (
        ("color_space", published.color_space, spec.color_space),
        ("output_dim", published.embedding_size, spec.embedding_size),
    ):
        if expected and value != expected:
            raise InputError(
                f"teacher: {published.path} states {key} {value}, but teacher={name} has "
                f"{expected}: set teacher={published.network}, which goes by the configuration"
            )
