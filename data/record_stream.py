"""A stream of labelled images as a record set, written so that a killed conversion goes on.

No command.

A source has ``parts``, the ``sizes`` of these in ``unit``, ``described()`` (what tells it from
others, for JSON), ``samples(part)``, an iterator of (anything, how much of the part is read), and
``read(anything)``, a Sample, which may raise BadImage. The set gets the plain layout, in the
source's order.

Meanwhile ``.<output>.make_rec`` beside the output (in it, if it is a disk of its own) holds files
that only grow, and ``state.json``, which says how far each was when all of that was on the disk.
Whoever goes on cuts them there.
Which class a label is shows at the end: until then a record has the label of the source, if that
is a number that can be a class, and is corrected then.
"""

import json
import os
import re
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from tqdm import tqdm

from data.packing import (
    LABEL_MAP,
    BadImage,
    check_output,
    install,
    place_for_work,
    write_table,
)
from utils.errors import InputError, RecordError
from utils.files import read_json, replacing, take_lock, write_json
from utils.recordio.files import IMAGE_SIZE
from utils.recordio.format import EXACT_IN_FLOAT32, IRHeader, frame, pack, unpack
from utils.recordio.idx_file import write_index
from utils.recordio.reader import RecordFile
from utils.recordio.writer import write_property

STATE = "state.json"
# of what ``.<output>.make_rec`` holds
FORMAT = 2
# images between two states: so many a killed conversion repeats at most
STATE_EVERY = 10_000
# images between two moves of the progress bar
SHOWN_EVERY = 100
# what grows: the records, of each an entry and a name, and the labels as they come up, in JSON
GROWING = ("train.rec", "entries", "names", "labels")
# of a record: where it begins, number of its label among those, CRC-32 of its image
ENTRY = np.dtype([("offset", "<i8"), ("label", "<u4"), ("checksum", "<u4")])
ENTRY_BYTES = struct.Struct("<qII")
# bytes from the start of a record to its label: the frame's two words and the flag
LABEL_AT = 12
# no label has more digits
WHOLE_NUMBER = re.compile(r"[+-]?\d{1,18}", re.ASCII)


class Sample(NamedTuple):
    """name: for messages and train.lst. image: the encoded file. label: as the source has it."""

    name: str
    image: bytes
    label: int | str


class Written(NamedTuple):
    """What became of a source; left_out: bad samples. is_mapped: whether labels became others."""

    images: int
    classes: int
    left_out: int
    is_mapped: bool


def parse_label(text: str, name: str) -> int | str:
    """A label from a text file: a whole number or a word. Raises BadImage if it is neither."""
    text = text.strip()
    if WHOLE_NUMBER.fullmatch(text):
        return int(text)
    if not text or not text.isprintable():
        raise BadImage(f"{name}: its label, {text[:40]!r}, is no whole number and no word")
    return text


def typed_label(label, name: str) -> int | str:
    """A label that is a number or a string already, of which ``"007"`` and ``"7"`` are two.

    Raises BadImage if it is anything else.
    """
    if isinstance(label, float) and label.is_integer():
        return int(label)
    if isinstance(label, int) and not isinstance(label, bool):
        return label
    if not isinstance(label, str):
        raise BadImage(f"{name}: its label, {label!r:.40}, is no whole number and no word")
    parsed = parse_label(label, name)
    return parsed if str(parsed) == label.strip() else label.strip()


def write_stream(
    source, output: Path, encode: Callable[[bytes, str], bytes], options: dict, skip_bad: bool
) -> Written:
    """Write the record set ``output``, or go on where a killed process was.

    encode: as ``data/packing.image_encoder`` makes it. options: what decides about its bytes.
    skip_bad: leave bad samples out and list them. Raises InputError if the source is damaged or
    has fewer than two labels, and for a bad sample.
    """
    # where a link leads
    output = output.resolve()
    check_output(str(output))
    folder = place_for_work(output) / f".{output.name}.make_rec"
    folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder / "lock", wait=False)
    if not lock:
        raise InputError(f"--output {output}: another process is writing it, in {folder}")
    with lock:
        origin = json.dumps([FORMAT, source.described(), options])
        stream = Stream(folder, sha256(origin.encode()).hexdigest())
        try:
            if not stream.is_finished:
                stream.append(source, encode, skip_bad)
                stream.finish()
        except (InputError, OSError):
            if (folder / STATE).is_file():
                print(f"what was written is kept in {folder}: the same command goes on", flush=True)
            else:
                shutil.rmtree(folder)
            raise
        install(str(folder), str(output))
        shutil.rmtree(folder)
    return Written(*stream.state["written"])


class Stream:
    """The growing files of a conversion, opened where its last state says."""

    def __init__(self, folder: Path, origin: str):
        """origin: tells what is converted and how; what has another origin is written over."""
        self.folder = folder
        sizes = dict.fromkeys(GROWING, 0)
        self.state = dict(origin=origin, part=0, within=0, images=0, left_out=0, sizes=sizes)
        if (folder / STATE).is_file():
            state = read_json(folder / STATE)
            if state["origin"] == origin:
                self.state = state
                print(f"going on behind {state['images']:,} images", flush=True)
            else:
                print(f"{folder} is of other files or options: starting anew", flush=True)
                (folder / STATE).unlink()
        self.is_finished = "written" in self.state
        if self.is_finished:
            # maybe moved away already
            return
        self.files = {name: open(folder / name, "ab", buffering=1 << 20) for name in GROWING}
        for name, file in self.files.items():
            file.truncate(self.state["sizes"][name])
            # or tell() would go on from where the file ended before
            file.seek(0, os.SEEK_END)
        self.end = self.state["sizes"]["train.rec"]
        lines = (folder / "labels").read_bytes().splitlines()
        self.labels = {json.loads(line): number for number, line in enumerate(lines)}

    def append(self, source, encode: Callable[[bytes, str], bytes], skip_bad: bool) -> None:
        """Write what the source has behind the last state."""
        state = self.state
        done = sum(source.sizes[: state["part"]])
        with tqdm(
            desc="writing",
            total=sum(source.sizes),
            initial=done,
            unit=source.unit,
            unit_scale=True,
            disable=None,
        ) as bar:
            for part in range(state["part"], len(source.parts)):
                for sample, position in islice(source.samples(part), state["within"], None):
                    try:
                        self.write(source.read(sample), encode)
                    except BadImage as error:
                        if not skip_bad:
                            raise InputError(f"{error}; --skip-bad leaves such out") from None
                        bar.write(f"left out: {error}", file=sys.stderr)
                        state["left_out"] += 1
                    state["within"] += 1
                    if state["within"] % STATE_EVERY == 0:
                        self.save()
                    if state["within"] % SHOWN_EVERY == 0:
                        bar.set_postfix_str(f"{state['images']:,} images", refresh=False)
                        bar.update(done + position - bar.n)
                done += source.sizes[part]
                bar.update(done - bar.n)
                state.update(part=part + 1, within=0)
                self.save()

    def write(self, sample: Sample, encode: Callable[[bytes, str], bytes]) -> None:
        """Append a record. Raises BadImage, having written nothing."""
        image = encode(sample.image, sample.name)
        key = self.state["images"]
        if sample.label not in self.labels:
            self.labels[sample.label] = len(self.labels)
            self.files["labels"].write(f"{json.dumps(sample.label)}\n".encode())
        record = frame(pack(IRHeader(0, float(provisional(sample.label)), key, 0), image))
        entry = ENTRY_BYTES.pack(self.end, self.labels[sample.label], zlib.crc32(image))
        self.files["train.rec"].write(record)
        self.files["entries"].write(entry)
        self.files["names"].write(os.fsencode(sample.name.replace("\n", "?")) + b"\n")
        self.end += len(record)
        self.state["images"] += 1

    def save(self) -> None:
        """Bring everything to the disk, then the state that says so."""
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            self.state["sizes"][name] = file.tell()
        write_json(self.folder / STATE, self.state)

    def finish(self) -> None:
        """Classes for labels, the other files of the set, the check, and a state that says so.

        Raises InputError if there are fewer than two labels or too many, or a record reads back
        otherwise than it was written.
        """
        if len(self.labels) < 2:
            self.give_up(
                f"{self.state['images']} images with {len(self.labels)} labels: training needs "
                "two identities or more"
            )
        if len(self.labels) > EXACT_IN_FLOAT32:
            self.give_up(
                f"{len(self.labels)} identities: a record's label is a float32, which tells "
                f"{EXACT_IN_FLOAT32} apart"
            )
        for file in self.files.values():
            file.close()
        classes, is_mapped = self.classes_of_labels()
        entries = np.memmap(self.folder / "entries", ENTRY, "r")
        labels = classes[entries["label"]]
        self.correct_labels(entries, classes)
        write_property(str(self.folder), len(classes), IMAGE_SIZE)
        write_index(str(self.folder / "train.idx"), range(len(entries)), entries["offset"])
        with open(self.folder / "names", "rb") as names, replacing(self.folder / "train.lst") as to:
            rows = enumerate(zip(labels, names, strict=True))
            to.writelines(b"%d\t%d\t%s" % (key, label, name) for key, (label, name) in rows)
        self.check(entries, labels)
        written = Written(len(entries), len(classes), self.state["left_out"], is_mapped)
        self.state["written"] = list(written)
        write_json(self.folder / STATE, self.state)

    def classes_of_labels(self) -> tuple[np.ndarray, bool]:
        """((C,) class of each label, whether these differ from the labels); with a map if so.

        Labels 0 ... C - 1 stay; others become classes in their order, numbers by size.
        """
        are_numbers = all(isinstance(label, int) for label in self.labels)
        in_order = sorted(self.labels, key=None if are_numbers else str)
        classes = np.empty(len(in_order), np.int32)
        classes[[self.labels[label] for label in in_order]] = np.arange(len(in_order))
        is_mapped = in_order != list(range(len(in_order)))
        (self.folder / LABEL_MAP).unlink(missing_ok=True)
        if is_mapped:
            write_table(self.folder / LABEL_MAP, ("class", "label"), enumerate(in_order))
        return classes, is_mapped

    def correct_labels(self, entries: np.ndarray, classes: np.ndarray) -> None:
        """Write the class into each record that has another label."""
        written = np.array([provisional(label) for label in self.labels])
        wrong = np.flatnonzero((written != classes)[entries["label"]])
        with open(self.folder / "train.rec", "r+b") as file:
            for offset, label in zip(
                entries["offset"][wrong].tolist(),
                classes[entries["label"][wrong]].tolist(),
                strict=True,
            ):
                os.pwrite(file.fileno(), struct.pack("<f", label), offset + LABEL_AT)
            os.fsync(file.fileno())
            # so that it is read back from the disk itself
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def check(self, entries: np.ndarray, labels: np.ndarray) -> None:
        """Read every record back. Raises InputError if one is not what was meant."""
        records = RecordFile(str(self.folder / "train.rec"))
        rows = zip(entries["offset"], labels, entries["checksum"], strict=True)
        bar = tqdm(rows, desc="checking", total=len(entries), unit="img", disable=None)
        for key, (offset, label, checksum) in enumerate(bar):
            try:
                header, image = unpack(records.read(int(offset), key))
                is_equal = (header.id, header.label) == (key, label)
                is_equal = is_equal and zlib.crc32(image) == checksum
            except RecordError:
                is_equal = False
            if not is_equal:
                self.give_up(
                    f"record {key} differs from what was written: check the disk, and start again"
                )

    def give_up(self, message: str) -> NoReturn:
        """Raises InputError; nobody can go on from here."""
        (self.folder / STATE).unlink()
        raise InputError(message)


def provisional(label: int | str) -> int:
    """What a record has for a label until classes are known."""
    can_be_class = isinstance(label, int) and 0 <= label < EXACT_IN_FLOAT32
    return label if can_be_class else 0
