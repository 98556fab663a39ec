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

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import InputError, RecordError
from utils.recordio.reader import RecordFile

FORMAT = 1


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
