"""The teacher: any published face network, loaded strictly, frozen, in eval mode, outside
DistributedDataParallel, and never random.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from backbones import NAMES
from utils.errors import InputError
from utils.teacher.hub import CONFIGURATIONS, Stated, fetch, find_weights, read_configuration
from utils.teacher.onnx import NORMALISED, OnnxNetwork
from utils.weights.load import embedding_size_in, empty_backbone, load_into, read_weights
from utils.weights.read import digest_of, sha256

HINT = (
    "train one with run_standalone.sh, set pretrained_teacher_path to a published backbone, or "
    "teacher=cvlface_ir50 to fetch one"
)
ONNX = "onnx:"  # onnx:PATH, any ONNX face model

log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """What a name of ``config.teacher`` stands for: one of our networks; and of a repository, what
    its configuration must say.
    """

    network: str
    use_se: bool = False
    repo_id: str = ""  # read unless another repository or a path is set
    color_space: str = ""  # "": what the file or its configuration says
    embedding_size: int = 0  # 0: likewise


TEACHERS = (
    {name: Entry(name) for name in NAMES}
    | {f"{name}_se": Entry(name, use_se=True) for name in NAMES if name.startswith("iresnet")}
    | {
        "cvlface_ir50": Entry(
            "ir50",
            repo_id="minchul/cvlface_adaface_ir50_webface4m",
            color_space="RGB",
            embedding_size=512,
        ),
        "cvlface_ir101": Entry(
            "ir101",
            repo_id="minchul/cvlface_adaface_ir101_webface12m",
            color_space="RGB",
            embedding_size=512,
        ),
    }
)


class Teacher(nn.Module):
    """A frozen network: (B, 3, 112, 112) RGB in [-1, 1] -> (B, D) float32 features without
    gradient.

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
        normalisation: str = NORMALISED.words,
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
    """The teacher that ``cfg`` names, with its published weights; what it is and what it sees is
    logged.

    cfg: teacher, pretrained_teacher_path, teacher_repo_id, teacher_cache and color_space are read.
    embedding_size: the number of dimensions its features must have; None: any.
    Errors: InputError if the weights are missing, cannot be fetched or read, or are of another
    network, colour order or number of dimensions.
    """
    path, repo_id = cfg.pretrained_teacher_path, cfg.teacher_repo_id
    if path and repo_id:
        raise InputError(
            f"pretrained_teacher_path={path} and teacher_repo_id={repo_id} both name "
            "the teacher's weights: "
            "keep the one that is meant, empty the other"
        )
    if cfg.teacher.startswith(ONNX):
        if path or repo_id:
            raise InputError(
                f"teacher={cfg.teacher} names its file itself: empty "
                f"{'pretrained_teacher_path' if path else 'teacher_repo_id'}"
            )
        teacher, origin = load_onnx(cfg)
    else:
        teacher, origin = load_published(cfg)
    if embedding_size and teacher.embedding_size != embedding_size:
        raise InputError(
            f"teacher: {cfg.teacher} ({teacher.path}) has {teacher.embedding_size}-d "
            f"features, but embedding_size={embedding_size}: the student learns "
            f"in the teacher's space: set embedding_size={teacher.embedding_size}, or "
            f"choose a teacher of {embedding_size} dimensions"
        )
    count = getattr(teacher.network, "parameter_count", 0) or sum(
        parameter.numel() for parameter in teacher.network.parameters()
    )
    log.info(
        "Teacher %s: %s parameters, %d-d features, 112x112 %s input, %s, %s, SHA-256 %s",
        full_name(cfg.teacher),
        f"{count:,}",
        teacher.embedding_size,
        teacher.color_space,
        teacher.normalisation,
        origin,
        teacher.sha256,
    )
    return teacher


def full_name(name: str) -> str:
    """The configuration's word, with the network it stands for where that is another."""
    entry = TEACHERS.get(name, Entry(name))
    return (
        name
        if entry.network == name
        else (f"{name} ({entry.network}{' with SE' if entry.use_se else ''})")
    )


def load_published(cfg) -> tuple[Teacher, str]:
    """A teacher that is one of our networks, and where its weights are from."""
    entry = TEACHERS[cfg.teacher]
    file, origin, stated = locate(cfg, entry)
    check_stated(stated, cfg.teacher, entry)
    weights = read_weights(file, "teacher", HINT)
    size = embedding_size_in(weights.content, entry.network, entry.use_se) or 512
    network = empty_backbone(entry.network, size, entry.use_se)
    loaded = load_into(network, weights, cfg.color_space, "teacher", stated)
    # one file of a repository: its configuration may be beside it
    check_stated(loaded.stated, cfg.teacher, entry)
    if loaded.stated and loaded.stated.embedding_size != size:
        raise InputError(
            f"teacher: {loaded.stated.path} states output_dim {loaded.stated.embedding_size}, but "
            "the "
            f"features of {file} have {size} dimensions"
        )
    own = loaded.own_color_space
    for word, found, expected in (
        ("colour order", own, entry.color_space),
        ("dimensions", size, entry.embedding_size),
    ):
        if expected and found != expected:
            raise InputError(
                f"teacher: {file} has {word} {found or 'unknown'}, but teacher={cfg.teacher} has "
                f"{expected}: set teacher={entry.network}"
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
    return teacher, origin + (f" ({loaded.place})" if loaded.place else "")


def load_onnx(cfg) -> tuple[Teacher, str]:
    """A teacher that is an ONNX model; InsightFace's take RGB."""
    path = Path(cfg.teacher.removeprefix(ONNX)).expanduser()
    network = OnnxNetwork(path, color_space=cfg.color_space)
    teacher = Teacher(
        network,
        name=cfg.teacher,
        path=str(network.path),
        sha256=sha256(*network.files),
        normalisation=network.scale.words,
        embedding_size=network.embedding_size,
        color_space=network.color_space,
        own_color_space=network.own_color_space,
    )
    return teacher, str(network.path)


def repository_of(cfg) -> str:
    """The repository that ``cfg`` takes the weights from; "": a file."""
    return cfg.teacher_repo_id or (
        ""
        if cfg.pretrained_teacher_path or cfg.teacher.startswith(ONNX)
        else TEACHERS[cfg.teacher].repo_id
    )


def locate(cfg, entry: Entry) -> tuple[Path | str, str, Stated | None]:
    """(the weights' file, where it is from in words, what the configuration beside it states),
    fetched where a repository is meant.
    """
    path, repo_id = cfg.pretrained_teacher_path, repository_of(cfg)
    if repo_id:
        folder = fetch(repo_id, cfg.teacher_cache)
        return (
            find_weights(folder),
            f"{repo_id} at revision {folder.name}",
            configuration_of(folder),
        )
    if path and Path(path).is_dir():
        file = find_weights(Path(path))
        return file, str(file), configuration_of(Path(path))
    return Path(path) if path else "", path, None


def configuration_of(folder: Path) -> Stated:
    stated = read_configuration(folder)
    if stated is None:
        raise InputError(
            f"teacher: {folder} has no configuration of CVLFace's "
            f"({' or '.join(CONFIGURATIONS)}); "
            "set pretrained_teacher_path to the weights' file"
        )
    return stated


def check_stated(stated: Stated | None, name: str, entry: Entry) -> None:
    """Refuse a repository whose configuration is not that of the teacher's entry."""
    if stated is None:
        return
    if stated.network != entry.network or entry.use_se:
        raise InputError(
            f"teacher: {stated.path} states the network {stated.network}, not that of "
            f"teacher={name}: set teacher={stated.network}"
        )
    for word, found, expected in (
        ("color_space", stated.color_space, entry.color_space),
        ("output_dim", stated.embedding_size, entry.embedding_size),
    ):
        if expected and found != expected:
            raise InputError(
                f"teacher: {stated.path} states {word} {found}, but teacher={name} "
                f"has {expected}: "
                f"set teacher={stated.network}, which goes by the configuration"
            )
