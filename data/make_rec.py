"""Pack images into the files that training and verification read.

    python data/make_rec.py --images DIR --output OUT    # train.rec, .idx, .lst, property
    python data/make_rec.py --pairs pairs.txt --images DIR --output lfw.bin

``DIR`` has one sub-folder per identity; sorted, they become the labels 0, 1, ... Images are aligned
112x112 crops; JPEG files of that size are copied byte for byte, all else is encoded as JPEG.
``--layout plain`` (the default) is im2rec's: every record an image, shuffled by ``--seed`` unless
``--no-shuffle``. ``--layout insightface`` keeps an identity's images together, as its index records
require, in sorted order. The training scripts shuffle either layout every epoch. ``pairs.txt`` has
lines ``path1 path2 0|1`` (1: same person), paths below DIR, tab-separated if they contain spaces;
or it is LFW's own list (``pairs.txt``, ``pairsDevTrain.txt``, ``pairsDevTest.txt``), whose ``Name
1`` is ``DIR/Name/Name_0001.jpg`` or ``.png``. Pairs of one kind only are refused. What was written
is read back and compared before it gets its name.

Files that cannot be read, and JPEGs that end early (whose rest decoders fill with grey), are
refused; ``--skip-bad`` leaves them out of the records and lists them. An identity that has no
others is left out, too.
"""

import argparse
import os
import pickle
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import cv2
import numpy as np
from tqdm import tqdm

from data.pair_list import read_pairs
from utils.command_line import command_parser
from utils.dataset.base import first_label
from utils.dataset.folder import list_identities
from utils.errors import InputError, RecordError, run
from utils.files import replacing
from utils.images import decode_bgr
from utils.jpeg import JPEG_START, ends_early
from utils.recordio.files import IMAGE_SIZE
from utils.recordio.format import IRHeader, pack, unpack
from utils.recordio.indexed import IndexedRecordIO
from utils.recordio.writer import write_insightface, write_property


class BadImage(InputError):
    """An image file that cannot be read, or not to its end."""


class Entry(NamedTuple):
    """One image record: its key, label and path below the image folder."""

    key: int
    label: int
    path: str


def main() -> None:
    args = parse_arguments()
    encode = image_encoder(args.images, args.quality, args.resize)
    if args.pairs:
        count = write_pairs(args.pairs, args.images, encode, args.output)
        print(f"{args.output}: {count} pairs, read back and equal")
    else:
        count, classes, left_out = write_records(args, encode)
        skipped = f"; {left_out} bad files left out" if left_out else ""
        done = f"{count} images of {classes} identities, read back and equal"
        print(f"{args.output}: {done}{skipped}")


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__, allow_abbrev=True)
    parser.add_argument(
        "--images",
        required=True,
        help="folder of identities, or the folder the pair list refers to",
    )
    parser.add_argument("--output", required=True, help="folder for the records, or the .bin file")
    parser.add_argument(
        "--pairs", help="pair list, our own or LFW's; writes a .bin instead of records"
    )
    parser.add_argument("--layout", choices=("insightface", "plain"), default="plain")
    parser.add_argument(
        "--shuffle",
        action=argparse.BooleanOptionalAction,
        help="order of the plain layout (default: shuffled)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the shuffled order")
    parser.add_argument("--quality", type=int, default=95, help="of re-encoded images, 1 ... 100")
    parser.add_argument(
        "--resize",
        action="store_true",
        help="scale images of another size to 112x112 (not an alignment)",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out files that cannot be read or end early, and list them",
    )
    args = parser.parse_args()
    if args.skip_bad and args.pairs:
        raise InputError("--skip-bad is for records: a pair cannot do without one of its images")
    if not 1 <= args.quality <= 100:
        raise InputError(f"--quality is 1 ... 100, got {args.quality}")
    if args.shuffle and args.layout == "insightface" and not args.pairs:
        raise InputError(
            "--shuffle would tear the identities of the insightface layout apart; add "
            "--layout plain"
        )
    return args


def image_encoder(root: str, quality: int, resize: bool) -> Callable[[str], bytes]:
    """A function from a path below ``root`` to the JPEG bytes to store.

    It raises BadImage naming an image that cannot be read, InputError for one of another size.
    """

    def encode(path: str) -> bytes:
        full = os.path.join(root, path)
        try:
            with open(full, "rb") as file:
                stored = file.read()
            if ends_early(stored):
                raise RecordError("the JPEG ends early (no end marker)")
            image = decode_bgr(stored)
        except OSError as error:
            raise BadImage(f"cannot read the image {full}: {error.strerror}") from None
        except RecordError as error:
            raise BadImage(f"cannot read the image {full}: {error}") from None
        if image.shape[:2] != IMAGE_SIZE:
            if not resize:
                raise InputError(
                    f"{full} is {image.shape[1]}x{image.shape[0]}, not 112x112; align "
                    "and crop it, or add --resize"
                )
            image = cv2.resize(image, IMAGE_SIZE[::-1], interpolation=cv2.INTER_AREA)
        elif stored.startswith(JPEG_START):
            return stored
        return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()

    return encode


def write_records(args: argparse.Namespace, encode: Callable[[str], bytes]) -> tuple[int, int, int]:
    """Write the four files to a temporary neighbour of ``args.output``, check them, move them in.

    Returns (images, identities, files left out).
    """
    groups, left_out = list_identities(args.images), 0
    if args.skip_bad:
        groups, left_out = without_bad(groups, encode)
    if len(groups) < 2:
        raise InputError(
            f"{os.path.abspath(args.images)} has images of one identity only: training needs two "
            "or more, a sub-folder for each"
        )
    output = os.path.abspath(args.output)
    if os.path.exists(output) and not os.path.isdir(output):
        raise InputError(f"--output {output} is a file; name the folder to write train.rec into")
    os.makedirs(os.path.dirname(output), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".make_rec-", dir=os.path.dirname(output)) as temporary:
        if args.layout == "insightface":
            entries, checksums = write_grouped(temporary, groups, encode)
        else:
            seed = None if args.shuffle is False else args.seed
            entries, checksums = write_plain(temporary, groups, encode, seed)
        write_property(temporary, len(groups), IMAGE_SIZE)
        with replacing(os.path.join(temporary, "train.lst")) as file:
            # a file's name as its bytes, whatever its encoding, so that the list finds the file
            lines = (f"{entry.key}\t{entry.label}\t{entry.path}\n" for entry in entries)
            file.writelines(map(os.fsencode, lines))
        check_records(temporary, entries, checksums)
        install(temporary, output)
    return len(entries), len(groups), left_out


def without_bad(
    groups: list[list[str]], encode: Callable[[str], bytes]
) -> tuple[list[list[str]], int]:
    """(the readable images of the identities that have any, number of files left out).

    Lists on stderr what is left out. Raises InputError if nothing is left.
    """
    kept, left_out = [], 0
    with progress("looking", sum(map(len, groups))) as bar:
        for group in groups:
            readable = []
            for path in group:
                try:
                    encode(path)
                    readable.append(path)
                except BadImage as error:
                    bar.write(f"left out: {error}", file=sys.stderr)
                bar.update()
            left_out += len(group) - len(readable)
            if readable:
                kept.append(readable)
            else:
                name = os.path.dirname(group[0])
                bar.write(f"left out: identity {name}, all images of it", file=sys.stderr)
    if not kept:
        raise InputError("--skip-bad: not one image can be read")
    return kept, left_out


def write_grouped(
    folder: str, groups: list[list[str]], encode: Callable[[str], bytes]
) -> tuple[list[Entry], list[int]]:
    """InsightFace's layout, keys 1 ...; returns the entries and the CRC-32 of each stored image."""
    entries = [Entry(key, *image) for key, image in enumerate(labelled(groups), start=1)]
    checksums = []
    with progress("writing", len(entries)) as bar:

        def images(group: list[str]) -> Iterator[bytes]:
            for path in group:
                yield stored_image(path, encode, checksums)
                bar.update()

        write_insightface(folder, map(images, groups), IMAGE_SIZE)
    return entries, checksums


def write_plain(
    folder: str, groups: list[list[str]], encode: Callable[[str], bytes], seed: int | None
) -> tuple[list[Entry], list[int]]:
    """im2rec's layout, keys 0 ... in file order, shuffled by ``seed`` unless that is None; returns
    as ``write_grouped``.
    """
    images = labelled(groups)
    order = range(len(images))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(images))
    entries = [Entry(key, *images[at]) for key, at in enumerate(order)]
    checksums = []
    with open_records(folder, "w") as writer:
        for entry in progress("writing", len(entries), entries):
            image = stored_image(entry.path, encode, checksums)
            writer.write_idx(entry.key, pack(IRHeader(0, float(entry.label), entry.key, 0), image))
    return entries, checksums


def open_records(folder: str, flag: str) -> IndexedRecordIO:
    idx, rec = os.path.join(folder, "train.idx"), os.path.join(folder, "train.rec")
    return IndexedRecordIO(idx, rec, flag)


def labelled(groups: list[list[str]]) -> list[tuple[int, str]]:
    """(label, path) of every image, identity by identity."""
    return [(label, path) for label, group in enumerate(groups) for path in group]


def stored_image(path: str, encode: Callable[[str], bytes], checksums: list[int]) -> bytes:
    """The encoded image of ``path``; its CRC-32 is appended to ``checksums``."""
    try:
        image = encode(path)
    except BadImage as error:
        raise InputError(f"{error}; --skip-bad leaves such files out") from None
    checksums.append(zlib.crc32(image))
    return image


def check_records(folder: str, entries: list[Entry], checksums: list[int]) -> None:
    """Read every image record back; InputError if the count, a label or the bytes of an image
    differ from what was written.
    """
    with open_records(folder, "r") as reader:
        images = sum(1 for key in reader.keys if reader.glance(int(key)).has_image)
        if images != len(entries):
            raise InputError(
                f"{reader.rec_path} holds {images} images, {len(entries)} were "
                "written; check the disk"
            )
        pairs = zip(entries, checksums, strict=True)
        for entry, checksum in progress("checking", len(entries), pairs):
            header, image = unpack(reader.read_idx(entry.key))
            if first_label(header) != entry.label or zlib.crc32(image) != checksum:
                raise InputError(
                    f"{reader.rec_path}: record {entry.key} ({entry.path}) differs "
                    "from what was written; check the disk"
                )


def install(temporary: str, output: str) -> None:
    """Move the checked files into ``output``; the record file last, so that it never meets another
    set's index.
    """
    os.makedirs(output, exist_ok=True)
    if os.path.exists(os.path.join(output, "train.rec")):
        os.unlink(os.path.join(output, "train.rec"))
    for name in ("property", "train.lst", "train.idx", "train.rec"):
        shutil.move(os.path.join(temporary, name), os.path.join(output, name))


def write_pairs(pairs_path: str, root: str, encode: Callable[[str], bytes], output: str) -> int:
    """Write a pair set: pickle (protocol 4) of ([2N encoded images], [N booleans]); returns N.

    The pairs keep the order of the list, which the ten contiguous folds of the protocol rely on.
    """
    pairs = read_pairs(pairs_path, root)
    # an image of many pairs is read, and pickled, once
    load = lru_cache(maxsize=None)(encode)
    images = [load(path) for pair in progress("reading", len(pairs), pairs) for path in pair[:2]]
    same = [pair.same for pair in pairs]
    if os.path.isdir(output):
        raise InputError(f"--output {output} is a folder; name the .bin file to write")
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    content = pickle.dumps((images, same), protocol=4)
    with replacing(output, "w+b") as file:
        file.write(content)
        file.seek(0)
        if file.read() != content:
            raise InputError(f"{output} differs from what was written; check the disk")
    return len(pairs)


def progress(what: str, total: int, items: Iterable | None = None) -> tqdm:
    """A progress bar, shown where a terminal watches."""
    unit = "pair" if what == "reading" else "img"
    return tqdm(items, desc=what, total=total, unit=unit, disable=None)


if __name__ == "__main__":
    run(main)
