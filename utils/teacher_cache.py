"""Teacher features of a training set on disk: train/cache_teacher.py writes them, training reads
them instead of running the teacher.

A cache is a folder of

    features.npy     (N, 2, D) float16, in the data set's order: of every image and of its mirror
    image; np.load(..., mmap_mode="r") opens it manifest.json    what they are; written last, so
    that a folder without it is no cache

and, while it is made, of features.npy.partial, manifest.json.partial and progress.partial (a byte
for every image), from which a killed run goes on. Rows are read and written by position and not
through a memory map: at random places a map fetches many times what was asked for from a cold disk
(measured: 2,048 MB for rows of 105 MB, by position 305 MB), a file that was cut off or a full disk
would end the process without a word, and ranks on two machines would undo each other's pages.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import InputError
from utils.recordio import RecordError, RecordFile, replacing

FORMAT = 1
# images a rank computes before it writes and marks them: 2 MB of 512 dimensions, a minute of work
# at most
PART = 1024
# of an image in progress.partial; REPLACED: its record is damaged, the features are those of the
# next good one
MISSING, DONE, REPLACED = 0, 1, 2
MAKE = "make it with train/cache_teacher.py"
AGAIN = "remove the folder and make it again with train/cache_teacher.py"


class Origin(NamedTuple):
    """Where features come from, as a manifest tells it."""

    # of the teacher, as config.teacher; of the file, if they were imported
    name: str
    # "fp32", "bf16" or "fp16"; of imported features the type of their numbers
    precision: str
    file: str = ""  # name of the file of weights
    sha256: str | None = None  # of that file; None: unknown, the features were imported
    color_space: str | None = None
    normalisation: str | None = None
    imported: str | None = None  # SHA-256 of the file they were imported from
    repository: str = ""  # on the hub
    color_space_set: bool = False  # by config.color_space, and not the teacher's own


class TeacherCache:
    """A complete cache; ``open_cache`` checks it. Workers of any kind may share it: the file is
    opened by the process that reads.

    ``images`` N, ``embedding_size`` D, ``manifest``: a dict.
    """

    def __init__(self, path: Path, manifest: dict):
        self.path = path
        self.manifest = manifest
        self.images = manifest["images"]
        self.embedding_size = manifest["embedding_size"]
        self._start = check_array(path / "features.npy", self.images, self.embedding_size)
        self._row = row_bytes(self.embedding_size)
        self._file = RecordFile(str(path / "features.npy"))

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """(n, 2, D) float16 features of the images ``indices`` and of their mirror images.

        Errors: InputError if the file has become shorter.
        """
        return self._shaped(
            b"".join(
                self._file.pread(self._row, self._start + int(index) * self._row)
                for index in indices
            ),
            len(indices),
        )

    def read_part(self, part: range) -> np.ndarray:
        """As ``read`` for consecutive images, in one go."""
        return self._shaped(
            self._file.pread(len(part) * self._row, self._start + part.start * self._row), len(part)
        )

    def _shaped(self, content: bytes, images: int) -> np.ndarray:
        if len(content) != images * self._row:
            raise InputError(f"{self._file.path} ends before features it should hold; {AGAIN}")
        return np.frombuffer(bytearray(content), np.float16).reshape(images, 2, self.embedding_size)

    @property
    def replaced(self) -> list[int]:
        """The images whose records are damaged and whose features are those of the next good
        one.
        """
        return [index for index, _ in self.manifest["replaced"]]

    def describe(self) -> str:
        teacher = self.manifest["teacher"]
        source = (
            f"teacher {teacher['name']}, SHA-256 {teacher['sha256']}, "
            f"{teacher['color_space']} images, {teacher['normalisation']}, "
            f"made with {teacher['precision']}"
        )
        if teacher["imported"]:
            source = (
                f"imported from {teacher['name']}, SHA-256 {teacher['imported']}, "
                f"{teacher['precision']}"
            )
        return f"{self.path}: {self.images} x 2 x {self.embedding_size}, {source}"


def row_bytes(embedding_size: int) -> int:
    return 2 * embedding_size * np.dtype(np.float16).itemsize


def open_cache(
    path: str | Path,
    dataset,
    sha256: str | None = None,
    color_space: str = "auto",
    repository: str = "",
) -> TeacherCache:
    """The cache in the folder ``path``, if it is complete and belongs to ``dataset`` and to the
    teacher.

    sha256: of the teacher's weights, None: whatever teacher made it; repository: where on the hub
    they are, "": anywhere. color_space: what that teacher is to see, "auto": what is its own.
    Errors: InputError if there is none, it is unfinished or damaged, or anything differs, naming
    both values.
    """
    path = Path(path)
    cache = TeacherCache(path, read_manifest(path))
    if differing := differences(cache.manifest["data"], dataset.identity()):
        raise InputError(
            f"teacher_embeddings: {path} was made from other images than those of "
            f"{dataset.root_dir}: {differing}; {MAKE} for this set"
        )
    teacher = cache.manifest["teacher"]
    if sha256 and teacher["sha256"] != sha256:
        made = (
            f"SHA-256 {teacher['sha256']}"
            if teacher["sha256"]
            else ("unknown ones, for its features were imported")
        )
        raise InputError(
            f"teacher_embeddings: {path} was made from other weights, {made}, than "
            f"those of the teacher that is set, SHA-256 {sha256}; "
            f"{MAKE} for this teacher, or set no teacher to take what the cache holds"
        )
    if repository and teacher["repository"] != repository:
        raise InputError(
            f"teacher_embeddings: {path} was made from "
            f"{teacher['repository'] or teacher['name']}, not from {repository}; {MAKE} for this "
            "teacher, or set "
            "teacher_repo_id= and a teacher without a repository to take what the "
            "cache holds"
        )
    if sha256 and color_space == "auto" and teacher["color_space_set"]:
        raise InputError(
            f"teacher_embeddings: {path} was made with "
            f"color_space={teacher['color_space']} against the teacher's own: set it here as well, "
            f"or {MAKE} without"
        )
    if color_space != "auto" and teacher["color_space"] not in (color_space, None):
        raise InputError(
            f"teacher_embeddings: {path} was made from {teacher['color_space']} "
            f"images, color_space={color_space}; {MAKE}, or set color_space=auto"
        )
    for index in cache.replaced:
        refuse_mended(dataset, index, path)
    return cache


def refuse_mended(dataset, index: int, path: Path) -> None:
    """A record that was damaged when the cache was made has another image's features there: it must
    still be damaged.
    """
    try:
        dataset[index]
    except RecordError:
        return
    raise InputError(
        f"teacher_embeddings: record {dataset.name_of(index)} of {dataset.root_dir} "
        f"was damaged when {path} was made and can be read now; {AGAIN}"
    )


def read_manifest(path: Path) -> dict:
    """manifest.json of a cache.

    Errors: InputError if there is no complete cache or the file is damaged.
    """
    file = path / "manifest.json"
    if not file.is_file():
        if (path / "progress.partial").is_file():
            status = np.fromfile(path / "progress.partial", np.uint8)
            raise InputError(
                f"teacher_embeddings: {path} is not complete, "
                f"{np.count_nonzero(status)} of {len(status)} images are done; "
                "go on with the same train/cache_teacher.py command"
            )
        raise InputError(f"teacher_embeddings: no manifest.json in {path.absolute()}; {MAKE}")
    manifest = read_json(file)
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{file} has format {manifest.get('format')!r}, this version reads format "
            f"{FORMAT}; {AGAIN}"
        )
    expected = dict(images=int, embedding_size=int, data=dict, teacher=dict, replaced=list)
    wrong = [key for key, kind in expected.items() if not isinstance(manifest.get(key), kind)]
    wrong += [
        f"teacher.{key}" for key in Origin._fields if not wrong and key not in manifest["teacher"]
    ]
    if wrong:
        raise InputError(
            f"{file} is damaged: it says nothing proper about {', '.join(wrong)}; {AGAIN}"
        )
    return manifest


def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:  # of syntax or encoding
        raise InputError(f"{file} is damaged ({error}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__} and no manifest; {AGAIN}")
    return content


def make_manifest(dataset, embedding_size: int, origin: Origin) -> dict:
    """What a cache of the data set ``dataset`` is before its first feature; the finished one also
    tells which records were ``replaced``.
    """
    return dict(
        format=FORMAT,
        images=len(dataset),
        embedding_size=embedding_size,
        teacher=origin._asdict(),
        data=dataset.identity(),
    )


def differences(found: dict, wanted: dict, prefix: str = "") -> str:
    """ "key a instead of b, ..." for the values in which ``found`` is not ``wanted``, inner dicts
    included; "" if they are equal.
    """
    told = []
    for key in sorted(found.keys() | wanted.keys()):
        left, right = found.get(key), wanted.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            told.append(differences(left, right, f"{prefix}{key}."))
        elif left != right:
            told.append(f"{prefix}{key} {left} instead of {right}")
    return ", ".join(filter(None, told))


def check_array(file: Path, images: int, embedding_size: int) -> int:
    """The offset of the features in a features.npy.

    Errors: InputError if it is not there, cut off, or no (images, 2, D) float16.
    """
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"no file at {file.absolute()}; {AGAIN}") from None
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{file} is damaged or cut off ({error}); {AGAIN}") from error
    shape = (images, 2, embedding_size)
    if not isinstance(found, np.memmap):
        raise InputError(f"{file} is an archive of arrays and not one array; {AGAIN}")
    if found.shape != shape or found.dtype != np.float16 or not found.flags.c_contiguous:
        raise InputError(
            f"{file} holds {found.dtype} of shape {found.shape}, its manifest says "
            f"float16 of shape {shape}; {AGAIN}"
        )
    if file.stat().st_size != found.offset + images * row_bytes(embedding_size):
        raise InputError(
            f"{file} has {file.stat().st_size} bytes, "
            f"{found.offset + images * row_bytes(embedding_size)} are expected; {AGAIN}"
        )
    return found.offset


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
