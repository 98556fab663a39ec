"""Aligned faces to check and calibrate a model with: a training, pair or folder set, or drawn."""

import os
from pathlib import Path

import numpy as np

from data.synth.render_pool import Photograph
from eval.verification import load_bin
from utils.dataset.folder import IMAGE_SUFFIXES, FaceDatasetFolder
from utils.dataset.records import MXFaceDataset
from utils.errors import InputError
from utils.images import decode_rgb
from utils.recordio.files import IMAGE_SIZE, has_records
from utils.recordio.image_records import sampled


def read_images(path: str | Path | list[str], count: int, flag: str) -> np.ndarray:
    """At most ``count`` images, spread evenly over what is there: (N, 112, 112, 3) uint8 RGB.

    path: a folder with train.rec or its shards, a .rec file or a list of such, a folder of
    identities, a folder of aligned images, or a pair set <name>.bin. flag: the command line's word
    for it.
    Raises InputError if there is no such thing, no image in it, or one that is damaged or not
    112x112.
    """
    if isinstance(path, list) or (Path(path).suffix == ".rec" and Path(path).is_file()):
        # whom they show does not matter here
        return read_set(MXFaceDataset(path, labels="shared"), count)
    path = Path(path)
    if path.is_file() and path.suffix == ".bin":
        images, _ = load_bin(path)
        return images[sampled(len(images), count)]
    if not path.is_dir():
        raise InputError(
            f"{flag}: no folder {path.absolute()} (nor a pair set .bin); name a "
            "folder with train.rec or of aligned faces"
        )
    if has_records(path):
        return read_set(MXFaceDataset(str(path)), count)
    files = sorted(
        entry.name
        for entry in os.scandir(path)
        if entry.is_file() and entry.name.lower().endswith(IMAGE_SUFFIXES)
    )
    if not files:
        return read_set(FaceDatasetFolder(str(path)), count)
    return np.stack([read_aligned(path / files[index]) for index in sampled(len(files), count)])


def read_set(dataset, count: int) -> np.ndarray:
    return np.stack([dataset[int(index)][0] for index in sampled(len(dataset), count)])


def read_image(path: str | Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, turned as the camera says.

    Raises InputError naming the file if it is missing or no image.
    """
    try:
        return decode_rgb(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"{path}: no image ({error})") from error


def read_aligned(path: str | Path) -> np.ndarray:
    """An aligned crop.

    Raises InputError naming the file as ``read_image``, or if it is not 112x112.
    """
    image = read_image(path)
    if image.shape[:2] != IMAGE_SIZE:
        raise InputError(
            f"{path}: {image.shape[1]}x{image.shape[0]} is no aligned crop of "
            "112x112; data/align_faces.py makes them"
        )
    return image


def draw_images(count: int) -> np.ndarray:
    """Drawn faces, for want of photographs, another person on each."""
    people = [Photograph(0, person, 1) for person in range(count)]
    return np.stack([decode_rgb(person.take(seed=0, nuisance=1.0)) for person in people])
