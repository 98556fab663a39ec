"""Writes the teacher features of a training set part by part, and goes on where it was killed."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.errors import InputError
from utils.files import replacing
from utils.teacher.cache import (
    AGAIN,
    DONE,
    MISSING,
    REPLACED,
    check_array,
    differences,
    read_json,
    read_manifest,
    row_bytes,
)

# images a rank computes before it writes and marks them: 2 MB of 512 dimensions, a minute of work
# at most
PART = 1024


class CacheWriter:
    """A cache in the making; the ranks write different parts of it, each marked once it is on the
    disk.

    Rank 0 makes one with ``main=True``, which prepares the folder or finds what is there; then the
    other ranks. ``complete``: nothing is left to do. Errors: InputError if the folder holds another
    cache, another process is making one there, or the disk has no room or cannot be written to.
    """

    def __init__(self, path: str | Path, manifest: dict, main: bool):
        self.path = Path(path)
        self.manifest = manifest
        self.images = manifest["images"]
        self.row = row_bytes(manifest["embedding_size"])
        self.features = self.path / "features.npy.partial"
        self.description = self.path / "manifest.json.partial"
        self.progress = None
        self.complete = main and self._finished()
        if self.complete:
            return
        try:
            if main:
                self.path.mkdir(parents=True, exist_ok=True)
            self.progress = os.open(
                self.path / "progress.partial", os.O_RDWR | (os.O_CREAT if main else 0)
            )
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
        """Whether this very cache is already there. Errors: InputError if another one is."""
        if not (self.path / "manifest.json").is_file():
            return False
        found = read_manifest(self.path)
        found.pop("replaced")
        self._refuse_other(found)
        check_array(self.path / "features.npy", self.images, self.manifest["embedding_size"])
        self._remove_leftovers()
        return True

    def _refuse_other(self, found: dict) -> None:
        # the same weights may have been called otherwise, or lie elsewhere now
        found, wanted = (
            dict(
                manifest,
                teacher={
                    key: value
                    for key, value in manifest["teacher"].items()
                    if key not in ("name", "file", "repository")
                },
            )
            for manifest in (found, self.manifest)
        )
        if differing := differences(found, wanted):
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
        self._refuse_other(read_json(self.description))
        if len(self._status()) != self.images:
            raise InputError(f"{self.path / 'progress.partial'} is damaged; {AGAIN}")

    def _begin(self) -> None:
        """Lay out the files; the description comes last, so that a folder with it is sound."""
        if (self.path / "features.npy").exists():
            raise InputError(
                f"{self.path} holds a features.npy without a manifest, which is no "
                "cache of this project; choose another folder"
            )
        size, free = self.images * self.row, shutil.disk_usage(self.path).free
        if size > free:
            raise InputError(
                f"{self.path}: the features of {self.images} images take "
                f"{size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on its disk; choose another "
                "folder"
            )
        try:
            with open(self.features, "wb") as file:
                np.lib.format.write_array_header_1_0(
                    file,
                    dict(
                        descr="<f2",
                        fortran_order=False,
                        shape=(self.images, 2, self.manifest["embedding_size"]),
                    ),
                )
                file.truncate(file.tell() + size)
            os.truncate(self.progress, 0)
            os.truncate(self.progress, self.images)
            with replacing(self.description) as file:
                file.write((json.dumps(self.manifest, indent=2) + "\n").encode())
        except OSError as error:
            for leftover in (self.features, self.path / "progress.partial"):
                leftover.unlink(missing_ok=True)
            raise InputError(
                f"cannot lay out a cache of {size / 1e9:.1f} GB in {self.path} "
                f"({error.strerror}); make room or choose another folder"
            ) from error

    def _array(self) -> Path:
        """The file of the features: a run that ended between giving it its name and writing the
        manifest left the final one.
        """
        return self.features if self.features.exists() else self.path / "features.npy"

    def _status(self) -> np.ndarray:
        return np.frombuffer(os.pread(self.progress, self.images + 1, 0), np.uint8)

    def _remove_leftovers(self) -> None:
        for leftover in (self.description, self.path / "progress.partial"):
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
        """Put the (n, 2, D) features of a part on the disk, then mark it. replaced: its images
        whose records are damaged.

        Errors: InputError if a feature is not finite in float16, naming its image's index, or if
        the disk is full; what was marked before stays.
        """
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(features, np.float16)
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

    def finish(self, name_of) -> None:
        """Wait for the other ranks' parts, then give the files their names and write the manifest;
        rank 0 only. name_of: index -> record.
        """
        while self.missing():
            # and not in a collective: a rank may be hours behind, which is longer than those wait
            time.sleep(0.2)
        if self.features.exists():
            os.replace(self.features, self.path / "features.npy")
        names = {index: name_of(index) for index in self.replaced()}
        with replacing(self.path / "manifest.json") as file:
            file.write(
                (
                    json.dumps(dict(self.manifest, replaced=sorted(names.items())), indent=2) + "\n"
                ).encode()
            )
        self._remove_leftovers()
