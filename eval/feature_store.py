"""Features on disk, so that a second metric or an interrupted evaluation does not embed again.

One folder for each checkpoint and set, ``<folder>/<checkpoint>/<set>``, holds ``features.json``
(what they are, for people) and a file for every 128 images, ``00000000.npy``: (n, D) float32, or
(n, 2 D) with the features of the mirror images to the right. The set's name in it ends in a part of
its fingerprint, in the number format and in VERSION: another file, another set or another precision
never gets these features.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils.errors import InputError
from utils.files import replacing, write_json

# images a file: half a megabyte with both flips of 512 dimensions, a second of work on a CPU
PART = 128
# to be raised when the same images would give other features: alignment, decoding, normalisation
VERSION = 2


class StoredFeatures(NamedTuple):
    """The features of ``images`` images in ``path``; see ``open_store``."""

    path: Path
    images: int

    def parts(self) -> list[range]:
        return [
            range(first, min(first + PART, self.images)) for first in range(0, self.images, PART)
        ]

    def file(self, part: range) -> Path:
        return self.path / f"{part.start:08d}.npy"

    def missing(self) -> list[range]:
        return [part for part in self.parts() if not self.file(part).is_file()]

    def write(self, part: range, features: torch.Tensor) -> None:
        with replacing(self.file(part)) as file:
            np.save(file, features.numpy())

    def read(self) -> torch.Tensor:
        """All features (images, D or 2 D). Raises InputError if a file is damaged, naming it."""
        features = None
        for part in self.parts():
            values = self.read_part(part)
            if features is None:
                features = torch.empty(self.images, values.shape[1])
            if values.shape != (len(part), features.shape[1]):
                raise InputError(
                    f"{self.file(part)} holds features of shape {values.shape}, "
                    f"expected {(len(part), features.shape[1])}: remove the file"
                )
            features[part.start : part.stop] = torch.from_numpy(values)
        return features

    def read_part(self, part: range) -> np.ndarray:
        try:
            values = np.load(self.file(part), allow_pickle=False)
        except (ValueError, EOFError, FileNotFoundError) as error:
            raise InputError(
                f"{self.file(part)} is no readable file of features ({error}): remove "
                "it; all ranks must see one shared folder"
            ) from error
        if values.ndim != 2 or values.dtype != np.float32:
            raise InputError(
                f"{self.file(part)} holds {values.dtype} of shape {values.shape}, "
                "expected float32 (images, dimensions): remove the file"
            )
        return values


def open_store(
    folder: Path,
    checkpoint: str,
    name: str,
    fingerprint: str,
    images: int,
    precision: str,
    flip: bool,
    color_space: str = "RGB",
) -> StoredFeatures:
    """The features of one checkpoint on one set, as far as they are in ``folder``.

    checkpoint: SHA-256 of its file (and #ema behind it). name, fingerprint: of the set.
    color_space: the order of the images that the checkpoint was taken to be trained on.
    """
    details = f"{precision}{'' if flip else '-noflip'}{'-BGR' if color_space == 'BGR' else ''}"
    digest, mark, choice = checkpoint.partition("#")
    of = f"{digest[:16]}{mark}{choice}"
    path = Path(folder) / of / f"{name}-{fingerprint[:12]}-{details}-v{VERSION}"
    path.mkdir(parents=True, exist_ok=True)
    if not (path / "features.json").exists():
        about = dict(
            checkpoint_sha256=checkpoint,
            set=name,
            fingerprint=fingerprint,
            images=images,
            precision=precision,
            flip=flip,
            color_space=color_space,
        )
        write_json(path / "features.json", about)
    return StoredFeatures(path, images)
