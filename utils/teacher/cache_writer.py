"""Writes the teacher features of a training set part by part, and goes on where it was killed."""

import fcntl
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.errors import InputError
from utils.files import write_json
from utils.teacher.cache import (
    AGAIN,
    check_array,
    differences,
    load_manifest,
    read_manifest,
    row_bytes,
)

# images a rank computes before it writes and marks them: 2 MB of 512 dimensions, a minute of work
# at most
PART = 1024
# of an image in progress.partial; REPLACED: its record is damaged, the features are those of the
# next good one
MISSING, DONE, REPLACED = 0, 1, 2
# what the same weights may have been called, and where they may have lain
NAMES_OF_WEIGHTS = ("name", "file", "repository")


class CacheWriter:
    """A cache in the making.

    The ranks write different parts of it, each marked once it is on the disk. Rank 0 makes a writer
    with ``main=True``, which prepares the folder or finds what is there; then the other ranks.
    ``complete``: nothing is left to do.
    Raises InputError if the folder holds another cache, another process is making one there, or the
    disk has no room or cannot be written to.
    """

    def __init__(self, path: str | Path, manifest: dict, main: bool):
        self.path = Path(path)
        self.manifest = manifest
        self.images = manifest["images"]
        self.row = row_bytes(manifest["embedding_size"])
        self.features = self.path / "features.npy.partial"
        self.description = self.path / "manifest.json.partial"
        self.status_file = self.path / "progress.partial"
        self.progress = None
        self.complete = main and self._finished()
        if self.complete:
            return
        try:
            if main:
                self.path.mkdir(parents=True, exist_ok=True)
            self.progress = os.open(self.status_file, os.O_RDWR | (os.O_CREAT if main else 0))
        except OSError as error:
            raise InputError(
                f"cannot write to {self.path} ({error.strerror}); choose another "
                "folder, which all ranks can write to"
            ) from error
        if main:
            self._lock()
            if self.description.is_file():
                self._go_on()
            else:
                self._begin()
        self.start = check_array(self._array(), self.images, manifest["embedding_size"])

    def _finished(self) -> bool:
        """Whether this very cache is already there. Raises InputError if another one is."""
        if not (self.path / "manifest.json").is_file():
            return False
        manifest = read_manifest(self.path)
        manifest.pop("replaced")
        self._refuse_other(manifest)
        check_array(self.path / "features.npy", self.images, self.manifest["embedding_size"])
        self._remove_leftovers()
        return True

    def _refuse_other(self, manifest: dict) -> None:
        if differing := differences(without_names(manifest), without_names(self.manifest)):
            raise InputError(
                f"{self.path} holds features of something else: {differing}; choose "
                "another folder, or remove this one"
            )

    def _lock(self) -> None:
        """Keep other commands out while this process lives."""
        try:
            fcntl.lockf(self.progress, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(
                f"another process is making a cache in {self.path}; wait for it, or end it"
            ) from None
        except OSError as error:
            raise InputError(
                f"{self.path} is on a file system without locks ({error.strerror}); "
                "choose a folder on another one"
            ) from error

    def _go_on(self) -> None:
        self._refuse_other(load_manifest(self.description))
        if len(self._status()) != self.images:
            raise InputError(f"{self.status_file} is damaged; {AGAIN}")

    def _begin(self) -> None:
        """Lay out the files; the description comes last, so that a folder with it is sound."""
        if (self.path / "features.npy").exists():
            raise InputError(
                f"{self.path} holds a features.npy without a manifest, which is no "
                "cache of this project; choose another folder"
            )
        size = self.images * self.row
        free = shutil.disk_usage(self.path).free
        if size > free:
            raise InputError(
                f"{self.path}: the features of {self.images} images take {size / 1e9:.1f} GB, "
                f"{free / 1e9:.1f} GB are free on its disk; choose another folder"
            )
        shape = (self.images, 2, self.manifest["embedding_size"])
        header = dict(descr="<f2", fortran_order=False, shape=shape)
        try:
            with open(self.features, "wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + size)
            os.truncate(self.progress, 0)
            os.truncate(self.progress, self.images)
            write_json(self.description, self.manifest)
        except OSError as error:
            for leftover in (self.features, self.status_file):
                leftover.unlink(missing_ok=True)
            raise InputError(
                f"cannot lay out a cache of {size / 1e9:.1f} GB in {self.path} "
                f"({error.strerror}); make room or choose another folder"
            ) from error

    def _array(self) -> Path:
        """The file of the features.

        A run that ended between giving it its name and writing the manifest left the final one.
        """
        return self.features if self.features.exists() else self.path / "features.npy"

    def _status(self) -> np.ndarray:
        return np.frombuffer(os.pread(self.progress, self.images + 1, 0), np.uint8)

    def _remove_leftovers(self) -> None:
        for leftover in (self.description, self.status_file):
            leftover.unlink(missing_ok=True)

    def missing(self) -> list[range]:
        """The parts that are not on the disk yet."""
        todo = self._status() == MISSING
        return [
            range(first, min(first + PART, self.images))
            for first in range(0, self.images, PART)
            if todo[first : first + PART].any()
        ]

    def replaced(self) -> list[int]:
        """The images, of all ranks and runs so far, whose records are damaged."""
        return np.flatnonzero(self._status() == REPLACED).tolist()

    def write(self, part: range, features: np.ndarray, replaced: Sequence[int] = ()) -> None:
        """Put the (n, 2, D) features of a part on the disk, then mark it.

        replaced: its images whose records are damaged.
        Raises InputError if a feature is not finite in float16, naming its image's index, or if
        the disk is full; what was marked before stays.
        """
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(features, np.float16)
        self._check(part, values)
        status = np.full(len(part), DONE, np.uint8)
        status[[index - part.start for index in replaced]] = REPLACED
        try:
            with open(self._array(), "r+b") as file:
                file.seek(self.start + part.start * self.row)
                file.write(values.data)
                file.flush()
                os.fsync(file.fileno())
            os.pwrite(self.progress, status.tobytes(), part.start)
        except OSError as error:
            raise InputError(
                f"cannot write {self._array()} ({error.strerror}); what is done is "
                "kept: make room and start the same command again"
            ) from error

    def _check(self, part: range, values: np.ndarray) -> None:
        if values.nbytes != len(part) * self.row:
            raise InputError(
                f"the teacher gave features of shape {values.shape} for {len(part)} "
                f"images, {self.manifest['embedding_size']} dimensions were expected"
            )
        bad = np.flatnonzero(~np.isfinite(values).all(axis=(1, 2)))
        if len(bad):
            raise InputError(
                f"the features of image index {part.start + bad[0]} are not finite or "
                f"exceed 65504, the largest float16, as do those of {len(bad) - 1} more"
            )
        empty = np.flatnonzero(~values.any(axis=2).all(axis=1))
        if len(empty):
            raise InputError(
                f"the features of image index {part.start + empty[0]} are zero in "
                f"float16, as are those of {len(empty) - 1} more"
            )

    def finish(self, name_of) -> None:
        """Wait for the other ranks' parts, give the files their names, write the manifest.

        Rank 0 only. name_of: index -> record.
        """
        while self.missing():
            # and not in a collective: a rank may be hours behind, which is longer than those wait
            time.sleep(0.2)
        if self.features.exists():
            os.replace(self.features, self.path / "features.npy")
        replaced = [(index, name_of(index)) for index in self.replaced()]
        write_json(self.path / "manifest.json", dict(self.manifest, replaced=replaced))
        self._remove_leftovers()


def without_names(manifest: dict) -> dict:
    teacher = {
        key: value for key, value in manifest["teacher"].items() if key not in NAMES_OF_WEIGHTS
    }
    return dict(manifest, teacher=teacher)
