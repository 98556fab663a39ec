"""Make a synthetic face set to train and evaluate on: a stand-in that shows the machinery work, and no measure of real accuracy.

    python data/make_synthetic.py --output data/synthetic --identities 200 --images 20 --pairs 600 --seed 0

writes train.rec, train.idx and property (InsightFace layout), the pair sets frontal.bin, pose.bin and lowres.bin of people who are
not in the training set (10 folds that share no identity), contact_sheet.png to look at, and synthetic.json, which says how it was made.
The same arguments give the same bytes, whatever --workers is. --nuisance scales everything that changes between two photographs of
one person (pose, expression, light, occlusion, background, quality): 0 makes all photographs of one person equal, 2 is very hard.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of this script's folder: siblings must not shadow packages

import cv2
import numpy as np
from tqdm import tqdm

from data.synthetic_faces import draw_identity, draw_nuisance, encode, render
from utils.errors import InputError, run
from utils.recordio import replacing, write_insightface

TRAIN = 0  # random stream of the training identities; each pair set has its own, so that nobody is in two sets
# pair set: random stream, kinds of photograph of the left and the right image (names of synthetic_faces.VIEWS)
PAIR_SETS = {"frontal": (1, "frontal", "frontal"), "pose": (2, "frontal", "turned"), "lowres": (3, "frontal", "small")}
FOLDS = 10
CHUNK = 16  # images a worker takes at once: enough to hide the cost of passing them on


class Photograph(NamedTuple):
    """Names one image of one person; with the seed and the nuisance scale this decides every byte of it."""

    split: int
    identity: int
    number: int  # 1 ...; the person is drawn with number 0
    view: str = "any"


def take(photograph: Photograph, seed: int, nuisance: float) -> bytes:
    """Draw one photograph and return it as JPEG bytes."""
    split, identity, number, view = photograph
    who = draw_identity(np.random.default_rng([seed, split, identity, 0]))
    look = draw_nuisance(np.random.default_rng([seed, split, identity, number]), nuisance, view)
    return encode(render(who, look), look.quality)


@contextmanager
def open_studio(workers: int, seed: int, nuisance: float):
    """Yield a function that maps an iterable of Photographs to an iterator of JPEG bytes, in order, using ``workers`` processes."""
    shoot = partial(take, seed=seed, nuisance=nuisance)
    if workers == 1:
        yield partial(map, shoot)
        return
    # spawn: a fork would copy the locks of whatever threads the caller runs
    with multiprocessing.get_context("spawn").Pool(workers, cv2.setNumThreads, (0,)) as pool:
        yield partial(pool.imap, shoot, chunksize=CHUNK)


def write_training_set(output: Path, studio, identities: int, images: int) -> int:
    """Write ``train.rec``, ``train.idx`` and ``property``, labels 0 .. identities - 1; returns the number of images."""
    photographs = [Photograph(TRAIN, identity, number) for identity in range(identities) for number in range(1, images + 1)]
    faces = iter(show_progress(studio(photographs), len(photographs), "train.rec"))
    return write_insightface(output, ([next(faces) for _ in range(images)] for _ in range(identities)))


def list_pairs(name: str, pairs: int) -> tuple[list[Photograph], list[bool]]:
    """The 2 * pairs photographs of a pair set (left, right, left, ...) and who is the same; a fold is its same half, then its different half."""
    split, left, right = PAIR_SETS[name]
    half = pairs // FOLDS // 2
    people = max(half, 2)  # of one fold; they are in no other
    photographs, issame = [], []
    for first in range(0, FOLDS * people, people):
        for k in range(half):
            photographs += [Photograph(split, first + k, 1, left), Photograph(split, first + k, 2, right)]
        for k in range(half):
            photographs += [Photograph(split, first + k, 3, left), Photograph(split, first + (k + 1) % people, 4, right)]
        issame += [True] * half + [False] * half
    return photographs, issame


def write_pair_set(output: Path, studio, name: str, pairs: int) -> int:
    """Write ``<name>.bin``, a pickle of (2 * pairs JPEG bytes, pairs booleans) as lfw.bin is; returns the number of images."""
    photographs, issame = list_pairs(name, pairs)
    faces = list(show_progress(studio(photographs), len(photographs), f"{name}.bin"))
    with replacing(output / f"{name}.bin") as file:
        pickle.dump((faces, issame), file, protocol=4)
    return len(faces)


def write_contact_sheet(output: Path, seed: int, nuisance: float, identities: int, images: int, pairs: int) -> None:
    """Write ``contact_sheet.png``: a row per training identity, first without nuisance, then two rows of pairs of each set."""
    columns = 10
    rows, titles = [], []
    for identity in range(min(identities, 8)):
        photographs = [Photograph(TRAIN, identity, number) for number in range(1, min(images, columns - 1) + 1)]
        rows.append([take(photographs[0], seed, 0.0)] + [take(photograph, seed, nuisance) for photograph in photographs])
        titles.append([f"id {identity}, plain"])
    for name in PAIR_SETS:
        photographs, issame = list_pairs(name, pairs)
        for answer in (True, False):
            chosen = [k for k, same in enumerate(issame) if same == answer][:columns // 2]
            rows.append([take(photographs[2 * k + side], seed, nuisance) for k in chosen for side in (0, 1)])
            titles.append([f"{name}: {'same' if answer else 'different'}", ""] * len(chosen))
    sheet = np.vstack([paste_row(faces, names, columns) for faces, names in zip(rows, titles)])
    with replacing(output / "contact_sheet.png") as file:
        file.write(cv2.imencode(".png", sheet)[1].tobytes())


def paste_row(faces: list[bytes], titles: list[str], columns: int) -> np.ndarray:
    """Lay JPEGs side by side (BGR) under a strip with their titles, padded with white to ``columns``."""
    tiles = [cv2.imdecode(np.frombuffer(face, np.uint8), cv2.IMREAD_COLOR) for face in faces]
    height, width = tiles[0].shape[:2]
    row = np.full((height + 14, columns * width, 3), 255, np.uint8)
    row[14:, :len(tiles) * width] = np.hstack(tiles)
    for k, title in enumerate(titles):
        cv2.putText(row, title, (k * width + 3, 11), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (0, 0, 0), 1, cv2.LINE_AA)
    return row


def show_progress(faces, total: int, name: str):
    """Wrap an iterator in a progress bar where a terminal watches."""
    return tqdm(faces, total=total, desc=name, unit="img", disable=None, leave=False)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse numbers that cannot work, and a folder that holds a training set of another origin."""
    for name, low, high in (("identities", 2, 10**6), ("images", 1, 10**5), ("seed", 0, 2**32 - 1), ("workers", 1, 1024), ("nuisance", 0, 3)):
        value = getattr(args, name)
        if not low <= value <= high:
            raise InputError(f"--{name} must lie in {low} .. {high}, got {value}")
    if args.pairs < 2 * FOLDS or args.pairs % (2 * FOLDS):
        raise InputError(f"--pairs must be a positive multiple of {2 * FOLDS} ({FOLDS} folds, half same and half different), got {args.pairs}")
    if (args.output / "train.rec").exists() and not (args.output / "synthetic.json").exists():
        raise InputError(f"--output {args.output} holds a train.rec that this script did not write; choose another folder")


def parse_arguments() -> argparse.Namespace:
    summary, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "data" / "synthetic", help="folder to write (%(default)s)")
    parser.add_argument("--identities", type=int, default=200, help="people in the training set (%(default)s)")
    parser.add_argument("--images", type=int, default=20, help="images of each (%(default)s)")
    parser.add_argument("--pairs", type=int, default=600, help="pairs in each pair set, a multiple of 20 (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other people (%(default)s)")
    parser.add_argument("--nuisance", type=float, default=1.0, help="how much photographs of one person differ, 0 .. 3 (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s: all cores)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    check_arguments(args)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {args.output} is no folder and cannot become one: {error.strerror}") from error
    made = {name: value for name, value in vars(args).items() if name not in ("output", "workers")}
    with replacing(args.output / "synthetic.json", "w") as file:
        json.dump(made, file, indent=2)
    cv2.setNumThreads(0)  # one thread a process: the work is divided by image
    start = time.perf_counter()
    with open_studio(args.workers, args.seed, args.nuisance) as studio:
        count = write_training_set(args.output, studio, args.identities, args.images)
        print(f"{args.output}/train.rec: {args.identities} identities, {count} images")
        for name in PAIR_SETS:
            count += write_pair_set(args.output, studio, name, args.pairs)
            print(f"{args.output}/{name}.bin: {args.pairs} pairs in {FOLDS} folds")
    seconds = time.perf_counter() - start
    write_contact_sheet(args.output, args.seed, args.nuisance, args.identities, args.images, args.pairs)
    print(f"{args.output}/contact_sheet.png: what they look like")
    print(f"{count} images in {seconds:.1f} s, {count / seconds:.0f} images/s with {args.workers} workers")


if __name__ == "__main__":
    run(main)
