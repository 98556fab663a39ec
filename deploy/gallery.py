"""Photographs to aligned faces, a folder of people to features: for deploy/compare_faces.py."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from deploy.images import read_aligned, read_image
from deploy.model import Model, embed_faces
from utils.align import align
from utils.dataset.folder import IMAGE_SUFFIXES
from utils.detect import Detector, choose
from utils.errors import InputError


class FaceReader:
    """path -> the aligned face (112, 112, 3) uint8 RGB that is meant.

    ``notes`` says what was found in each photograph.
    detector: None for images that are aligned already.
    which, min_score: as ``utils.detect.choose``.
    Raises InputError naming the file if it is missing, no image, has no face, or
    several and ``which`` does not choose.
    """

    def __init__(self, detector: Detector | None, which: str, min_score: float):
        self.detector = detector
        self.which = which
        self.min_score = min_score
        self.notes = {}

    def __call__(self, path: Path) -> np.ndarray:
        if self.detector is None:
            self.notes[path] = "aligned"
            return read_aligned(path)
        image = read_image(path)
        try:
            face = choose(self.detector(image), self.which, self.min_score)
            aligned = align(image, face.points)
        except InputError as error:
            hint = ""
            if str(error).startswith("several"):
                hint = "; choose one with --face largest or --face N"
            raise InputError(f"{path}: {error}{hint}") from error
        self.notes[path] = f"face of {face.describe()}"
        return aligned


class Gallery(NamedTuple):
    """People to search among.

    names: of P people. features: (P, D) of unit length. images: number of those that could be used.
    left_out: why others could not, a line each.
    """

    names: list[str]
    features: np.ndarray
    images: int
    left_out: list[str]


def read_gallery(folder: Path, read: FaceReader, model: Model) -> Gallery:
    """The people of a folder.

    Raises InputError if there is no such folder, or nobody in it whose face could be read.
    """
    people, left_out = {}, []
    for name, paths in list_people(folder).items():
        for path in paths:
            try:
                face = read(path)
            except InputError as error:
                left_out.append(str(error))
                continue
            people.setdefault(name, []).append(face)
    if not people:
        why = f": it holds no image ({', '.join(IMAGE_SUFFIXES)})"
        if left_out:
            why = f" ({len(left_out)} images left out, the first: {left_out[0]})"
        raise InputError(f"--gallery: no face in {folder.absolute()}{why}")
    features = embed_faces(model, np.concatenate([np.stack(faces) for faces in people.values()]))
    stops = np.cumsum([len(faces) for faces in people.values()])
    means = np.stack([part.mean(axis=0) for part in np.split(features, stops[:-1])])
    centers = means / np.linalg.norm(means, axis=1, keepdims=True)
    return Gallery(list(people), centers, int(stops[-1]), left_out)


def list_people(folder: Path) -> dict[str, list[Path]]:
    """{person: photographs}, by name.

    A person is a sub-folder, or an image that lies in the folder itself.
    """
    if not folder.is_dir():
        raise InputError(f"--gallery: no folder {folder.absolute()}")
    people = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            people[entry.name] = [
                path for path in sorted(entry.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES
            ]
        elif entry.suffix.lower() in IMAGE_SUFFIXES:
            people[entry.name] = [entry]
    return people
