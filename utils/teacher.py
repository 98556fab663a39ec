"""The teacher: any published face network, loaded strictly, frozen, in eval mode, outside DistributedDataParallel, and never random."""

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from backbones import NAMES, build_backbone
from utils.checkpoint import ADAFACE_PREFIX, CVLFACE_PREFIXES, check_fit, network_weights, read_tensors, sha256
from utils.errors import InputError
from utils.hub import CONFIGURATIONS, Stated, fetch, find_weights, read_configuration
from utils.looks import feature_size
from utils.onnx_network import NORMALISED, OnnxNetwork

HINT = "train one with run_standalone.sh, set pretrained_teacher_path to a published backbone, or teacher=cvlface_ir50 to fetch one"
ONNX = "onnx:"      # onnx:PATH, any ONNX face model

log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """What a name of ``config.teacher`` stands for: one of our networks; and of a repository, what its configuration must say."""

    network: str
    use_se: bool = False
    repo_id: str = ""               # read unless another repository or a path is set
    color_space: str = ""           # "": what the file or its configuration says
    embedding_size: int = 0         # 0: likewise


TEACHERS = {name: Entry(name) for name in NAMES} | {f"{name}_se": Entry(name, use_se=True) for name in NAMES if name.startswith("iresnet")} | {
    "cvlface_ir50": Entry("ir50", repo_id="minchul/cvlface_adaface_ir50_webface4m", color_space="RGB", embedding_size=512),
    "cvlface_ir101": Entry("ir101", repo_id="minchul/cvlface_adaface_ir101_webface12m", color_space="RGB", embedding_size=512),
}


class Teacher(nn.Module):
    """A frozen network: (B, 3, 112, 112) RGB in [-1, 1] -> (B, D) float32 features without gradient.

    bgr: the weights were trained on BGR images (AdaFace's releases), so the channels are turned around first.
    Of one that ``load_teacher`` made: name (the configuration's word), path and sha256 (of the file its weights are from), color_space
    ("RGB" or "BGR") and own_color_space (what it would be if the configuration did not set it), normalisation (of pixels x, in words), embedding_size (D).
    """

    def __init__(self, network: nn.Module, bgr: bool, *, name: str = "", path: str = "", sha256: str = "",
                 normalisation: str = NORMALISED.words, embedding_size: int = 0, own_color_space: str = ""):
        super().__init__()
        self.network, self.bgr = network.eval().requires_grad_(False), bgr
        self.name, self.path, self.sha256, self.normalisation, self.embedding_size = name, path, sha256, normalisation, embedding_size
        self.color_space = "BGR" if bgr else "RGB"
        self.own_color_space = own_color_space or self.color_space

    def train(self, mode: bool = True):
        return super().train(False)      # BatchNorm of a teacher must never follow the student's batches

    @torch.no_grad()
    def forward(self, images):
        return self.network(images.flip(1) if self.bgr else images).float()


def load_teacher(cfg, embedding_size: int | None = None) -> Teacher:
    """The teacher that ``cfg`` names, with its published weights; what it is and what it sees is logged.

    cfg: teacher, pretrained_teacher_path, teacher_repo_id, teacher_cache and color_space are read.
    embedding_size: the number of dimensions its features must have; None: any.
    Errors: InputError if the weights are missing, cannot be fetched or read, or are of another network, colour order or number of dimensions.
    """
    path, repo_id = cfg.pretrained_teacher_path, cfg.teacher_repo_id
    if path and repo_id:
        raise InputError(f"pretrained_teacher_path={path} and teacher_repo_id={repo_id} both name the teacher's weights: "
                         "keep the one that is meant, empty the other")
    if cfg.teacher.startswith(ONNX):
        if path or repo_id:
            raise InputError(f"teacher={cfg.teacher} names its file itself: empty {'pretrained_teacher_path' if path else 'teacher_repo_id'}")
        teacher, origin = load_onnx(cfg)
    else:
        teacher, origin = load_published(cfg)
    if embedding_size and teacher.embedding_size != embedding_size:
        raise InputError(f"teacher: {cfg.teacher} ({teacher.path}) has {teacher.embedding_size}-d features, but embedding_size={embedding_size}: the student learns "
                         f"in the teacher's space: set embedding_size={teacher.embedding_size}, or choose a teacher of {embedding_size} dimensions")
    count = getattr(teacher.network, "parameter_count", 0) or sum(parameter.numel() for parameter in teacher.network.parameters())
    log.info("Teacher %s: %s parameters, %d-d features, 112x112 %s input, %s, %s, SHA-256 %s", full_name(cfg.teacher), f"{count:,}", teacher.embedding_size,
             teacher.color_space, teacher.normalisation, origin, teacher.sha256)
    return teacher


def full_name(name: str) -> str:
    """The configuration's word, with the network it stands for where that is another."""
    entry = TEACHERS.get(name, Entry(name))
    return name if entry.network == name else f"{name} ({entry.network}{' with SE' if entry.use_se else ''})"


def load_published(cfg) -> tuple[Teacher, str]:
    """A teacher that is one of our networks, and where its weights are from."""
    entry = TEACHERS[cfg.teacher]
    file, origin, stated = locate(cfg, entry)
    check_stated(stated, cfg.teacher, entry)
    weights, prefix = network_weights(read_tensors(file, "teacher", HINT))
    if stated is None and prefix in CVLFACE_PREFIXES:       # one file of a repository: its configuration may be beside it
        stated = read_configuration(file.parent.parent if file.parent.name == "pretrained_model" else file.parent)
        check_stated(stated, cfg.teacher, entry)
    size = feature_size(weights) or 512
    with torch.device("meta"):              # neither memory nor random numbers: all values come from the file
        backbone = build_backbone(entry.network, size, use_se=entry.use_se)
    check_fit(backbone.state_dict(), weights, f"teacher: {file}", prefix, "teacher")
    if stated and stated.embedding_size != size:
        raise InputError(f"teacher: {stated.path} states output_dim {stated.embedding_size}, but the features of {file} have {size} dimensions")
    backbone.to_empty(device="cpu").load_state_dict(weights)
    own = color_order("auto", stated, prefix)
    for word, found, expected in (("colour order", own, entry.color_space), ("dimensions", size, entry.embedding_size)):
        if expected and found != expected:
            raise InputError(f"teacher: {file} has {word} {found}, but teacher={cfg.teacher} has {expected}: set teacher={entry.network}")
    bgr = color_order(cfg.color_space, stated, prefix) == "BGR"
    return Teacher(backbone, bgr, name=cfg.teacher, path=str(file), sha256=sha256(file), embedding_size=size, own_color_space=own), origin


def load_onnx(cfg) -> tuple[Teacher, str]:
    """A teacher that is an ONNX model; InsightFace's take RGB."""
    network = OnnxNetwork(Path(cfg.teacher.removeprefix(ONNX)).expanduser())
    return Teacher(network, cfg.color_space == "BGR", name=cfg.teacher, path=str(network.path), sha256=sha256(*network.files),
                   normalisation=network.scale.words, embedding_size=network.embedding_size, own_color_space="RGB"), str(network.path)


def repository_of(cfg) -> str:
    """The repository that ``cfg`` takes the weights from; "": a file."""
    return cfg.teacher_repo_id or ("" if cfg.pretrained_teacher_path or cfg.teacher.startswith(ONNX) else TEACHERS[cfg.teacher].repo_id)


def locate(cfg, entry: Entry) -> tuple[Path | str, str, Stated | None]:
    """(the weights' file, where it is from in words, what the configuration beside it states), fetched where a repository is meant."""
    path, repo_id = cfg.pretrained_teacher_path, repository_of(cfg)
    if repo_id:
        folder = fetch(repo_id, cfg.teacher_cache)
        return find_weights(folder), f"{repo_id} at revision {folder.name}", configuration_of(folder)
    if path and Path(path).is_dir():
        file = find_weights(Path(path))
        return file, str(file), configuration_of(Path(path))
    return Path(path) if path else "", path, None


def configuration_of(folder: Path) -> Stated:
    stated = read_configuration(folder)
    if stated is None:
        raise InputError(f"teacher: {folder} has no configuration of CVLFace's ({' or '.join(CONFIGURATIONS)}); "
                         "set pretrained_teacher_path to the weights' file")
    return stated


def check_stated(stated: Stated | None, name: str, entry: Entry) -> None:
    """Refuse a repository whose configuration is not that of the teacher's entry."""
    if stated is None:
        return
    if stated.network != entry.network or entry.use_se:
        raise InputError(f"teacher: {stated.path} states the network {stated.network}, not that of teacher={name}: set teacher={stated.network}")
    for word, found, expected in (("color_space", stated.color_space, entry.color_space), ("output_dim", stated.embedding_size, entry.embedding_size)):
        if expected and found != expected:
            raise InputError(f"teacher: {stated.path} states {word} {found}, but teacher={name} has {expected}: "
                             f"set teacher={stated.network}, which goes by the configuration")


def color_order(asked: str, stated: Stated | None, prefix: str) -> str:
    """The teacher's colour order: as asked, else as its configuration states, else as its publisher trains: BGR for AdaFace's .ckpt files."""
    own = stated.color_space if stated else "BGR" if prefix == ADAFACE_PREFIX else "RGB"
    if asked == "auto" or asked == own:
        return own
    if stated or prefix == ADAFACE_PREFIX:
        source = f"{stated.path}, which states {own}" if stated else f"AdaFace's files, which are {own}"
        log.warning("color_space=%s goes against %s: the teacher gets %s", asked, source, asked)
    return asked
