"""Make a synthetic face set to train and evaluate on: a stand-in that shows the machinery work, and
no measure of real accuracy.

    python data/make_synthetic.py --output data/synthetic --identities 200 --images 20 \\
        --pairs 600 --seed 0

writes train.rec, train.idx and property (InsightFace layout), the pair sets frontal.bin, pose.bin
and lowres.bin of people who are not in the training set (10 folds that share no identity),
contact_sheet.png to look at, and synthetic.json, which says how it was made; of further people, for
the evaluations that take more than pairs,

    ijb/IJBsynth/                             like IJB-B and IJB-C: loose crops with five
                                              points, templates, 1:1 and 1:N lists
    ijb_arrow/IJBsynth_gt_aligned/            the same, aligned, in CVLFace's layout
    tinyface/Testing_Set/                     like TinyFace: probes, their mates in the
                                              gallery, distractors, all of them small
    tinyface_arrow/tinyface_aligned_pad_0.1/  the same in CVLFace's layout

(--ijb-subjects 0 and --tinyface-identities 0 leave them out). With the defaults 839 and 420 images,
5 s on two cores. The same arguments give the same bytes, whatever --workers is. --nuisance scales
everything that changes between two photographs of one person (pose, expression, light, occlusion,
background, quality): 0 makes all photographs of one person equal, 2 is very hard.
"""

import argparse
import os
import pickle
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # instead of this script's folder: siblings must not shadow packages
    sys.path[0] = str(ROOT)

import cv2

from data.contact_sheet import COLUMNS, Row, draw_sheet
from data.synth.benchmarks import (
    IJB_FOLDERS,
    TINYFACE_FOLDERS,
    check_folders,
    sample_rows,
    write_ijb,
    write_tinyface,
)
from data.synth.render_pool import Photograph, open_studio
from utils.errors import InputError, run
from utils.files import replacing, write_json
from utils.recordio.writer import write_insightface

# random stream of the training identities; each pair set has its own, so that nobody is in two sets
TRAIN = 0
# pair set: random stream, kinds of photograph of the left and the right image (names of
# data.synth.faces.VIEWS)
PAIR_SETS = {
    "frontal": (1, "frontal", "frontal"),
    "pose": (2, "frontal", "turned"),
    "lowres": (3, "frontal", "small"),
}
FOLDS = 10


def write_training_set(output: Path, studio, identities: int, images: int) -> int:
    """Write ``train.rec``, ``train.idx`` and ``property``, labels 0 .. identities - 1; returns the
    number of images.
    """
    photographs = [
        Photograph(TRAIN, identity, number)
        for identity in range(identities)
        for number in range(1, images + 1)
    ]
    faces = iter(studio(photographs, "train.rec"))
    return write_insightface(
        output, ([next(faces) for _ in range(images)] for _ in range(identities))
    )


def list_pairs(name: str, pairs: int) -> tuple[list[Photograph], list[bool]]:
    """The 2 * pairs photographs of a pair set (left, right, left, ...) and who is the same; a fold
    is its same half, then its different half.
    """
    split, left, right = PAIR_SETS[name]
    half = pairs // FOLDS // 2
    # of one fold; they are in no other
    people = max(half, 2)
    photographs, issame = [], []
    for first in range(0, FOLDS * people, people):
        for k in range(half):
            photographs += [
                Photograph(split, first + k, 1, left),
                Photograph(split, first + k, 2, right),
            ]
        for k in range(half):
            photographs += [
                Photograph(split, first + k, 3, left),
                Photograph(split, first + (k + 1) % people, 4, right),
            ]
        issame += [True] * half + [False] * half
    return photographs, issame


def write_pair_set(output: Path, studio, name: str, pairs: int) -> int:
    """Write ``<name>.bin``, a pickle of (2 * pairs JPEG bytes, pairs booleans) as lfw.bin is;
    returns the number of images.
    """
    photographs, issame = list_pairs(name, pairs)
    faces = list(studio(photographs, f"{name}.bin"))
    with replacing(output / f"{name}.bin") as file:
        pickle.dump((faces, issame), file, protocol=4)
    return len(faces)


def sheet_rows(args: argparse.Namespace) -> list[Row]:
    """What contact_sheet.png shows: a row per training identity, first without nuisance, then two
    rows of pairs of each set, then the benchmarks.
    """
    rows = []
    with open_studio(1, args.seed, args.nuisance) as studio:
        for identity in range(min(args.identities, 8)):
            numbers = range(1, min(args.images, COLUMNS - 1) + 1)
            photographs = [Photograph(TRAIN, identity, number) for number in numbers]
            plain = photographs[0].take(args.seed, 0.0)
            rows.append(Row([plain, *studio(photographs)], [f"id {identity}, plain"]))
        for name in PAIR_SETS:
            photographs, issame = list_pairs(name, args.pairs)
            for answer, word in ((True, "same"), (False, "different")):
                chosen = [k for k, same in enumerate(issame) if same == answer][: COLUMNS // 2]
                pairs = [photographs[2 * k + side] for k in chosen for side in (0, 1)]
                rows.append(Row(list(studio(pairs)), [f"{name}: {word}", ""] * len(chosen)))
        return rows + sample_rows(studio, args.seed, args.ijb_subjects, args.tinyface_identities)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse numbers that cannot work, and a folder that holds sets of another origin."""
    for name, low, high in (
        ("identities", 2, 10**6),
        ("images", 1, 10**5),
        ("seed", 0, 2**32 - 1),
        ("workers", 1, 1024),
        ("nuisance", 0, 3),
        ("ijb_subjects", 0, 1000),
        ("tinyface_identities", 0, 10**5),
    ):
        value = getattr(args, name)
        if not low <= value <= high:
            raise InputError(f"--{name.replace('_', '-')} must lie in {low} .. {high}, got {value}")
    if args.ijb_subjects == 1:
        raise InputError(
            "--ijb-subjects must be 0 (leave the set out) or at least 2 (one for each "
            "gallery), got 1"
        )
    if args.pairs < 2 * FOLDS or args.pairs % (2 * FOLDS):
        raise InputError(
            f"--pairs must be a positive multiple of {2 * FOLDS} ({FOLDS} folds, half "
            f"same and half different), got {args.pairs}"
        )
    if (args.output / "train.rec").exists() and not (args.output / "synthetic.json").exists():
        raise InputError(
            f"--output {args.output} holds a train.rec that this script did not "
            "write; choose another folder"
        )
    check_folders(
        args.output,
        (IJB_FOLDERS if args.ijb_subjects else ())
        + (TINYFACE_FOLDERS if args.tinyface_identities else ()),
    )


def parse_arguments() -> argparse.Namespace:
    summary, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "data" / "synthetic",
        help="folder to write (%(default)s)",
    )
    parser.add_argument(
        "--identities", type=int, default=200, help="people in the training set (%(default)s)"
    )
    parser.add_argument("--images", type=int, default=20, help="images of each (%(default)s)")
    parser.add_argument(
        "--pairs",
        type=int,
        default=600,
        help="pairs in each pair set, a multiple of 20 (%(default)s)",
    )
    parser.add_argument(
        "--ijb-subjects",
        type=int,
        default=40,
        help="people in the IJB-like set; 0: no such set (%(default)s)",
    )
    parser.add_argument(
        "--tinyface-identities",
        type=int,
        default=60,
        help="people in the TinyFace-like set; 0: no such set (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed, other people (%(default)s)"
    )
    parser.add_argument(
        "--nuisance",
        type=float,
        default=1.0,
        help="how much photographs of one person differ, 0 .. 3 (%(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (%(default)s: all cores)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    check_arguments(args)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--output {args.output} is no folder and cannot become one: {error.strerror}"
        ) from error
    made = {name: value for name, value in vars(args).items() if name not in ("output", "workers")}
    write_json(args.output / "synthetic.json", made)
    # one thread a process: the work is divided by image
    cv2.setNumThreads(0)
    start = time.perf_counter()
    with open_studio(args.workers, args.seed, args.nuisance) as studio:
        count = write_training_set(args.output, studio, args.identities, args.images)
        print(f"{args.output}/train.rec: {args.identities} identities, {count} images")
        for name in PAIR_SETS:
            count += write_pair_set(args.output, studio, name, args.pairs)
            print(f"{args.output}/{name}.bin: {args.pairs} pairs in {FOLDS} folds")
        if args.ijb_subjects:
            count += write_ijb(args.output, studio, args.seed, args.nuisance, args.ijb_subjects)
        if args.tinyface_identities:
            count += write_tinyface(
                args.output, studio, args.seed, args.nuisance, args.tinyface_identities
            )
    seconds = time.perf_counter() - start
    draw_sheet(args.output / "contact_sheet.png", sheet_rows(args))
    print(f"{args.output}/contact_sheet.png: what they look like")
    print(
        f"{count} images in {seconds:.1f} s, {count / seconds:.0f} images/s with {args.workers} "
        "workers"
    )


if __name__ == "__main__":
    run(main)
