"""Pack images into the files that training and verification read.

    python data/make_rec.py --images DIR --output OUT    # train.rec, .idx, .lst, property
    python data/make_rec.py --webdataset 'ms1mv3-{0000..0099}.tar' --output OUT
    python data/make_rec.py --arrow DIR --output OUT
    python data/make_rec.py --pairs pairs.txt --images DIR --output lfw.bin

Images are aligned 112x112 crops; JPEG files of that size are copied byte for byte, all else is
encoded as JPEG. What was written is read back and compared before it gets its name. Files that
cannot be read, JPEGs that end early (whose rest decoders fill with grey) and samples without a
label are refused; ``--skip-bad`` leaves them out of the records and lists them.

``--images`` alone: DIR has one sub-folder per identity; sorted, they become the labels 0, 1, ...
``--layout plain`` (the default) is im2rec's: every record an image, shuffled by ``--seed`` unless
``--no-shuffle``. ``--layout insightface`` keeps an identity's images together, as its index records
require, in sorted order. The training scripts shuffle either layout every epoch.

``--webdataset``: tar archives (also .tar.gz), folders of them, brace patterns. A sample has an
image (jpg, jpeg, png, webp) and a label (cls, json with "label", txt). ``--arrow``: a folder saved
by ``datasets`` with the columns image and label; of several splits the one called train. Both are
read once, in their order; the layout is plain. Labels that are not 0 ... C - 1 become so in their
order, and label_map.csv says how. Killed, the same command goes on where it was.

``--pairs``: lists with lines ``path1 path2 0|1`` (1: same person), paths below DIR, tab-separated
if they contain spaces; or LFW's and XQLFW's (``pairs.txt``, ``pairsDevTrain.txt``, ...) and RFW's
(``African_pairs.txt``, ..., all four become one set), whose ``Name 1`` is
``DIR/Name/Name_0001.jpg`` or ``.png``, RFW's below the folder of its group. Pairs of one kind only
are refused. Beside ``lfw.bin`` lie the images' names, ``lfw.names.csv``, and where there are groups
the people's, ``rfw.groups.csv``.
"""

import argparse
import os
import pickle
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np
from tqdm import tqdm

from data.arrow_rows import ArrowRows
from data.packing import (
    LABEL_MAP,
    BadImage,
    check_output,
    image_encoder,
    install,
    place_for_work,
    write_table,
)
from data.pair_list import read_pairs
from data.record_stream import Written, write_stream
from data.tar_shards import TarShards
from utils.command_line import command_parser
from utils.dataset.base import first_label
from utils.dataset.folder import list_identities
from utils.errors import InputError, run
from utils.files import replacing
from utils.recordio.files import IMAGE_SIZE
from utils.recordio.format import IRHeader, pack, unpack
from utils.recordio.indexed import IndexedRecordIO
from utils.recordio.writer import write_insightface, write_property


class Entry(NamedTuple):
    """One image record: its key, label and path below the image folder."""

    key: int
    label: int
    path: str


def main() -> None:
    args = parse_arguments()
    encode = image_encoder(args.quality, args.resize)
    if args.pairs:
        count = write_pairs(args.pairs, args.images, file_encoder(args.images, encode), args.output)
        print(f"{args.output}: {count} pairs, read back and equal")
        return
    if args.images:
        written = write_records(args, file_encoder(args.images, encode))
    else:
        source = TarShards(args.webdataset) if args.webdataset else ArrowRows(Path(args.arrow))
        options = dict(quality=args.quality, resize=args.resize)
        written = write_stream(source, Path(args.output), encode, options, args.skip_bad)
    done = f"{written.images} images of {written.classes} identities, read back and equal"
    skipped = f"; {written.left_out} bad files left out" if written.left_out else ""
    mapped = f"; labels: see {LABEL_MAP}" if written.is_mapped else ""
    print(f"{args.output}: {done}{skipped}{mapped}")


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__, allow_abbrev=True)
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument(
        "--images", help="folder of identities, or the folder the pair list refers to"
    )
    sources.add_argument(
        "--webdataset",
        nargs="+",
        metavar="SHARDS",
        help="tar archives, folders of them, or brace patterns such as 'set-{000..127}.tar'",
    )
    sources.add_argument(
        "--arrow", metavar="DIR", help="folder that datasets' save_to_disk wrote: image, label"
    )
    parser.add_argument("--output", required=True, help="folder for the records, or the .bin file")
    parser.add_argument(
        "--pairs",
        nargs="+",
        metavar="LIST",
        help="pair lists, our own, LFW's, XQLFW's or RFW's; writes a .bin instead of records",
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
        help="leave out images that cannot be read, end early or have no label, and list them",
    )
    args = parser.parse_args()
    check_arguments(args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raises InputError for options that contradict each other."""
    if not 1 <= args.quality <= 100:
        raise InputError(f"--quality is 1 ... 100, got {args.quality}")
    if args.pairs and not args.images:
        raise InputError("--pairs needs --images, the folder that the list refers to")
    if args.skip_bad and args.pairs:
        raise InputError("--skip-bad is for records: a pair cannot do without one of its images")
    if not args.images and (args.shuffle or args.layout == "insightface"):
        raise InputError(
            "--webdataset and --arrow are read once and keep their order: leave out --shuffle and "
            "--layout insightface (training shuffles in every epoch)"
        )
    if args.shuffle and args.layout == "insightface" and not args.pairs:
        raise InputError(
            "--shuffle would tear the identities of the insightface layout apart; add "
            "--layout plain"
        )


def file_encoder(root: str, encode: Callable[[bytes, str], bytes]) -> Callable[[str], bytes]:
    """A function from a path below ``root`` to the JPEG bytes to store.

    It raises BadImage naming an image that cannot be read, InputError for one of another size.
    """

    def encode_file(path: str) -> bytes:
        full = os.path.join(root, path)
        try:
            with open(full, "rb") as file:
                content = file.read()
        except OSError as error:
            raise BadImage(f"cannot read the image {full}: {error.strerror}") from None
        return encode(content, full)

    return encode_file


def write_records(args: argparse.Namespace, encode: Callable[[str], bytes]) -> Written:
    """Write the files to a temporary neighbour of ``args.output``, check them, move them in."""
    groups, left_out = list_identities(args.images), 0
    if args.skip_bad:
        groups, left_out = without_bad(groups, encode)
    if len(groups) < 2:
        raise InputError(
            f"{os.path.abspath(args.images)} has images of one identity only: training needs two "
            "or more, a sub-folder for each"
        )
    # where a link leads
    output = os.path.realpath(args.output)
    check_output(output)
    place = place_for_work(output)
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".make_rec-", dir=place) as temporary:
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
    return Written(len(entries), len(groups), left_out, is_mapped=False)


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


def write_pairs(
    pairs_paths: list[str], root: str, encode: Callable[[str], bytes], output: str
) -> int:
    """Write a pair set: pickle (protocol 4) of ([2N encoded images], [N booleans]); returns N.

    The pairs keep the order of the list, which the ten contiguous folds of the protocol rely on.
    Beside it the names of the images, and the groups of the people if the lists have any.
    """
    pairs = read_pairs(pairs_paths, root)
    # an image of many pairs is read, and pickled, once
    load = lru_cache(maxsize=None)(encode)
    images = [load(path) for pair in progress("reading", len(pairs), pairs) for path in pair[:2]]
    same = [pair.same for pair in pairs]
    if os.path.isdir(output):
        raise InputError(f"--output {output} is a folder; name the .bin file to write")
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    content = pickle.dumps((images, same), protocol=4)
    stem = output.removesuffix(".bin")
    # those of another set with this name
    for path in (f"{stem}.names.csv", f"{stem}.groups.csv"):
        Path(path).unlink(missing_ok=True)
    with replacing(output, "w+b") as file:
        file.write(content)
        file.seek(0)
        if file.read() != content:
            raise InputError(f"{output} differs from what was written; check the disk")
    write_table(f"{stem}.names.csv", ("first", "second"), [pair[:2] for pair in pairs])
    groups = {os.path.dirname(path): pair.group for pair in pairs for path in pair[:2]}
    if any(groups.values()):
        write_table(f"{stem}.groups.csv", ("name", "group"), sorted(groups.items()))
    return len(pairs)


def progress(what: str, total: int, items: Iterable | None = None) -> tqdm:
    """A progress bar, shown where a terminal watches."""
    unit = "pair" if what == "reading" else "img"
    return tqdm(items, desc=what, total=total, unit=unit, disable=None)


if __name__ == "__main__":
    run(main)
