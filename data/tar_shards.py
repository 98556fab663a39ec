"""WebDataset shards: tar archives in which the files of a sample follow one another.

No command.

``some/folder/0001.jpg`` and ``some/folder/0001.cls`` are one sample, in any order. Its key is the
path up to the first dot of the file's name, its extension the rest in small letters. A label is a
whole number or a word: the text of ``.cls``, else ``label`` of ``.json``, else the text of
``.txt``. Archives may be compressed (``.tar.gz``). They are read once from front to back.
Source: the webdataset library's format description.
"""

import gzip
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from data.packing import BadImage
from data.record_stream import Sample, parse_label, typed_label
from utils.errors import InputError, first_line
from utils.recordio.files import by_number

SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGES = ("jpg", "jpeg", "png", "webp")
LABELS = ("cls", "json", "txt")
GZIP_START = b"\x1f\x8b"
# bytes: of a tar archive's blocks, of which two that are empty end it
BLOCK = 512
READ_AT_A_TIME = 1 << 20


class TarShards:
    """The samples of archives, in their order: a source of ``data/record_stream.py``."""

    unit = "B"

    def __init__(self, names: list[str]):
        """names: archives, folders of them, brace patterns.

        Raises InputError naming what is not there or there twice.
        """
        self.parts = find_shards(names)
        self.sizes = [path.stat().st_size for path in self.parts]

    def described(self) -> list:
        """What tells these archives from others: paths, sizes, times."""
        times = [path.stat().st_mtime_ns for path in self.parts]
        return [list(row) for row in zip(map(str, self.parts), self.sizes, times, strict=True)]

    def samples(self, part: int) -> Iterator[tuple[tuple, int]]:
        """((name, files), bytes of the archive read so far) of each sample; see ``read``.

        Raises InputError if the archive is damaged or cut off.
        """
        path = self.parts[part]
        files, key = {}, None
        for member_key, suffix, content, position in members(path):
            if member_key != key:
                if files:
                    yield (f"{path.name}/{key}", files), position
                files, key = {}, member_key
            if suffix in files:
                raise InputError(f"{path}: {key}.{suffix} is there twice")
            files[suffix] = content
        if files:
            yield (f"{path.name}/{key}", files), self.sizes[part]

    def read(self, sample: tuple[str, dict[str, bytes]]) -> Sample:
        """Raises BadImage if it has no image, several, or no label."""
        name, files = sample
        images = [suffix for suffix in IMAGES if suffix in files]
        if len(images) != 1:
            what = f"several images ({', '.join(images)})" if images else "no image"
            raise BadImage(
                f"{name} has {what}: its files are {', '.join(files)}; one of "
                f"{', '.join(IMAGES)} is needed (a key ends at the first dot of the file's name)"
            )
        return Sample(name, files[images[0]], find_label(name, files))


# --- archives


def members(path: Path) -> Iterator[tuple[str, str, bytes, int]]:
    """(key, extension, content, bytes read so far) of every file of an archive; the content is
    empty where no sample needs it. Names that begin with a dot or look like ``__meta__`` are left
    out.
    """
    try:
        with open(path, "rb", buffering=READ_AT_A_TIME) as file:
            compressed = file.peek(2)[:2] == GZIP_START
            tape = Tape(gzip.GzipFile(fileobj=file) if compressed else file)
            with tarfile.open(fileobj=tape, mode="r:") as archive:
                for member in archive:
                    # or it would keep all of them
                    archive.members = []
                    key, suffix = split_name(member.name)
                    if not key or not member.isreg():
                        continue
                    needed = suffix in IMAGES or suffix in LABELS
                    content = archive.extractfile(member).read() if needed else b""
                    yield key, suffix, content, file.tell()
            tape.check_end()
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path} is damaged, cut off or no tar archive ({first_line(error)}): fetch it again"
        ) from error


class Tape:
    """A file that is read forward, and remembers the last block that was asked for."""

    def __init__(self, file):
        self.file, self.seek, self.tell = file, file.seek, file.tell
        self.last = b""

    def read(self, size: int) -> bytes:
        self.last = self.file.read(size)
        return self.last

    def check_end(self) -> None:
        """Raises ReadError unless the last block is the empty one that ends an archive, and only
        padding follows: tarfile takes all else for the end, too.
        """
        if self.last != bytes(BLOCK):
            raise tarfile.ReadError("it has no end mark")
        while rest := self.file.read(READ_AT_A_TIME):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("more follows behind its end mark")


def split_name(path: str) -> tuple[str, str]:
    """(key, extension in small letters) of a file, ("", "") of one that is no part of a sample."""
    folder, slash, name = path.rpartition("/")
    stem, dot, suffix = name.partition(".")
    is_meta = path.startswith("__") and re.match("__[^/]*__($|/)", path)
    if not stem or not dot or is_meta:
        return "", ""
    return f"{folder}{slash}{stem}", suffix.lower()


# --- labels


def find_label(name: str, files: dict[str, bytes]) -> int | str:
    """Raises BadImage if there is none, or one that is neither a whole number nor a word."""
    if "cls" in files:
        return parse_label(as_text(files["cls"]), name)
    if "json" in files:
        content = parse_json(name, files["json"])
        if "label" in content:
            return typed_label(content["label"], name)
        if "txt" not in files:
            raise BadImage(
                f"{name}.json has no 'label'; it holds {', '.join(content) or 'nothing'}"
            )
    if "txt" in files:
        return parse_label(as_text(files["txt"]), name)
    raise BadImage(f"{name} has no label: none of {', '.join(LABELS)} beside {', '.join(files)}")


def as_text(content: bytes) -> str:
    return content.decode("utf-8-sig", "backslashreplace")


def parse_json(name: str, content: bytes) -> dict:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise BadImage(f"{name}.json is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadImage(f"{name}.json holds no object with a 'label'")
    return value


# --- names


def find_shards(names: list[str]) -> list[Path]:
    """The archives that brace patterns, paths and folders (all archives in them) name, in order.

    Raises InputError naming what is not there or there twice.
    """
    paths = []
    for pattern in names:
        for name in expand_braces(pattern):
            path = Path(name)
            paths += shards_in(path) if path.is_dir() else [path]
    paths = [path.absolute() for path in paths]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"{len(missing)} of {len(paths)} shards are missing, first {missing[0]}")
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise InputError(f"--webdataset names {twice} twice")
    return paths


def shards_in(folder: Path) -> list[Path]:
    visible = [path.name for path in folder.iterdir() if path.name[0] != "."]
    names = [name for name in visible if name.endswith(SUFFIXES)]
    if not names:
        raise InputError(f"no {', '.join(SUFFIXES)} in the folder {folder.absolute()}")
    return [folder / name for name in sorted(names, key=by_number)]


def expand_braces(pattern: str) -> list[str]:
    """``a-{00..11}.tar`` and ``{a,b}.tar`` as a shell's, ``a-00.tar`` ... ``a-11.tar``."""
    for start, character in enumerate(pattern):
        if character != "{":
            continue
        choices, end = read_braces(pattern, start)
        if choices:
            rest = expand_braces(pattern[end:])
            inside = [name for choice in choices for name in expand_braces(choice)]
            return [pattern[:start] + name + tail for name in inside for tail in rest]
    return [pattern]


def read_braces(pattern: str, start: int) -> tuple[list[str], int]:
    """(what the braces that open at ``start`` stand for, where they have ended).

    No choices if they are not closed, or hold neither a comma nor a range.
    """
    choices, depth, begin = [], 0, start + 1
    for at in range(start, len(pattern)):
        character = pattern[at]
        depth += (character == "{") - (character == "}")
        if depth == 0 or (depth == 1 and character == ","):
            choices.append(pattern[begin:at])
            begin = at + 1
        if depth == 0:
            return choices if len(choices) > 1 else numbers_of(choices[0]), begin
    return [], len(pattern)


def numbers_of(text: str) -> list[str]:
    """``08..11`` as 08, 09, 10, 11; nothing for what is no range."""
    limits = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not limits:
        return []
    first, last = limits.groups()
    is_padded = any(len(number) > 1 and number[0] == "0" for number in (first, last))
    width = max(len(first), len(last)) if is_padded else 0
    step = 1 if int(first) <= int(last) else -1
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
