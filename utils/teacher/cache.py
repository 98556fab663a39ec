"""Teacher features of a training set on disk, read in training instead of running the teacher.

train/cache_teacher.py writes them. A cache is a folder of

    features.npy     (N, 2, D) float16, in the data set's order: of every image and of its mirror
                     image; np.load(..., mmap_mode="r") opens it
    manifest.json    what they are; written last, so that a folder without it is no cache

and, while it is made, of features.npy.partial, manifest.json.partial and progress.partial (a byte
for every image), from which a killed run goes on.

Rows are read and written by position and not through a memory map: at random places a map fetches
many times what was asked for from a cold disk (measured: 2,048 MB for rows of 105 MB, by position
305 MB), a file that was cut off or a full disk would end the process without a word, and ranks on
two machines would undo each other's pages.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import InputError, RecordError
from utils.files import read_json
from utils.recordio.reader import RecordFile

FORMAT = 1
# of a manifest; the teacher's keys are those of CacheSource
KEY_TYPES = dict(images=int, embedding_size=int, data=dict, teacher=dict, replaced=list)
MAKE = "make it with train/cache_teacher.py"
AGAIN = "remove the folder and make it again with train/cache_teacher.py"


class CacheSource(NamedTuple):
    """Where features come from, as a manifest has it.

    name: of the teacher, as config.teacher; of the file, if they were imported. precision: "fp32",
    "bf16" or "fp16"; of imported features the type of their numbers. file: name of the file of
    weights; sha256: of that file, None if the features were imported. imported: SHA-256 of the file
    they were imported from. repository: on the hub. color_space_set: by config.color_space, against
    the teacher's own.
    """

    name: str
    precision: str
    file: str = ""
    sha256: str | None = None
    color_space: str | None = None
    normalisation: str | None = None
    imported: str | None = None
    repository: str = ""
    color_space_set: bool = False


class TeacherCache:
    """A complete cache; ``open_cache`` checks it.

    Workers of any kind may share it: the file is opened by the process that reads.
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

        Raises InputError if the file has become shorter.
        """
        rows = [self._pread(int(index), 1) for index in indices]
        return self._shaped(b"".join(rows), len(indices))

    def read_part(self, part: range) -> np.ndarray:
        """As ``read`` for consecutive images, in one go."""
        return self._shaped(self._pread(part.start, len(part)), len(part))

    def _pread(self, first: int, count: int) -> bytes:
        return self._file.pread(count * self._row, self._start + first * self._row)

    def _shaped(self, content: bytes, images: int) -> np.ndarray:
        if len(content) != images * self._row:
            raise InputError(f"{self._file.path} ends before features it should hold; {AGAIN}")
        return np.frombuffer(bytearray(content), np.float16).reshape(images, 2, self.embedding_size)

    @property
    def replaced(self) -> list[int]:
        """The images of damaged records, whose features are those of the next good one."""
        return [index for index, _ in self.manifest["replaced"]]

    def describe(self) -> str:
        teacher = self.manifest["teacher"]
        if teacher["imported"]:
            source = (
                f"imported from {teacher['name']}, SHA-256 {teacher['imported']}, "
                f"{teacher['precision']}"
            )
        else:
            source = (
                f"teacher {teacher['name']}, SHA-256 {teacher['sha256']}, "
                f"{teacher['color_space']} images, {teacher['normalisation']}, "
                f"made with {teacher['precision']}"
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
    """The cache in the folder ``path``, if it belongs to ``dataset`` and to the teacher.

    sha256: of the teacher's weights, None: whatever teacher made it; repository: where on the hub
    they are, "": anywhere. color_space: what that teacher is to see, "auto": what is its own.
    Raises InputError if there is none, it is unfinished or damaged, or anything differs, naming
    both values.
    """
    path = Path(path)
    cache = TeacherCache(path, read_manifest(path))
    subject = f"teacher_embeddings: {path} was made"
    if differing := differences(cache.manifest["data"], dataset.identity()):
        raise InputError(
            f"{subject} from other images than those of {dataset.root_dir}: {differing}; {MAKE} "
            "for this set"
        )
    teacher = cache.manifest["teacher"]
    if sha256 and teacher["sha256"] != sha256:
        made_from = "unknown ones, for its features were imported"
        if teacher["sha256"]:
            made_from = f"SHA-256 {teacher['sha256']}"
        raise InputError(
            f"{subject} from other weights, {made_from}, than those of the teacher that is set, "
            f"SHA-256 {sha256}; {MAKE} for this teacher, or set no teacher to take what the cache "
            "holds"
        )
    if repository and teacher["repository"] != repository:
        raise InputError(
            f"{subject} from {teacher['repository'] or teacher['name']}, not from {repository}; "
            f"{MAKE} for this teacher, or set teacher_repo_id= and a teacher without a repository "
            "to take what the cache holds"
        )
    if sha256 and color_space == "auto" and teacher["color_space_set"]:
        raise InputError(
            f"{subject} with color_space={teacher['color_space']} against the teacher's own: set "
            f"it here as well, or {MAKE} without"
        )
    if color_space != "auto" and teacher["color_space"] not in (color_space, None):
        raise InputError(
            f"{subject} from {teacher['color_space']} images, color_space={color_space}; {MAKE}, "
            "or set color_space=auto"
        )
    for index in cache.replaced:
        refuse_mended(dataset, index, path)
    return cache


def refuse_mended(dataset, index: int, path: Path) -> None:
    """A record that was damaged when the cache was made must still be.

    It has another image's features there.
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

    Raises InputError if there is no complete cache or the file is damaged.
    """
    file = path / "manifest.json"
    progress = path / "progress.partial"
    if not file.is_file():
        if not progress.is_file():
            raise InputError(f"teacher_embeddings: no manifest.json in {path.absolute()}; {MAKE}")
        status = np.fromfile(progress, np.uint8)
        raise InputError(
            f"teacher_embeddings: {path} is not complete, {np.count_nonzero(status)} of "
            f"{len(status)} images are done; go on with the same train/cache_teacher.py command"
        )
    manifest = load_manifest(file)
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{file} has format {manifest.get('format')!r}, this version reads format {FORMAT}; "
            f"{AGAIN}"
        )
    wrong = [key for key, kind in KEY_TYPES.items() if not isinstance(manifest.get(key), kind)]
    if not wrong:
        wrong = [f"teacher.{key}" for key in CacheSource._fields if key not in manifest["teacher"]]
    if wrong:
        raise InputError(
            f"{file} is damaged: it says nothing proper about {', '.join(wrong)}; {AGAIN}"
        )
    return manifest


def load_manifest(file: Path) -> dict:
    return read_json(file, "a manifest", f"; {AGAIN}")


def make_manifest(dataset, embedding_size: int, source: CacheSource) -> dict:
    """What a cache of the data set ``dataset`` is before its first feature.

    The finished one also tells which records were ``replaced``.
    """
    return dict(
        format=FORMAT,
        images=len(dataset),
        embedding_size=embedding_size,
        teacher=source._asdict(),
        data=dataset.identity(),
    )


def differences(values: dict, expected: dict, prefix: str = "") -> str:
    """What differs, inner dicts included, as "key a instead of b, ..."; "" if nothing does."""
    differing = []
    for key in sorted(values.keys() | expected.keys()):
        left, right = values.get(key), expected.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            differing.append(differences(left, right, f"{prefix}{key}."))
        elif left != right:
            differing.append(f"{prefix}{key} {left} instead of {right}")
    return ", ".join(filter(None, differing))


def check_array(file: Path, images: int, embedding_size: int) -> int:
    """The offset of the features in a features.npy.

    Raises InputError if it is not there, cut off, or no (images, 2, D) float16.
    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"no file at {file.absolute()}; {AGAIN}") from None
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{file} is damaged or cut off ({error}); {AGAIN}") from error
    shape = (images, 2, embedding_size)
    if not isinstance(array, np.memmap):
        raise InputError(f"{file} is an archive of arrays and not one array; {AGAIN}")
    if array.shape != shape or array.dtype != np.float16 or not array.flags.c_contiguous:
        raise InputError(
            f"{file} holds {array.dtype} of shape {array.shape}, its manifest says float16 of "
            f"shape {shape}; {AGAIN}"
        )
    size = file.stat().st_size
    expected_size = array.offset + images * row_bytes(embedding_size)
    if size != expected_size:
        raise InputError(f"{file} has {size} bytes, {expected_size} are expected; {AGAIN}")
    return array.offset
