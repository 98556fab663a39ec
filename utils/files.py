"""Files that appear whole or not at all, and locks between the processes of a machine."""

import codecs
import csv
import fcntl
import io
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

from utils.errors import InputError


@contextmanager
def replacing(path: str | Path, mode: str = "wb"):
    """Write a temporary neighbour of ``path``; it takes that name if the block ends well."""
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def read_text(path: str | Path) -> str:
    """What somebody wrote by hand: UTF-8 with or without a byte order mark, or UTF-16 with one.

    Lines end as "\\n". The names of files that are not UTF-8 come as Python gives them, so that
    they find the files. Raises InputError for UTF-16 that is damaged.
    """
    content = Path(path).read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            content = content.decode("utf-16").encode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} begins as UTF-16 text and is not: {error.reason}; save it as UTF-8"
            ) from error
    text = os.fsdecode(content.removeprefix(codecs.BOM_UTF8))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def printable(name: str) -> str:
    """A file's name where text must be UTF-8: a byte that is not comes as ``\\udce9``."""
    return name.encode("utf-8", "backslashreplace").decode()


def utf8_path(path: Path) -> str:
    """A path that is UTF-8 to a file or folder that is there.

    TensorBoard, onnxruntime, safetensors and pyarrow take no other. Good in this process and its
    forks, while they live.
    """
    if printable(str(path)) == str(path):
        return str(path)
    if printable(path.name) == path.name:
        return f"{utf8_path(path.parent)}/{path.name}"
    # Linux, where alone such names exist, also names what is open by its number
    return f"/proc/self/fd/{os.open(path, os.O_RDONLY)}"


@contextmanager
def temporary_folder(prefix: str, folder: Path):
    """A temporary folder inside ``folder``, whose files can be renamed to where they belong; it
    goes when the block ends, also by SIGTERM. For the main thread.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as path:
            yield Path(path)
    finally:
        signal.signal(signal.SIGTERM, before)


def take_lock(path: str | Path, shared: bool = False, wait: bool = True):
    """Lock the file ``path``, made if it is missing, until the returned file is closed or this
    process and its forks have ended.

    None if another process has it and ``wait`` is False. Whoever removes ``path`` holds its lock:
    one that was waiting meanwhile starts again on the new file.
    """
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    if not wait:
        operation |= fcntl.LOCK_NB
    while True:
        file = open(path, "ab")
        try:
            fcntl.flock(file, operation)
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
            file.close()
        except BlockingIOError:
            file.close()
            return None


def prepare_folder(path: Path, flag: str) -> None:
    """Make the folder that a flag names.

    Raises InputError if it is none and cannot become one, or nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{flag}: {path.absolute()} is no folder and cannot become one: {error.strerror}"
        ) from error
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(
            f"{flag}: nothing can be written to {path.absolute()}: {error.strerror}"
        ) from error


def prepare_file(path: Path, flag: str) -> None:
    """Make the folder of the file that a flag names.

    Raises InputError as ``prepare_folder`` does, and if the path is a folder.
    """
    if path.is_dir():
        raise InputError(f"{flag}: {path.absolute()} is a folder; name a file")
    prepare_folder(path.absolute().parent, flag)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8, by write-then-rename; what is none in a name comes as in ``printable``."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def csv_text(rows: Iterable[Iterable]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_json(path: str | Path, content) -> None:
    """Write strict JSON, by write-then-rename; NaN and infinities become null."""
    write_text(path, dumps(content, indent=2) + "\n")


def read_json(path: str | Path, what: str = "a JSON object", advice: str = "") -> dict:
    """The JSON object in a file.

    what: of what it should be an object, for the message; advice: how to mend it, which ends the
    message. Raises InputError naming the file if it is not JSON or holds something else.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
    # of syntax or encoding
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}){advice}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not {what}{advice}")
    return content


def dumps(value, **options) -> str:
    """``json.dumps`` of dicts, lists and plain values; NaN and infinities become null."""
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value):
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
