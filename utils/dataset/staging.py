"""Copies of a set on a disk of this machine (``config.stage_to``), made once and kept for the next
run.

    <stage_to>/<name of the folder>-<digest>/       the digest tells the source: path, names, sizes
        and times of its files source.json      what is copied; written first ...              the
        files; while one is copied, NAME.partial and NAME.sums (SHA-256 of every PART of it)
        complete.json    sizes and times of the copies; written last
        reading          locked, shared, by the runs that read here: while one does, nobody removes
        the folder copying          locked by the run that copies

A source that has changed gets a folder of its own; the one before it is removed unless a run still
reads it. An interrupted copy goes on at the first part whose sum does not fit. Every part is read
back from the disk and compared before the file gets its name.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from utils.errors import InputError
from utils.files import read_json, take_lock, write_json

# bytes
PART = 1 << 24
# seconds between two lines of the log about a long copy
SAY_EVERY = 30

log = logging.getLogger(__name__)
# locks of the copies that this process reads, until it ends
_held = []


def stage(source: str | Path, names: Sequence[str], to: str | Path) -> Path:
    """The folder below ``to`` with sound copies of the files ``names`` of the folder ``source``;
    copies them, or waits for the run that does, if need be.

    Raises InputError if the disk is too small, cannot be written to, or does not give back what was
    written, or if the source changes meanwhile.
    """
    source = Path(source).absolute()
    copy = None
    try:
        described = describe(source, names)
        copy = Path(to) / f"{source.name}-{sha256(json.dumps(described).encode()).hexdigest()[:16]}"
        copy.mkdir(parents=True, exist_ok=True)
        reading = take_lock(copy / "reading", shared=True)
        if not is_complete(copy, described):
            with take_lock(copy / "copying", wait=False) or wait_for_other(copy):
                if not is_complete(copy, described):
                    make(copy, source, described)
    except OSError as error:
        raise InputError(
            f"stage_to: cannot copy {source} to {copy or to} ({error.strerror}: "
            f"{error.filename}); what is done is kept: make room, choose another folder, "
            "or set stage_to= to read the set where it is"
        ) from error
    _held.append(reading)
    log.info("%s is read from its copy %s", source, copy)
    return copy


def wait_for_other(copy: Path):
    log.info("another run is copying to %s: waiting for it", copy)
    return take_lock(copy / "copying")


def describe(source: Path, names: Sequence[str]) -> dict:
    """What is copied: a file that is replaced or written to has another size or time."""
    return dict(source=str(source), files={name: marks(source / name) for name in sorted(names)})


def marks(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def is_complete(copy: Path, described: dict) -> bool:
    """Whether all copies are there as they were when they were found to be sound."""
    complete = read_note(copy / "complete.json")
    if complete.keys() != described["files"].keys():
        return False
    for name, then in complete.items():
        if not (copy / name).is_file() or marks(copy / name) != then:
            return False
    return True


def read_note(path: Path) -> dict:
    """What ``make`` wrote there; {} where it did not, or not to the end."""
    try:
        return read_json(path)
    except (FileNotFoundError, InputError):
        return {}


def make(copy: Path, source: Path, described: dict) -> None:
    """Copy what is missing, or is not any more what was copied; no other process does so
    meanwhile.
    """
    remove_outdated(copy, described)
    for name, then in read_note(copy / "complete.json").items():
        if (copy / name).is_file() and marks(copy / name) != then:
            log.warning("%s is not any more what was copied there: copying it again", copy / name)
            (copy / name).unlink()
    (copy / "complete.json").unlink(missing_ok=True)
    write_json(copy / "source.json", described)
    refuse_too_small(copy, source, described)
    for name, then in described["files"].items():
        target = copy / name
        # it got its name when it was found to be sound
        if not (target.is_file() and target.stat().st_size == then[0]):
            copy_file(source / name, target)
        if marks(source / name) != then:
            target.unlink()
            raise InputError(
                f"stage_to: {source / name} changed while it was copied to {copy}; "
                "start again when it is finished"
            )
    write_json(copy / "complete.json", {name: marks(copy / name) for name in described["files"]})


def remove_outdated(copy: Path, described: dict) -> None:
    """Remove copies of what these files were before, unless a run reads them."""
    for other in copy.parent.iterdir():
        if not other.is_dir() or other == copy:
            continue
        before = read_note(other / "source.json")
        is_same_set = before.get("source") == described["source"]
        if not is_same_set or before.get("files", {}).keys() != described["files"].keys():
            continue
        reading = take_lock(other / "reading", wait=False)
        if reading is None:
            log.warning("%s is outdated, but a run still reads it: it stays", other)
            continue
        with reading:
            log.info("removing %s, a copy of what %s was before", other, described["source"])
            shutil.rmtree(other)


def refuse_too_small(copy: Path, source: Path, described: dict) -> None:
    there = sum(
        part.stat().st_size
        for name in described["files"]
        for part in (copy / name, partial(copy / name))
        if part.is_file()
    )
    needed = sum(size for size, _ in described["files"].values()) - there
    free = shutil.disk_usage(copy).free
    if needed > free:
        raise InputError(
            f"stage_to: {source} takes {needed / 1e9:.3f} GB more in {copy.parent}, "
            f"{free / 1e9:.3f} GB are free on its disk; make room, "
            "choose another folder, or set stage_to= to read the set where it is"
        )


def partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def copy_file(source: Path, target: Path) -> None:
    """Copy one file part by part, from where an interrupted copy was; it gets its name when all of
    it was read back from the disk.
    """
    size, sums_path = source.stat().st_size, target.with_name(f"{target.name}.sums")
    sums = sums_path.read_text().split() if sums_path.is_file() else []
    said = time.monotonic()
    with (
        open(source, "rb", buffering=0) as original,
        open(
            partial(target), "r+b" if partial(target).is_file() else "w+b", buffering=0
        ) as written,
    ):
        sums = sums[: sound_parts(written, sums, size)]
        kept = len(sums)
        with open(sums_path, "w") as journal:
            journal.writelines(f"{line}\n" for line in sums)
            for start in range(kept * PART, size, PART):
                content = read_part(original, start)
                write_part(written, start, content)
                sums.append(sha256(content).hexdigest())
                journal.write(f"{sums[-1]}\n")
                journal.flush()
                if time.monotonic() - said > SAY_EVERY:
                    said = time.monotonic()
                    log.info(
                        "%s: %.1f of %.1f GB are copied",
                        target,
                        (start + len(content)) / 1e9,
                        size / 1e9,
                    )
        written.truncate(size)
        os.fsync(written.fileno())
        # so that it is read back from the disk itself
        os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        sound = sound_parts(written, sums, size, kept)
    if sound * PART < size:
        sums_path.unlink()
        raise InputError(
            f"stage_to: {target} is not what was written to it, at byte "
            f"{sound * PART}; its disk is damaged: choose another folder"
        )
    os.replace(partial(target), target)
    sums_path.unlink()


def sound_parts(written, sums: Sequence[str], size: int, first: int = 0) -> int:
    """How many parts, from the beginning, hold what ``sums`` says; the ``first`` ones are known
    to.
    """
    for number in range(first, min(len(sums), -(-size // PART))):
        if sha256(read_part(written, number * PART)).hexdigest() != sums[number]:
            return number
    return min(len(sums), -(-size // PART))


def read_part(file, start: int) -> bytes:
    """PART bytes at ``start``, fewer at the end of the file; a network file system may give them
    piece by piece.
    """
    pieces, end = [], start + PART
    while start < end and (piece := os.pread(file.fileno(), end - start, start)):
        pieces.append(piece)
        start += len(piece)
    return b"".join(pieces)


def write_part(file, start: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        written = os.pwrite(file.fileno(), left, start)
        left, start = left[written:], start + written
