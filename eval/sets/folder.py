"""Folders that hold a benchmark set: where it is, which files it has, and its image files as a
Dataset.
"""

import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from utils import distributed
from utils.align import SIZE, align
from utils.dataset.workers import cores, end_workers, next_batch, open_workers
from utils.errors import InputError
from utils.images import decode_rgb

# bytes read at a time: the files of pairs have hundreds of megabytes
BLOCK = 1 << 20
CHECKED_AT_A_TIME = 64

log = logging.getLogger(__name__)


def find_set(root: str | Path, target: str, suffix: str) -> Path:
    """The folder ``root/target``, or else ``root/target + suffix``, as CVLFace names it.

    Raises InputError listing the folders that are there.
    """
    root = Path(root)
    names = [target] if target.endswith(suffix) else [target, target + suffix]
    for name in names:
        if (root / name).is_dir():
            return root / name
    reason = "which is no folder itself"
    if root.is_dir():
        present = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        reason = f"folders there: {', '.join(present[:20]) or 'none'}"
    raise InputError(f"{target}: no folder {' or '.join(names)} in {root.absolute()}, {reason}")


def layout_error(folder: Path, is_both: bool, layout: str) -> InputError:
    """For a folder that is of both layouts or of neither: ``layout``, or CVLFace's."""
    both, and_nor = ("both", "and") if is_both else ("neither", "nor")
    return InputError(
        f"{folder} is {both} {layout} {and_nor} CVLFace's (state.json, dataset_info.json, "
        "*.arrow, metadata.pt)"
    )


def scan(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> (bytes, modification time in ns) of all files in a folder, without those hidden by a
    leading dot.
    """
    with os.scandir(folder) as entries:
        stats = {
            entry.name: entry.stat()
            for entry in entries
            if entry.is_file() and not entry.name.startswith(".")
        }
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def fingerprint(files: Iterable[Path], listing: Iterable[tuple]) -> str:
    """SHA-256 (hex) over the bytes of ``files`` and over ``listing``, what is known of files that
    are too many to be read.
    """
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    digest.update("\n".join(map(repr, listing)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def number_of(count: int, noun: str) -> str:
    """ "1 image", "2,000 images"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def first_of(items: list, noun: str) -> str:
    """ "3 images, the first a.jpg", "1 image, a.jpg": how messages name many things."""
    return f"{number_of(len(items), noun)}, {'the first ' if len(items) > 1 else ''}{items[0]}"


def warn(message: str) -> None:
    """Log a warning once, though every rank reads the set."""
    if distributed.is_main():
        log.warning("%s", message)


def warn_if_not_as_published(name: str, sizes: dict[str, int], published: dict[str, int]) -> None:
    """Say so if a set has other sizes than the papers' (both: noun -> number): a download that
    ended early, or a stand-in.
    """
    if sizes == published:
        return
    here = ", ".join(number_of(count, noun) for noun, count in sizes.items())
    there = ", ".join(number_of(count, noun) for noun, count in published.items())
    warn(
        f"{name} has {here}, the published set {there}: its figures cannot be compared with papers"
    )


def refuse_empty_files(folder: Path, listing: list[tuple]) -> None:
    """Raises InputError if a file of ``listing``, (name, bytes, ...) of each, is empty."""
    empty = [name for name, size, *_ in listing if not size]
    if empty:
        raise InputError(f"{folder}: {first_of(empty, 'empty file')}: copy again what was cut off")


def check_images(images: Dataset, num_workers: int, name: str) -> None:
    """Read every image once, in at most ``num_workers`` processes, so that one that is unreadable
    is noticed now and not when it is measured.

    ``images``: a set's, or a Subset of them; ``name``: of the progress bar. Raises InputError
    naming the first unreadable image.
    """
    batches = iter(
        open_workers(
            images,
            min(num_workers, cores()),
            len,
            batch_size=CHECKED_AT_A_TIME,
            # its own, so that a training run draws the same random numbers as without this
            generator=torch.Generator(),
        )
    )
    bar = tqdm(
        total=len(images),
        desc=name,
        unit="img",
        leave=False,
        disable=None if distributed.is_main() else True,
    )
    try:
        while count := next_batch(batches):
            bar.update(count)
    finally:
        end_workers(batches)
        bar.close()


def check_aligned(image: np.ndarray, name: str) -> np.ndarray:
    """Return (112, 112, 3) ``image``.

    Raises InputError naming an image of another size, for scaling it would give plausible, wrong
    features.
    """
    height, width = image.shape[:2]
    if (height, width) != (SIZE, SIZE):
        raise InputError(
            f"{name}: the image is {width}x{height}; the images of this set must be "
            f"aligned to {SIZE}x{SIZE} first"
        )
    return image


class ImageFiles(Dataset):
    """Images in files: ``ds[i]`` -> (112, 112, 3) uint8 RGB, decoded and, with points, aligned by
    whoever asks: the DataLoader's workers.

    ``names``: N paths relative to ``folder``. ``points``: (N, 5, 2) float32, (x, y) in pixels of
    the file's image, or None: all are aligned. Raises InputError naming the file if it cannot be
    read, is no image, has another size, or its points do not suit.
    """

    def __init__(self, folder: Path, names: list[str], points: np.ndarray | None = None):
        self.folder = folder
        self.names = names
        self.points = points

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        path = self.name_of(index)
        try:
            with open(path, "rb") as file:
                image = decode_rgb(file.read())
            if self.points is not None:
                return align(image, self.points[index])
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        return check_aligned(image, path)

    def name_of(self, index: int) -> str:
        """The file's path, for messages."""
        return os.path.join(self.folder, self.names[index])
