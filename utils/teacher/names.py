"""The words that ``config.teacher`` takes, and what each stands for."""

from typing import NamedTuple

from backbones import NAMES

# onnx:PATH, any ONNX face model
ONNX = "onnx:"


class TeacherSpec(NamedTuple):
    """One of our networks; and of a repository, what its configuration must say.

    repo_id: read unless another repository or a path is set. color_space, embedding_size: "" and 0
    stand for what the file or its configuration says.
    """

    network: str
    use_se: bool = False
    repo_id: str = ""
    color_space: str = ""
    embedding_size: int = 0

    @property
    def full_name(self) -> str:
        """The network with its variant: iresnet50_se."""
        return f"{self.network}{'_se' if self.use_se else ''}"


def cvlface(network: str, repo_id: str) -> TeacherSpec:
    return TeacherSpec(network, repo_id=repo_id, color_space="RGB", embedding_size=512)


TEACHERS = (
    {name: TeacherSpec(name) for name in NAMES}
    | {f"{name}_se": TeacherSpec(name, use_se=True) for name in NAMES if name.startswith("iresnet")}
    | {
        "cvlface_ir50": cvlface("ir50", "minchul/cvlface_adaface_ir50_webface4m"),
        "cvlface_ir101": cvlface("ir101", "minchul/cvlface_adaface_ir101_webface12m"),
    }
)


def full_name(name: str) -> str:
    """The configuration's word, with the network it stands for where that is another."""
    spec = TEACHERS.get(name, TeacherSpec(name))
    if spec.network == name:
        return name
    return f"{name} ({spec.network}{' with SE' if spec.use_se else ''})"


def repository_of(cfg) -> str:
    """The repository that ``cfg`` takes the weights from; "": a file."""
    if cfg.teacher_repo_id:
        return cfg.teacher_repo_id
    if cfg.pretrained_teacher_path or cfg.teacher.startswith(ONNX):
        return ""
    return TEACHERS[cfg.teacher].repo_id
