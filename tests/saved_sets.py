"""Tiny benchmark folders for the tests of the readers: real image files, real ``save_to_disk``
folders, real metadata.pt.
"""

import pickle
from pathlib import Path
from types import SimpleNamespace

import cv2
import datasets
import numpy as np
import torch

datasets.disable_progress_bars()


def encode(image: np.ndarray, suffix: str = ".png") -> bytes:
    """PNG by default, so that reading gives back the same pixels."""
    return cv2.imencode(suffix, image[..., ::-1])[1].tobytes()


def smooth(count: int, size=(112, 112), seed=0) -> np.ndarray:
    """(count, H, W, 3) uint8 RGB that looks different everywhere, and in which a pixel is like its
    neighbours.
    """
    noise = np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)
    return np.stack(
        [
            cv2.normalize(cv2.GaussianBlur(image, (0, 0), 4), None, 0, 255, cv2.NORM_MINMAX)
            for image in noise
        ]
    )


def save_images(folder: Path, encoded: list, index=None, shards: int = 2, **columns) -> Path:
    """A folder of ``datasets``; row i holds image ``index[i]``, and of every further column the
    entry ``index[i]``.
    """
    index = list(range(len(encoded))) if index is None else list(index)
    content = {
        "image": [
            {"bytes": encoded[i], "path": None} if isinstance(encoded[i], bytes) else encoded[i]
            for i in index
        ],
        "index": index,
    }
    content |= {name: [values[i] for i in index] for name, values in columns.items()}
    kinds = {"image": datasets.Image(), "index": datasets.Value("int64")} | {
        name: datasets.Value("string") for name in columns
    }
    datasets.Dataset.from_dict(content, features=datasets.Features(kinds)).save_to_disk(
        str(folder), num_shards=shards
    )
    return folder


def save_metadata(folder: Path, content, numpy_core: str = "", **options) -> Path:
    """metadata.pt as torch.save writes it; ``numpy_core``: "core" or "_core", the name that numpy 1
    or 2 would have written.
    """
    path = folder / "metadata.pt"
    torch.save(
        content, path, pickle_module=renaming(numpy_core) if numpy_core else pickle, **options
    )
    return path


def renaming(numpy_core: str):
    """A pickle module whose pickles name numpy's functions as another version of it does."""

    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            module = getattr(obj, "__module__", None) or ""
            if not module.startswith(("numpy._core.", "numpy.core.")):
                return super().save_global(obj, name)
            self.write(
                pickle.GLOBAL
                + f"numpy.{numpy_core}.{module.split('.', 2)[2]}\n{name or obj.__name__}\n".encode()
            )
            self.memoize(obj)

    return SimpleNamespace(
        __name__="renaming",
        Pickler=Pickler,
        dump=lambda obj, file, protocol: Pickler(file, protocol).dump(obj),
    )
