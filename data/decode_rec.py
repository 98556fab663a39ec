"""Copy a RecordIO set with its images already decoded: seven times the disk for a data path three
times as fast.

    python data/decode_rec.py data/faces_emore --output /local/faces_emore
    ./run_AdaDistill.sh rec=/local/faces_emore

Decoding a JPEG takes more time than all else between the file and the network, anew in every epoch.
The copy holds the pixels: each image as a PPM file (15 bytes that tell its size, then RGB), 37.7 kB
where the JPEG had 5 to 7. That is 38 MB to read for 1,000 images, so it pays where the copy fits
into memory or lies on a fast local disk. Keys, labels, layout, shards and the order in the files
are those of the set, and training gives the same weights bit for bit. Cached teacher features know
the files they were made from: make them from the copy. OpenCV and Pillow open such images, the
OpenCV inside MXNet does not (with rec_backend=mxnet MXNet reads only the records, which works).

What was written is read back and compared before the copy gets its name. A set with damaged images
is refused, for training replaces these: data/check_rec.py names them.
"""

import argparse
import logging
import math
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import closing
from glob import escape
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm

from utils.command_line import command_parser
from utils.dataset.base import PIXELS
from utils.dataset.classes import check_classes
from utils.dataset.loader import open_loader
from utils.dataset.records import MXFaceDataset
from utils.dataset.workers import cores, end_workers, next_batch
from utils.errors import InputError, run
from utils.files import take_lock, temporary_folder
from utils.jpeg import ends_early
from utils.recordio.files import IMAGE_SIZE, find_folders, has_records, stem
from utils.recordio.format import unpack
from utils.recordio.idx_file import read_index
from utils.recordio.indexed import IndexedRecordIO
from utils.recordio.reader import RecordFile

log = logging.getLogger(__name__)

BATCH = 64
# bytes of a decoded one, at most: frame, header, a few labels and its line in the index
RECORD = len(PIXELS) + 3 * IMAGE_SIZE[0] * IMAGE_SIZE[1] + 64


def main() -> None:
    args = parse_arguments()
    source, dataset = open_set(args.set)
    check_classes(dataset)
    output = args.output.absolute()
    if output.exists():
        raise InputError(f"--output {output} is there already: name a new folder, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output.name}.decode_rec-"
    remove_leftovers(output.parent, prefix)
    needed, free = len(dataset) * RECORD, shutil.disk_usage(output.parent).free
    if needed > free:
        raise InputError(
            f"--output {output}: {len(dataset)} decoded images take "
            f"{needed / 1e9:,.1f} GB, the disk has {free / 1e9:,.1f} GB left"
        )
    with temporary_folder(prefix, output.parent) as folder, take_lock(folder / "lock"):
        copy = folder / "copy"
        copy.mkdir()
        try:
            ended_early = write_copy(dataset, source, copy, args.workers)
            os.rename(copy, output)
        except OSError as error:
            raise InputError(
                f"--output {output}: {error.filename or 'a file of the copy'}: "
                f"{error.strerror}; nothing is kept: make room, or name another folder"
            ) from error
    if ended_early:
        log.warning(
            "%d images are JPEGs that end early, and their rest is grey, in the copy as in %s; "
            "data/check_rec.py lists them",
            ended_early,
            source,
        )
    print(
        f"{output}: {len(dataset)} decoded images of {dataset.num_classes} identities, read back "
        "and equal"
    )


def open_set(name: str) -> tuple[Path, MXFaceDataset]:
    """(the folder of the set, the set). Raises InputError if there is none."""
    path = Path(name.removeprefix("rec="))
    if path.suffix != ".rec" and not (path.is_dir() and has_records(path)):
        raise InputError(
            f"no record set {path.absolute()}: name a folder with train.rec, or with its shards, "
            "or a .rec"
        )
    return Path(find_folders(path)[0].path), MXFaceDataset(str(path))


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("set", help="folder of train.rec or of its shards, or a .rec")
    parser.add_argument("--output", type=Path, required=True, help="folder to be made")
    parser.add_argument(
        "--workers",
        type=int,
        default=cores(),
        help="processes that decode (default: as many as there are cores)",
    )
    args = parser.parse_args()
    if args.workers < 1:
        raise InputError(f"--workers is 1 or more, got {args.workers}")
    return args


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove what killed runs have left; what another one is writing is locked."""
    for folder in parent.glob(f"{escape(prefix)}*"):
        if not (folder / "lock").exists():
            continue
        lock = take_lock(folder / "lock", wait=False)
        if lock:
            with lock:
                shutil.rmtree(folder)


def write_copy(dataset: MXFaceDataset, source: Path, folder: Path, workers: int) -> int:
    """Write all files of the copy to ``folder`` and compare them with what was meant.

    Returns how many images are JPEGs that end early. Raises InputError naming a damaged image, or a
    record that reads back otherwise.
    """
    shards = dataset.record_files()
    images, first = [], 0
    for shard in shards:
        order, is_image = order_in_file(shard)
        images.append(first + order[is_image] - shard.first)
        first += shard.count
    written, ended_early = [], 0
    # closing: also where the error is not one of reading, its workers are ended; they are deaf to
    # signals
    with closing(decoded(dataset, np.concatenate(images), workers)) as pixels:
        for shard in shards:
            rec = folder / Path(shard.path).name
            sums, ended = write_shard(shard, rec, pixels)
            written.append((rec, sums))
            ended_early += ended
    for rec, sums in written:
        compare(rec, sums)
    if (source / "property").is_file():
        shutil.copyfile(source / "property", folder / "property")
    return ended_early


def order_in_file(shard) -> tuple[np.ndarray, np.ndarray]:
    """(positions of all records, as they lie in the file; which of these are images).

    The others are InsightFace's index records.
    """
    order = np.argsort(shard.index.index.offsets, kind="stable")
    return order, (order >= shard.first) & (order < shard.first + shard.count)


def write_shard(shard, rec: Path, pixels: Iterator[bytes]) -> tuple[np.ndarray, int]:
    """Write the records in the order of the file, and its index.

    Returns the CRC-32 of each record, and how many images are JPEGs that end early.
    """
    order, is_image = order_in_file(shard)
    sums, ended_early = np.empty(len(order), np.uint32), 0
    with IndexedRecordIO(str(rec.with_name(f"{stem(rec.name)}.idx")), str(rec), "w") as writer:
        for number, position in enumerate(order):
            record = bytes(shard.index.read_at(position))
            if is_image[number]:
                encoded = unpack(record)[1]
                ended_early += ends_early(encoded)
                header = record[: len(record) - len(encoded)]
                record = header + PIXELS + next(pixels)
            sums[number] = zlib.crc32(record)
            writer.write_idx(int(shard.index.key_array[position]), record)
    return sums, ended_early


def decoded(dataset: MXFaceDataset, images: np.ndarray, workers: int) -> Iterator[bytes]:
    """The pixels of the images, in this order.

    Raises InputError naming the first that is damaged.
    """
    parts = (images[first : first + BATCH].tolist() for first in range(0, len(images), BATCH))
    workers = min(workers, math.ceil(len(images) / BATCH))
    batches = iter(open_loader(dataset, parts, BATCH, workers, torch.device("cpu")))
    try:
        with tqdm(desc="decoding", total=len(images), unit="img", disable=None) as bar:
            while (batch := next_batch(batches)) is not None:
                for name, reason in batch.bad:
                    raise InputError(
                        f"record {name} of {dataset.root_dir} is damaged ({reason}): "
                        "data/check_rec.py lists all such; mend the set, or train from it as it is"
                    )
                bar.update(len(batch.images))
                yield from map(np.ndarray.tobytes, batch.images.numpy())
    finally:
        end_workers(batches)


def compare(rec: Path, sums: np.ndarray) -> None:
    """Raises InputError if a record of the written file, in the order of the file, has another
    CRC-32 than the one that was written.
    """
    keys, offsets = read_index(str(rec.with_suffix(".idx")))
    with open(rec, "rb") as file:
        # so that it is read back from the disk itself
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    records = RecordFile(str(rec))
    order = np.argsort(offsets, kind="stable")
    for number, at in enumerate(tqdm(order, desc="comparing", unit="img", disable=None)):
        if zlib.crc32(records.read(int(offsets[at]), keys[at])) != sums[number]:
            raise InputError(
                f"{rec.name}: record {keys[at]} differs from what was written; check the disk"
            )


if __name__ == "__main__":
    run(main)
