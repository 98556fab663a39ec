"""Whole sets in InsightFace's layout, and the ``property`` file."""

import os
from collections.abc import Iterable
from itertools import pairwise

from utils.errors import InputError
from utils.files import replacing
from utils.recordio.format import EXACT_IN_FLOAT32, IRHeader, pack
from utils.recordio.indexed import IndexedRecordIO


def write_property(
    root_dir: str, num_classes: int, image_size: tuple[int, int] = (112, 112)
) -> None:
    """Write ``root_dir/property``: ``classes,height,width``."""
    with replacing(os.path.join(root_dir, "property"), "w") as file:
        file.write(f"{num_classes},{image_size[0]},{image_size[1]}\n")


def write_insightface(
    root_dir: str, groups: Iterable[Iterable[bytes]], image_size: tuple[int, int] = (112, 112)
) -> int:
    """Write ``train.rec``, ``train.idx``, ``property`` as InsightFace does; the number of images.

    ``groups``: one iterable of encoded images (JPEG bytes) per identity, consumed as a stream;
    labels are 0, 1, ... in that order. Keys: images 1 ... N; identities N+1 ..., each with label
    [first key, end); record 0, written last, with label [N+1, end of the identities).
    Raises InputError if the keys outgrow float32. Source: InsightFace face2rec2.py.
    """
    os.makedirs(root_dir, exist_ok=True)
    idx_path, rec_path = (os.path.join(root_dir, f"train.{kind}") for kind in ("idx", "rec"))
    key, starts = 1, [1]
    with IndexedRecordIO(idx_path, rec_path, "w") as writer:
        for label, images in enumerate(groups):
            for image in images:
                writer.write_idx(key, pack(IRHeader(0, float(label), key, 0), image))
                key += 1
            starts.append(key)
        end = key + len(starts) - 1
        if end > EXACT_IN_FLOAT32:
            raise InputError(
                f"{root_dir}: InsightFace's layout keeps keys as float32, exact to "
                f"{EXACT_IN_FLOAT32} records, got {end}; "
                f"use the plain layout (data/make_rec.py --layout plain)"
            )
        for identity, span in enumerate(pairwise(starts)):
            writer.write_idx(key + identity, pack(IRHeader(2, span, key + identity, 0), b""))
        writer.write_idx(0, pack(IRHeader(2, (key, end), 0, 0), b""))
    write_property(root_dir, len(starts) - 1, image_size)
    return key - 1
