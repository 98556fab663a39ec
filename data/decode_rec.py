"""Copy a RecordIO set with its images already decoded: a disk seven times as large for a data path several times as fast.

    python data/decode_rec.py data/faces_emore --output /local/faces_emore
    ./run_AdaDistill.sh rec=/local/faces_emore

Decoding a JPEG takes more time than all else between the file and the network, anew in every epoch. The copy holds the pixels: each image as a PPM file (15 bytes that
tell its size, then RGB), 37.7 kB where the JPEG had 5 to 7. Keys, labels, layout, shards and the order in the files are those of the set, and training gives the same weights bit for bit.
OpenCV and Pillow open such images, the OpenCV inside MXNet does not (rec_backend=mxnet does: only the records are read by MXNet). Cached teacher features know the files they were made from: make them from the copy.

What was written is read back and compared before the copy gets its name. A set with damaged images is refused, for training replaces these: data/check_rec.py names them.
"""

import argparse
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm

from utils.dataset import IMAGE_SIZE, PIXELS, MXFaceDataset
from utils.errors import InputError, run
from utils.files import take_lock
from utils.loading import cores, end_workers, next_batch
from utils.record_set import Shard, has_records, stem
from utils.recordio import IndexedRecordIO, pack, unpack
from utils.shared_batches import open_loader

BATCH = 256
RECORD = len(PIXELS) + 3 * IMAGE_SIZE[0] * IMAGE_SIZE[1] + 64      # bytes of a decoded one, at most: frame, header, a few labels and its line in the index


def main() -> None:
    args = parse_arguments()
    if not args.set.is_dir() or not has_records(args.set):
        raise InputError(f"no record set {args.set.absolute()}: name a folder with train.rec, or with its shards")
    dataset = MXFaceDataset(str(args.set))
    output = args.output.absolute()
    if output.exists():
        raise InputError(f"--output {output} is there already: name a new folder, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    needed, free = len(dataset) * RECORD, shutil.disk_usage(output.parent).free
    if needed > free:
        raise InputError(f"--output {output}: {len(dataset)} decoded images take {needed / 1e9:,.1f} GB, the disk has {free / 1e9:,.1f} GB left")
    partial = Path(f"{output}.partial")
    partial.mkdir(exist_ok=True)
    lock = take_lock(str(partial / "lock"), wait=False)
    if lock is None:
        raise InputError(f"another process is writing {partial}")
    try:
        empty(partial)          # what a killed one has left
        write_copy(dataset, args.set, partial, args.workers)
        os.unlink(partial / "lock")
        os.rename(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{output}: {len(dataset)} decoded images of {dataset.num_classes} identities, read back and equal")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("set", type=Path, help="folder of train.rec or of its shards")
    parser.add_argument("--output", type=Path, required=True, help="folder to be made")
    parser.add_argument("--workers", type=int, default=cores(), help="processes that decode (default: as many as there are cores)")
    args = parser.parse_args()
    if args.workers < 1:
        raise InputError(f"--workers is 1 or more, got {args.workers}")
    return args


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "lock":
            path.unlink()


def write_copy(dataset: MXFaceDataset, source: Path, folder: Path, workers: int) -> None:
    """Write all files of the copy to ``folder`` and compare them with what was meant. Errors: InputError naming a damaged image, or a record that reads back otherwise."""
    orders = [np.argsort(shard.index.index.offsets, kind="stable") for shard in dataset.shards()]      # of all records, as they lie in the files
    firsts = np.cumsum([0, *(shard.count for shard in dataset.shards())])
    images = np.concatenate([first + order[is_image(shard, order)] - shard.first for shard, order, first in zip(dataset.shards(), orders, firsts)])
    pixels = decoded(dataset, images, workers)
    for shard, order in zip(dataset.shards(), orders):
        idx, rec = folder / f"{stem(Path(shard.path).name)}.idx", folder / Path(shard.path).name
        sums = np.empty(len(order), np.uint32)
        with IndexedRecordIO(str(idx), str(rec), "w") as writer:
            for number, position in enumerate(order):
                record = bytes(shard.index.read_at(position))
                if is_image(shard, position):
                    record = pack(unpack(record)[0], PIXELS + next(pixels))
                sums[number] = zlib.crc32(record)
                writer.write_idx(int(shard.index.key_array[position]), record)
        compare(str(idx), str(rec), shard.index.key_array[order], sums)
    if (source / "property").is_file():
        shutil.copyfile(source / "property", folder / "property")


def is_image(shard: Shard, position):
    """Whether the record at a position, or at each of an array of them, is an image and not one of InsightFace's index records."""
    return (position >= shard.first) & (position < shard.first + shard.count)


def decoded(dataset: MXFaceDataset, images: np.ndarray, workers: int) -> Iterator[bytes]:
    """The pixels of the images, in this order. Errors: InputError naming the first that is damaged."""
    parts = [part.tolist() for part in np.split(images, range(BATCH, len(images), BATCH))]
    batches = iter(open_loader(dataset, parts, BATCH, min(workers, len(parts)), torch.device("cpu")))
    try:
        with tqdm(desc="decoding", total=len(images), unit="img", disable=None) as bar:
            while (batch := next_batch(batches)) is not None:
                for name, reason in batch.bad:
                    raise InputError(f"record {name} of {dataset.root_dir} is damaged ({reason}): data/check_rec.py lists all such; mend the set, or train from it as it is")
                yield from map(np.ndarray.tobytes, batch.images.numpy())
                bar.update(len(batch.images))
    finally:
        end_workers(batches)


def compare(idx: str, rec: str, keys: np.ndarray, sums: np.ndarray) -> None:
    """Errors: InputError if a record of the written file has another CRC-32 than the one that was written."""
    with IndexedRecordIO(idx, rec, "r") as reader:
        for key, checksum in tqdm(zip(keys, sums), desc="comparing", total=len(keys), unit="img", disable=None):
            if zlib.crc32(reader.read_idx(int(key))) != checksum:
                raise InputError(f"{rec}: record {key} differs from what was written; check the disk")


if __name__ == "__main__":
    run(main)
