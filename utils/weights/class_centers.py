"""Class centres from whatever a training has left of them: one file, or the shares of all ranks."""

import re
from pathlib import Path

import torch

from utils.errors import InputError
from utils.weights.match import bare, is_matrix
from utils.weights.read import advice, read_file
from utils.weights.recognise import looks_like, networks_in

# {key: do the classes come first?}
CENTER_KEYS = {
    "kernel": False,
    "head.kernel": False,
    "weight": True,
    "partial_fc.weight": True,
    "classifier.weight": True,
    "weight_activated": True,
}
# what the ranks of arcface_torch (three generations) and of CVLFace write
RANK_FILES = (
    "checkpoint_gpu_*.pt",
    "softmax_fc_gpu_*.pt",
    "rank_*_softmax_weight.pt",
    "rank:*_softmax_weight.pt",
    "classifier_rank*.pt",
)


def read_kernel(
    path: str | Path, what: str, embedding_size: int, num_classes: int, hint: str = ""
) -> torch.Tensor:
    """Class centres (D, C) in float32, from whatever a training has left of them.

    path: a file with ``kernel`` (D, C) (AdaDistill's and this project's header.pth),
    ``head.kernel`` (D, C) (AdaFace's .ckpt), ``weight`` (C, D) (arcface_torch) or a bare (C, D)
    tensor; or what arcface_torch's and CVLFace's ranks wrote, a file each with their share of
    ``weight``: the folder, or a pattern such as "folder/checkpoint_gpu_*.pt".
    Raises InputError as ``read_tensors``, and for other contents or shapes, and for shares that
    are missing or not as Partial FC deals classes out.
    """
    shares = find_shares(path, what)
    if shares:
        kernel = join_shares(shares, what, num_classes)
    else:
        kernel = find_centers(read_file(path, what, hint), f"{what}: {path}")
    if tuple(kernel.shape) != (embedding_size, num_classes):
        mend = ""
        if not shares and rank_of(Path(path).name)[0] in RANK_FILES:
            mend = (
                f"; {Path(path).name} looks like one rank's share: name its folder, "
                f"{Path(path).parent}"
            )
        elif kernel.shape[1] == num_classes:
            mend = (
                "; the student learns in the space of these centres: set "
                f"embedding_size={kernel.shape[0]}"
            )
        raise InputError(
            f"{what}: {path} holds class centres {tuple(kernel.shape)}, but (embedding_size, "
            f"num_classes) of this run is {(embedding_size, num_classes)}{mend}"
        )
    if not torch.isfinite(kernel).all():
        raise InputError(
            f"{what}: {path} holds class centres that are not finite (NaN or "
            "infinite): take the header of an earlier step"
        )
    return kernel.float()


def find_centers(content, subject: str) -> torch.Tensor:
    """The (D, C) class centres among a file's contents; which axis is which is told by the key.

    Raises InputError if there are none.
    """
    if is_matrix(content):
        # arcface_torch's rank_0_softmax_weight.pt
        return content.t()
    if not isinstance(content, dict):
        raise InputError(f"{subject} holds a {type(content).__name__}, not class centres")
    state = content
    for key in ("state_dict", "state_dict_softmax_fc"):
        if isinstance(content.get(key), dict):
            state = content[key]
    state = {bare(str(key)): value for key, value in state.items()}
    for key, classes_first in CENTER_KEYS.items():
        if is_matrix(state.get(key)):
            return state[key].t() if classes_first else state[key]
    network = next(networks_in(content), None)
    likeness = looks_like(content)
    if network:
        likeness = (
            f"{network.name}, a network: train/class_centers.py computes the class centres of one"
        )
    raise InputError(
        f"{subject} has no class centres ({', '.join(CENTER_KEYS)}); its keys are "
        f"{', '.join(list(state)[:5])}{advice(likeness)}"
    )


def find_shares(path: str | Path, what: str) -> dict[int, Path]:
    """{rank: file} where ``path`` is a folder or a pattern; {} where it is a file's.

    Raises InputError if no files are found, or of several kinds.
    """
    if not str(path):
        return {}
    path = Path(path)
    if path.is_dir():
        files = [file for file in path.iterdir() if rank_of(file.name)[0] in RANK_FILES]
        missing = (
            f"holds no {', '.join(RANK_FILES)}: name the header's file, or a pattern such as "
            f"{path / RANK_FILES[0]}"
        )
    elif any(letter in path.name for letter in "*?[") and not path.exists():
        files = [file for file in path.parent.glob(path.name) if re.search(r"\d", file.name)]
        missing = "matches no file with a rank in its name"
    else:
        return {}
    if not files:
        raise InputError(f"{what}: {path} {missing}")
    pattern, *others = sorted({rank_of(file.name)[0] for file in files})
    if others:
        raise InputError(
            f"{what}: {path} matches files of several kinds: name one, "
            f"{' or '.join([pattern, *others])}"
        )
    if "_mom." in pattern:
        raise InputError(
            f"{what}: {path} are momenta of the optimizer, the class centres are in "
            f"{pattern.replace('_mom.', '.')}"
        )
    return {rank_of(file.name)[1]: file for file in files}


def rank_of(name: str) -> tuple[str, int]:
    """("checkpoint_gpu_*.pt", 3) of "checkpoint_gpu_3.pt": the last number is the rank.

    (name, 0) of a name without one.
    """
    parts = re.fullmatch(r"(.*?)(\d+)(\D*)", name)
    return (f"{parts[1]}*{parts[3]}", int(parts[2])) if parts else (name, 0)


def join_shares(files: dict[int, Path], what: str, num_classes: int) -> torch.Tensor:
    """The (D, C) class centres of all ranks.

    Raises InputError if a rank is missing, or has another number of classes than Partial FC gives
    it.
    """
    missing = sorted(set(range(max(files) + 1)) - files.keys())
    if missing:
        raise InputError(
            f"{what}: no file of rank {', '.join(map(str, missing))} beside {files[max(files)]}"
        )
    each, rest = divmod(num_classes, len(files))
    shares = []
    for rank, file in sorted(files.items()):
        share = find_centers(read_file(file, what), f"{what}: {file}")
        shares.append(share)
        # the first ranks take one of the rest each
        expected = each + (rank < rest)
        if share.shape[1] != expected:
            raise InputError(
                f"{what}: {file} holds {share.shape[1]} classes, but rank {rank} of {len(files)} "
                f"has {expected} of num_classes={num_classes}: files of other ranks are missing, "
                "or they are of another training set"
            )
        if share.shape[0] != shares[0].shape[0]:
            raise InputError(
                f"{what}: {file} holds {share.shape[0]}-d class centres, "
                f"{files[0].name} {shares[0].shape[0]}-d ones"
            )
    return torch.cat(shares, dim=1)
