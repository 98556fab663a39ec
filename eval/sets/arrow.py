"""Sets as CVLFace publishes them: a ``save_to_disk`` folder of Hugging Face's ``datasets`` with
aligned images, and ``metadata.pt`` beside it.

Rows are put in the order of the column ``index``; what metadata.pt lists for image i belongs to
index i. Nothing is fetched, written or run: metadata.pt is read as tensors and plain values, with
stand-ins for numpy's own functions, for those trust what a file tells them.
"""

import pickle
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from eval.roc import to_whole
from eval.sets.folder import check_aligned, fingerprint, number_of, scan
from utils.errors import InputError, first_line
from utils.images import decode_rgb
from utils.safe_pickle import NUMPY, Array, Dtype, load_torch, refused_name
from utils.saved_table import DAMAGED, STATE, encoded_image, load_table
from utils.weights.kinds import UNREADABLE

METADATA = "metadata.pt"


def saved_fingerprint(folder: Path) -> str:
    """SHA-256 of state.json (which holds the library's own fingerprint of all rows), metadata.pt
    (which pair sets lack), and the Arrow files' names and sizes.
    """
    files = scan(folder)
    sizes = sorted((name, size) for name, (size, _) in files.items() if name.endswith(".arrow"))
    return fingerprint([folder / name for name in (STATE, METADATA) if name in files], sizes)


# --- images


class ArrowImages(Dataset):
    """Aligned images of a saved folder, in the order of ``index``: ``ds[i]`` -> (112, 112, 3) uint8
    RGB, decoded by whoever asks.

    ``table``: the folder's ``datasets.Dataset``, images still encoded. ``rows``: (N,) row of each
    index. ``names``: N paths, or None. Raises InputError naming the record if it is unreadable or
    not 112 x 112.
    """

    def __init__(self, folder: Path, table, rows: np.ndarray, names: list[str] | None):
        self.folder = folder
        self.table = table
        self.rows = rows
        self.names = names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        row, name = int(self.rows[index]), self.name_of(index)
        try:
            image = decode_rgb(encoded_image(self.folder, self.table[row]["image"]))
        except DAMAGED as error:
            raise InputError(f"{name}: {error}") from error
        return check_aligned(image, name)

    def name_of(self, index: int) -> str:
        """The folder and the record's index and path, for messages."""
        return f"{self.folder}: image {index}" + (f" ({self.names[index]})" if self.names else "")


def open_images(folder: Path, with_paths: bool = False) -> ArrowImages:
    """Open a saved folder and check its schema; ``with_paths``: it has a column of paths too, which
    become ``names``.

    Raises InputError as ``load_table`` does, and for an ``index`` that does not number the rows.
    """
    columns = ("image", "index", "path") if with_paths else ("image", "index")
    table = load_table(folder, columns, "set of aligned images")
    rows = order_rows(folder, table.data.column("index").to_numpy())
    paths = table.data.column("path").to_pylist() if with_paths else None
    images = table.select_columns(["image"])
    return ArrowImages(folder, images, rows, paths and [paths[row] for row in rows])


def open_pairs(folder: Path) -> tuple[list[bytes], list[bool]]:
    """(2N encoded images, N times whether two that follow one another show the same person) of a
    pair set: rows with ``image``, ``index`` and ``is_same``.

    Raises InputError as ``open_images`` does, and if the rows are no pairs.
    """
    table = load_table(folder, ("image", "index", "is_same"), "pair set")
    rows = order_rows(folder, table.data.column("index").to_numpy())
    same = table.data.column("is_same").to_numpy()[rows]
    if len(same) % 2 or (same[0::2] != same[1::2]).any():
        raise InputError(
            f"{folder} is no pair set: images 2i and 2i+1, by 'index', are a pair and share one "
            f"'is_same'; of these {number_of(len(same), 'image')} some do not"
        )
    try:
        records = table.select_columns(["image"])[:]["image"]
        images = [encoded_image(folder, records[row]) for row in rows]
    except DAMAGED as error:
        raise InputError(f"{folder}: an image cannot be read: {error}") from error
    return images, same[0::2].tolist()


def order_rows(folder: Path, index: np.ndarray) -> np.ndarray:
    """(N,) row of each index.

    Raises InputError unless ``index`` is a permutation of 0 ... N - 1.
    """
    rows = np.argsort(index, kind="stable")
    wrong = np.flatnonzero(index[rows] != np.arange(len(index)))
    if len(index) and not len(wrong):
        return rows
    reason = "it is empty"
    if len(wrong):
        reason = f"sorted, {index[rows[wrong[0]]]} stands where {wrong[0]} should"
    raise InputError(
        f"{folder}: the column 'index' must number the {len(index)} images 0, 1, 2, ...: {reason}"
    )


# --- metadata.pt


def read_metadata(folder: Path, keys: dict[str, type]) -> dict:
    """The named entries of a folder's metadata.pt, whether tensors, numpy arrays or lists.

    ``keys``: name -> int for (n,) int64 (whole numbers of any type), float for (n,) float32, str
    for a list of strings. Further entries may be any plain values. Raises InputError if the file
    is missing, damaged, lacks a key, holds something else under it, or asks anywhere for code
    (refused, named, not run).
    """
    path = folder / METADATA
    if not path.is_file():
        raise InputError(f"{folder}: no {METADATA}, which lists {', '.join(keys)}")
    content = load_plain(path)
    if not isinstance(content, dict):
        raise InputError(
            f"{path} holds a {type(content).__name__}, not a dict of {', '.join(keys)}"
        )
    missing = [key for key in keys if key not in content]
    if missing:
        present = ", ".join(map(str, content)) or "nothing"
        raise InputError(f"{path} lacks {', '.join(missing)}; it holds {present}")
    metadata = {}
    for key, kind in keys.items():
        value = unpack(content[key], f"{path}: {key}")
        if kind is str:
            metadata[key] = to_texts(value, f"{path}: {key}")
        else:
            metadata[key] = to_vector(value, kind, f"{path}: {key}")
    return metadata


def load_plain(path: Path):
    """What torch.save wrote, with ``Array`` in place of numpy arrays."""
    try:
        with warnings.catch_warnings():
            # the error below says so where it matters
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return load_torch(path, NUMPY)
    except InputError as error:
        raise InputError(f"{path} was refused: {error}") from error
    except pickle.UnpicklingError as error:
        name = refused_name(error)
        if name:
            raise InputError(
                f"{path} was refused: it asks to load {name}, which is code and no tensor"
            ) from error
        raise InputError(
            f"{path} is damaged or was written with another pickle protocol than "
            "torch.save's: save it with torch.save's defaults"
        ) from error
    except UNREADABLE as error:
        raise InputError(
            f"{path} is cut off, damaged or no file of torch.save "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def to_vector(value, kind: type, where: str) -> np.ndarray:
    """(n,) int64 or float32 from a tensor, array or list of numbers."""
    number_type = np.int64 if kind is int else np.float32
    try:
        if isinstance(value, torch.Tensor):
            value = value.double().numpy() if value.is_floating_point() else value.numpy()
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where} is no list of numbers ({first_line(error)})") from error
    if not array.size:
        return np.empty(0, number_type)
    if kind is int:
        numbers = to_whole(array)
    else:
        numbers = array if array.dtype.kind in "biuf" else None
    if numbers is None or array.size != max(array.shape, default=0):
        expected = "whole numbers" if kind is int else "numbers"
        raise InputError(
            f"{where} is {array.dtype} of shape {array.shape}; expected is a list of {expected}"
        )
    return np.array(numbers.reshape(-1), number_type)


def to_texts(value, where: str) -> list[str]:
    """A list of strings from a list or array of them."""
    texts = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where} is no list of strings")
    return list(texts)


def unpack(value, where: str):
    """What a stand-in for an array holds, or the value itself."""
    if not isinstance(value, Array):
        return value
    if isinstance(value.values, Dtype):
        raise InputError(
            f"{where} is a numpy array of {value.values.name}; numbers and strings are expected"
        )
    return value.values
