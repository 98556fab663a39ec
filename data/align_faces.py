"""Photographs to aligned faces: a folder of photographs per person becomes a folder of 112x112
crops per person, and a list of what was dropped and why.

    python data/align_faces.py --photos photographs --output faces
    python data/align_faces.py --photos photographs --output faces --points points.csv

finds the face in ``photographs/<person>/<photo>`` with OpenCV's YuNet (its file,
face_detection_yunet_2026may.onnx or, for OpenCV 4, face_detection_yunet_2023mar.onnx of the OpenCV
Zoo, goes into deploy/, or is named with --detector), warps its five points onto those that face
networks are trained on and writes ``faces/<person>/<photo>.jpg``. --points takes the points from
elsewhere: a CSV file with the header photo,x1,y1,...,x5,y5 (and score, if known), a line a face:
path below --photos; eyes, tip of the nose, corners of the mouth, left to right as seen, in pixels.

Dropped is a photograph that lies in no sub-folder, is unreadable, has no face, no face with a score
of --min-score, none of --min-size pixels, or several that are (--several largest takes the largest
instead). ``faces/report.csv`` says of every file what became of it: photo,crop,reason,detail. Then
pack them with data/make_rec.py --images faces.
"""

import argparse
import csv
import io
import os
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import cv2
import numpy as np
from tqdm import tqdm

from data.packing import write_table
from utils.align import align
from utils.command_line import command_parser
from utils.dataset.folder import IMAGE_SUFFIXES
from utils.dataset.workers import cores
from utils.detect import (
    DETECTOR_HELP,
    LONGEST,
    MIN_SCORE,
    REASONS,
    Detector,
    Face,
    choose,
    from_left,
)
from utils.errors import InputError, run
from utils.files import read_text, temporary_folder
from utils.images import decode_bgr
from utils.process_pool import in_parallel

COLUMNS = ["photo", *(f"{axis}{number}" for number in range(1, 6) for axis in "xy")]
REPORT = "report.csv"
# pixels: a smaller face would be enlarged to the crop almost threefold
MIN_SIZE = 40


class Task(NamedTuple):
    """A file's path, that of its crop, and its faces if they are known (None: to be detected)."""

    photo: str
    crop: str
    faces: list[Face] | None


class Result(NamedTuple):
    """What became of a file. crop: "" if it was dropped, and then reason and detail say why."""

    photo: str
    crop: str
    reason: str
    detail: str


def main() -> None:
    args = parse_arguments()
    if not args.points:
        # its errors are better told now
        Detector(args.detector, args.detector_size)
    points = read_points(args.points) if args.points else None
    tasks = list_tasks(args.photos, args.png, points)
    output = args.output.absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output: {output} is there and not an empty folder; name a new one")
    output.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(".align_faces-", output.parent) as temporary:
        folder = temporary / "faces"
        folder.mkdir()
        aligned = in_parallel(Aligner(args, folder), tasks, min(args.workers, len(tasks)), chunk=16)
        results = list(tqdm(aligned, "aligning", len(tasks), unit="img", disable=None))
        counts = Counter(result.reason for result in results)
        if not counts[""]:
            raise InputError(
                f"--photos: none of {len(results)} files in {args.photos} could be "
                f"used ({describe(counts)}); the first: {results[0].photo}: {results[0].detail}"
            )
        write_table(folder / REPORT, Result._fields, results)
        os.replace(folder, output)
    unknown = sorted(set(points or ()) - {task.photo for task in tasks})
    print("\n".join(summary(args.output, results, counts, unknown)))


def summary(output: Path, results: list[Result], counts: Counter, unknown: list[str]) -> list[str]:
    """Lines that say what became of all files. unknown: photographs that only --points knows."""
    people = {os.path.dirname(result.photo) for result in results} - {""}
    kept = {os.path.dirname(result.crop) for result in results if result.crop}
    lines = [
        f"{output}: {counts['']} crops of {len(kept)} people from {len(results)} files of "
        f"{len(people)}",
        f"dropped: {describe(counts) or 'none'}",
    ]
    lines += [f"nothing left of {person}" for person in sorted(people - kept)]
    if unknown:
        lines.append(f"points of {len(unknown)} files that are not there, the first: {unknown[0]}")
    return [*lines, f"what became of each: {output / REPORT}"]


def describe(counts: Counter) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common() if reason)


def list_tasks(root: Path, png: bool, points: dict[str, list[Face]] | None) -> list[Task]:
    """Every file of every person, hidden ones apart.

    Raises InputError if there is no folder of people, no file, or the points are of other
    photographs.
    """
    if not root.is_dir():
        raise InputError(
            f"--photos: no folder {root.absolute()}; it should hold one sub-folder of "
            "photographs per person"
        )
    tasks = []
    suffix = ".png" if png else ".jpg"
    for person in visible(root):
        if not person.is_dir():
            continue
        taken = set()
        for path in visible(person):
            # a.jpg and a.png of one person
            stem = path.name if path.stem in taken else path.stem
            taken.add(stem)
            photo, crop = f"{person.name}/{path.name}", f"{person.name}/{stem}{suffix}"
            faces = None if points is None else points.get(photo, [])
            tasks.append(Task(photo, crop, faces))
    if not tasks:
        raise InputError(
            f"--photos: no photographs in the sub-folders of {root.absolute()}; it "
            "should hold one sub-folder per person"
        )
    tasks += [
        Task(path.name, "", [])
        for path in visible(root)
        if path.is_file() and path.name.lower().endswith(IMAGE_SUFFIXES)
    ]
    if points is not None and not any(task.faces for task in tasks):
        raise InputError(
            f"--points: none of its photographs ({next(iter(points))}, ...) is in "
            f"{root.absolute()} ({tasks[0].photo}, ...)"
        )
    return tasks


def visible(folder: Path) -> list[Path]:
    """What lies in the folder, hidden files apart, by name."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def read_points(path: Path) -> dict[str, list[Face]]:
    """{photo: its faces, from left to right}.

    Raises InputError naming the file, and the line that is wrong.
    """
    if not path.is_file():
        raise InputError(f"--points: no file {path.absolute()}")
    faces = {}
    with io.StringIO(read_text(path), newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise InputError(
                f"--points: {path} has no column {', '.join(missing)}: its first line "
                f"must be {','.join(COLUMNS)} (and score, if known)"
            )
        for row in reader:
            try:
                numbers = np.array([float(row[column]) for column in COLUMNS[1:]]).reshape(5, 2)
                score = float(row.get("score") or 1)
            # TypeError: fewer fields
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"--points: {path}, line {reader.line_num}: ten numbers are "
                    f"needed for {row['photo']!r}, and a score that is a number or empty"
                ) from error
            corner = numbers.min(axis=0)
            box = (*corner, *(numbers.max(axis=0) - corner))
            photo = os.path.normpath(row["photo"])
            faces.setdefault(photo, []).append(Face(box, numbers, score))
    if not faces:
        raise InputError(f"--points: {path} lists no photograph")
    return {photo: from_left(several) for photo, several in faces.items()}


class Aligner:
    """Task -> Result; the crop is written.

    It travels to worker processes, each of which loads the detector when it first needs it.
    """

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.root = args.photos
        self.folder = folder
        self.quality = args.quality
        self.detector_path = args.detector
        self.detector_size = args.detector_size
        self.detector = None
        self.which = "largest" if args.several == "largest" else "only"
        self.limits = (args.min_score, args.min_size)

    def __call__(self, task: Task) -> Result:
        if not task.crop:
            return Result(task.photo, "", "no person", "it lies in no person's sub-folder")
        if not task.photo.lower().endswith(IMAGE_SUFFIXES):
            detail = f"files are taken that end in {' '.join(IMAGE_SUFFIXES)}"
            return Result(task.photo, "", "not an image", detail)
        try:
            # BGR, turned as the camera says
            image = decode_bgr((self.root / task.photo).read_bytes())
        except OSError as error:
            return Result(task.photo, "", "unreadable", str(error.strerror))
        except InputError as error:
            return Result(task.photo, "", "unreadable", str(error))
        try:
            faces = self.detect(image) if task.faces is None else task.faces
            face = choose(faces, self.which, *self.limits)
            check_place(face, image)
            crop = align(image, face.points)
        except InputError as error:
            detail = str(error)
            reasons = (reason for reason in REASONS if detail.startswith(reason))
            return Result(task.photo, "", next(reasons, "unusable points"), detail)
        self.write(self.folder / task.crop, crop)
        return Result(task.photo, task.crop, "", f"{face.size:.0f} pixels, score {face.score:.2f}")

    def detect(self, image: np.ndarray) -> list[Face]:
        self.detector = self.detector or Detector(self.detector_path, self.detector_size)
        return self.detector(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))

    def write(self, path: Path, crop: np.ndarray) -> None:
        path.parent.mkdir(exist_ok=True)
        options = [cv2.IMWRITE_JPEG_QUALITY, self.quality] if path.suffix == ".jpg" else []
        path.write_bytes(cv2.imencode(path.suffix, crop, options)[1].tobytes())


def check_place(face: Face, image: np.ndarray) -> None:
    """Raises InputError if the face lies outside the photograph, as points do that were found in a
    larger copy of it: the crop would be black.
    """
    x, y = face.points.mean(axis=0)
    height, width = image.shape[:2]
    if not (0 <= x < width and 0 <= y < height):
        raise InputError(
            f"points around ({x:.0f}, {y:.0f}), outside the photograph of {width}x{height}"
        )


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    folder = dict(type=Path, required=True, metavar="DIR")
    number = dict(type=int, metavar="N")
    add("--photos", **folder, help="one sub-folder of photographs per person")
    add("--output", **folder, help="new folder for the crops and report.csv")
    add("--detector", type=Path, metavar="FILE", help=DETECTOR_HELP)
    add(
        "--detector-size",
        **number,
        default=LONGEST,
        help="pixels to which longer photographs are shrunk to look for faces; more finds smaller "
        "ones (%(default)s)",
    )
    add(
        "--points",
        type=Path,
        metavar="FILE.csv",
        help="five points of each face, instead of a detector",
    )
    add(
        "--min-score",
        type=float,
        default=MIN_SCORE,
        metavar="S",
        help="detector's score of a face that counts (%(default)s)",
    )
    add(
        "--min-size",
        type=float,
        default=MIN_SIZE,
        metavar="N",
        help="side of the square, in the photograph's pixels, that becomes the crop (%(default)s)",
    )
    add(
        "--several",
        choices=("drop", "largest"),
        default="drop",
        help="what to do with a photograph of several faces (%(default)s)",
    )
    add("--quality", **number, default=95, help="of the JPEG files, 1 ... 100 (%(default)s)")
    add("--png", action="store_true", help="write PNG files instead")
    add("--workers", **number, default=cores(), help="processes (%(default)s)")
    args = parser.parse_args()
    if not 1 <= args.quality <= 100 or args.workers < 1 or args.detector_size < 32:
        raise InputError(
            "--quality is 1 ... 100, --workers at least 1, --detector-size at least 32"
        )
    return args


if __name__ == "__main__":
    run(main)
