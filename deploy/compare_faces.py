"""Is this the same person? Two photographs, or one against a gallery.

    python deploy/compare_faces.py a.jpg b.jpg --model 600backbone.onnx --report report --far 1e-3
    python deploy/compare_faces.py probe.jpg --gallery people --model 600backbone.onnx \\
        --threshold 0.3 --top 3
    python deploy/compare_faces.py a.png b.png --model 600backbone.pth --aligned

finds the face in each photograph (OpenCV's YuNet), aligns it by five points, embeds it and its
mirror image as evaluation does and prints the cosine, and the decision at a threshold: of a false
accept rate that the model had on a pair set (--report: the folder that eval/run_full_eval.py
--report-dir wrote), or --threshold itself. YuNet's file, face_detection_yunet_2026may.onnx or, for
OpenCV 4, face_detection_yunet_2023mar.onnx of the OpenCV Zoo, is not part of this repository: put
it into deploy/, or name it with --detector. --aligned takes crops of 112x112 and needs none. A
gallery is a folder of photographs, one a person, or of one folder a person, whose features are
averaged. The threshold is that of one comparison: among many people, chance finds a look-alike more
often.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from deploy.gallery import FaceReader, read_gallery
from deploy.model import add_color_space, embed_faces, load_model
from eval.report.tables import Table, format_table
from eval.report.thresholds import read_threshold
from utils.command_line import command_parser
from utils.detect import DETECTOR_HELP, LONGEST, MIN_SCORE, Detector
from utils.errors import InputError, run

FAR = 1e-3


def main() -> None:
    args = parse_arguments()
    model = load_model(args.model, "--model", args.color_space)
    threshold, meaning = find_threshold(args, model)
    read = FaceReader(
        None if args.aligned else Detector(args.detector, args.detector_size),
        args.face,
        args.min_score,
    )
    faces = [read(path) for path in args.photographs]
    features = embed_faces(model, np.stack(faces))
    for path in args.photographs:
        print(f"{path}: {read.notes[path]}")
    if args.gallery:
        people = read_gallery(args.gallery, read, model)
        print(f"{args.gallery}: {len(people.names)} people, {people.images} images")
        for reason in people.left_out:
            print(f"  left out: {reason}")
        for path, feature in zip(args.photographs, features, strict=True):
            print(f"\n{format_table(search(path, feature, people, args.top, threshold))}")
    else:
        cosine = float(features[0] @ features[1])
        decision = "" if threshold is None else f": {decide(cosine, threshold)}"
        print(f"cosine {cosine:.4f}{decision}")
    print(f"{meaning}\n{model.describe()}")


def find_threshold(args: argparse.Namespace, model) -> tuple[float | None, str]:
    """The cosine from which two faces count as the same person, and what it stands for.

    The cosine is None if it is not asked for.
    """
    if args.threshold is not None:
        return args.threshold, f"threshold {args.threshold:.4f}, as given"
    if args.report is None:
        return None, (
            "no decision: a threshold is named with --threshold, or with --report and --far"
        )
    digests = {model.sha256: model.color_space}
    if model.is_onnx:
        digests[model.checkpoint_sha256] = model.network.about.get("checkpoint_color_space", "")
    far = FAR if args.far is None else args.far
    threshold = read_threshold(args.report, far, args.set, digests)
    return threshold.cosine, (
        f"threshold {threshold.cosine:.4f}: on {threshold.set} it accepts at most "
        f"{100 * threshold.far:g}% of different people (FAR {threshold.far:g}) "
        f"and {100 * threshold.tar:.2f}% of pairs of the same person"
    )


def decide(cosine: float, threshold: float) -> str:
    return "the same person" if cosine >= threshold else "different people"


def search(path: Path, feature: np.ndarray, people, top: int, threshold: float | None) -> Table:
    """The people of the gallery that are most like a photograph, the likest first."""
    cosines = people.features @ feature
    order = np.argsort(-cosines, kind="stable")[:top]
    columns = ["person", "cosine"]
    rows = {str(rank): [people.names[at], f"{cosines[at]:.4f}"] for rank, at in enumerate(order, 1)}
    if threshold is not None:
        columns.append("decision")
        for row, at in zip(rows.values(), order, strict=True):
            row.append(decide(cosines[at], threshold))
    return Table("", f"{path}: rank", columns, rows)


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "photographs",
        type=Path,
        nargs="+",
        metavar="PHOTO",
        help="two to compare, or with --gallery any number to search for",
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="FILE",
        help="an ONNX model, or a checkpoint as deploy/export_onnx.py takes",
    )
    add_color_space(parser)
    parser.add_argument("--gallery", type=Path, metavar="DIR", help="people to search among")
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="how many of them to show (%(default)s)"
    )
    parser.add_argument(
        "--aligned", action="store_true", help="the images are aligned crops of 112x112"
    )
    parser.add_argument("--detector", type=Path, metavar="FILE", help=DETECTOR_HELP)
    parser.add_argument(
        "--detector-size",
        type=int,
        default=LONGEST,
        metavar="N",
        help="pixels to "
        "which longer photographs are shrunk; more finds smaller faces (%(default)s)",
    )
    parser.add_argument(
        "--min-score",
        type=float,
        default=MIN_SCORE,
        metavar="S",
        help="detector's score of a face that counts (%(default)s)",
    )
    parser.add_argument(
        "--face",
        default="only",
        metavar="WHICH",
        help="where there are several: "
        "largest, or 1, 2, ... from the left (default: they are an error)",
    )
    parser.add_argument(
        "--threshold", type=float, metavar="COSINE", help="the same person from this cosine on"
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="folder of eval/run_full_eval.py --report-dir, for the threshold",
    )
    parser.add_argument(
        "--far", type=float, metavar="RATE", help=f"false accept rate of that threshold ({FAR})"
    )
    parser.add_argument(
        "--set", metavar="NAME", help="the set that it was measured on, if the report has several"
    )
    args = parser.parse_args()
    if not args.gallery and len(args.photographs) != 2:
        raise InputError(
            f"name two photographs to compare, not {len(args.photographs)}, or people to search "
            "among with --gallery"
        )
    if args.threshold is not None and (args.report or not -1 <= args.threshold <= 1):
        raise InputError("--threshold is a cosine, -1 ... 1, and takes the place of --report")
    if not args.report and (args.far is not None or args.set):
        raise InputError(
            f"--{'set' if args.far is None else 'far'} is of --report, the folder of "
            "a report that eval/run_full_eval.py --report-dir wrote"
        )
    if args.face not in ("only", "largest") and not (args.face.isdecimal() and int(args.face)):
        raise InputError(f"--face {args.face}: largest, or a number from the left, 1, 2, ...")
    if args.top < 1 or args.detector_size < 32:
        raise InputError("--top must be at least 1, --detector-size at least 32")
    return args


if __name__ == "__main__":
    run(main)
