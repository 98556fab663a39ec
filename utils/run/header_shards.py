"""Class centres on disk as a folder to which every rank writes its share, as safetensors files.

torch.distributed.checkpoint does the work and shares the rows out anew when another number of ranks
reads them. Its own format describes the files in a pickle; the one of Hugging Face used here does
so in JSON, so nothing in such a folder can run.
"""

from functools import cache
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from utils import distributed
from utils.errors import InputError, first_line
from utils.weights.kinds import UNREADABLE

# (C, D); everything else is small and the same on all ranks.
ROWS = ("weight", "momentum")


def save_header(folder: Path, header) -> None:
    """Write the weight, momentum and margin's statistics of all ranks into ``folder``.

    Momentum only of learned centres that have moved. A collective; raises InputError, on all ranks,
    if one cannot write its share.
    """
    tensors = tensors_of(header)
    # one after the other: a file is put together in memory
    files = {name: 1 + (name == "momentum") for name in tensors}
    try:
        dcp.save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(str(folder), files, save_distributed=True),
            no_dist=distributed.world_size() == 1,
        )
    except dcp.api.CheckpointException as error:
        reasons = ", ".join(
            f"rank {rank}: {first_line(failure[0], 150)}"
            for rank, failure in sorted(error.failures.items())
        )
        raise InputError(
            f"cannot save {folder} ({reasons}); earlier checkpoints are untouched, go "
            "on with --resume"
        ) from error


def load_header(folder: Path, header, moved: bool) -> None:
    """Read this rank's rows of what any number of ranks have written. A collective.

    moved: whether learned centres had a momentum when they were saved. Raises InputError for
    missing or damaged shares, and for other shapes.
    """
    shapes = shapes_in(folder)
    expected = (header.centers.num_classes, header.centers.weight.shape[1])
    if shapes.get("weight") != expected:
        raise InputError(
            f"{folder} holds class centres of shape {shapes.get('weight')}, but "
            f"(num_classes, embedding_size) is {expected}"
        )
    if header.centers.learned and moved:
        header.centers.momentum = torch.zeros_like(header.centers.weight)
    tensors = tensors_of(header)
    del tensors["num_classes"]
    if missing := tensors.keys() - shapes.keys():
        raise InputError(
            f"{folder} lacks {', '.join(sorted(missing))}: files are missing, or it "
            "is of another method or loss"
        )
    read(folder, tensors, distributed.world_size() == 1)


def read_whole(folder: Path) -> dict[str, torch.Tensor]:
    """All rows of ``folder`` in this process's memory: {"weight": (C, D), ...}.

    Raises InputError as ``load_header`` does.
    """
    if damage := damage_of(folder):
        raise InputError(damage)
    tensors = {
        name: torch.empty(shape)
        for name, shape in shapes_in(folder).items()
        if name not in ("momentum", "num_classes")
    }
    read(folder, tensors, alone=True)
    return tensors


def damage_of(folder: Path) -> str:
    """What is wrong with the files in ``folder``: one line, "" if all rows are there."""
    try:
        shapes = shapes_in(folder)
        small = {"num_classes": torch.zeros(1, dtype=torch.float64)}
        read(folder, small, alone=True)
    except InputError as error:
        return str(error)
    num_classes = int(small["num_classes"])
    rows = {name: shape[0] for name, shape in shapes.items() if name in ROWS}
    short = [
        f"{count} of {num_classes} rows of {name}"
        for name, count in rows.items()
        if count != num_classes
    ]
    if not short:
        return ""
    return f"{folder} is damaged: it holds {' and '.join(short)}, some ranks' files are missing"


def read(folder: Path, tensors: dict, alone: bool) -> None:
    try:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except dcp.api.CheckpointException as error:
        raise damaged(folder, next(iter(error.failures.values()))[0]) from error


def damaged(folder: Path, error: BaseException) -> InputError:
    return InputError(
        f"{folder} is damaged ({first_line(error, 150)}); go on from an earlier step "
        "with global_step="
    )


def tensors_of(header) -> dict[str, torch.Tensor]:
    """What a header keeps, by the names it has on disk; the rows as parts of the whole."""
    centers = header.centers
    tensors = {"weight": part_of_whole(centers.weight.detach(), centers.num_classes)}
    if centers.momentum is not None:
        tensors["momentum"] = part_of_whole(centers.momentum, centers.num_classes)
    tensors |= header.margin.state_dict()
    tensors["num_classes"] = torch.tensor([float(centers.num_classes)], dtype=torch.float64)
    return tensors


def part_of_whole(shard: torch.Tensor, num_classes: int) -> torch.Tensor:
    if distributed.world_size() == 1:
        return shard
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(
        shard,
        mesh(shard.device.type, distributed.world_size()),
        [Shard(0)],
        run_check=False,
        shape=torch.Size((num_classes, shard.shape[1])),
        stride=(shard.shape[1], 1),
    )


@cache
def mesh(device: str, world: int):
    """All ranks in a row; made once, for it may come with a process group of its own."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, (world,))


def shapes_in(folder: Path) -> dict[str, tuple]:
    """{name: shape} of what lies in ``folder``.

    Raises InputError if a file is damaged or rows are missing (the last ones show in the shape
    alone).
    """
    if not list(Path(folder).glob("*.safetensors")):
        raise InputError(
            f"{folder} holds no *.safetensors files: it is no header of a run with "
            "header_format=shards"
        )
    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except UNREADABLE as error:
        raise damaged(folder, error) from error
    for name in metadata.keys() & set(ROWS):
        rows = sum(chunk.sizes[0] for chunk in metadata[name].chunks)
        if rows != metadata[name].size[0]:
            raise InputError(
                f"{folder} is damaged: {rows} rows of {name} are there, some ranks' "
                "files are missing; go on from an earlier step with global_step="
            )
    return {name: tuple(entry.size) for name, entry in metadata.items()}
