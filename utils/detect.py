"""Faces in photographs by OpenCV's YuNet, whose file the user fetches: where they are and the five
points that utils/align.py needs.
"""

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.align import SIZE, similarity
from utils.errors import InputError
from utils.weights.kinds import bytes_look_like

# The same weights twice: the file of 2026 takes images of any size; the one of 2023 states 640x640,
# which OpenCV's own engine ignores and ONNX Runtime, one of OpenCV 5's engines, does not. OpenCV
# 4.11, 4.14 and 5.0 find the same faces with either.
DYNAMIC, STATIC = "face_detection_yunet_2026may.onnx", "face_detection_yunet_2023mar.onnx"
FOLDER = Path(__file__).resolve().parents[1] / "deploy"
SOURCE = "https://github.com/opencv/opencv_zoo/tree/main/models/face_detection_yunet"
DETECTOR_HELP = f"YuNet's file (deploy/{DYNAMIC}, or {STATIC})"
# pixels: a photograph is shrunk to it, for YuNet was trained on faces of 10 to 300 pixels
LONGEST = 640
# score: what is below is background
FLOOR = 0.5
# what is below is no face to learn from or decide by
MIN_SCORE = 0.8
OVERLAP, MOST = 0.3, 5000
REASONS = ("no face", "low score", "too small", "several faces")


class Face(NamedTuple):
    """box: x, y, width, height; points: (5, 2) as (x, y), in the order of utils.align.TEMPLATE; all
    in the photograph's pixels. score: 0 ... 1.
    """

    box: tuple[float, float, float, float]
    points: np.ndarray
    score: float

    @property
    def size(self) -> float:
        """The side, in the photograph's pixels, of the square that becomes the aligned crop.

        Raises InputError for points unlike a face.
        """
        return SIZE / np.sqrt(np.linalg.det(similarity(self.points)[:, :2]))

    def describe(self) -> str:
        x, y, width, height = self.box
        return f"{width:.0f}x{height:.0f} at ({x:.0f}, {y:.0f}), score {self.score:.2f}"


class Detector:
    """A photograph (H, W, 3) uint8 RGB to its faces of a score of at least FLOOR, from left to
    right.

    path: YuNet's file; None: the one of ``file_names()`` that lies in deploy/.
    longest: photographs with a longer side are shrunk to it; more finds smaller faces.
    Raises InputError if the file is missing or no face detector.
    """

    def __init__(self, path: str | Path | None = None, longest: int = LONGEST):
        self.path = Path(path) if path else default_file()
        self.longest = longest
        if not self.path.is_file():
            raise InputError(
                f"--detector: no file {self.path.absolute()}: {advice()} and name it with "
                f"--detector or put it into {FOLDER}; or give faces that are aligned already, or "
                "points from elsewhere"
            )
        # what OpenCV has to say of an unreadable file is said below, in one line; the function's
        # name is that of OpenCV 4, then that of 5
        silence = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel
        silence(0)
        # the file's content, not its name: OpenCV crashes on a name that is not UTF-8
        content, no_text = np.fromfile(self.path, np.uint8), np.empty(0, np.uint8)
        try:
            self.network = cv2.FaceDetectorYN.create(
                "onnx", content, no_text, (320, 320), FLOOR, OVERLAP, MOST
            )
            self(np.zeros((64, 64, 3), np.uint8))
        except cv2.error as error:
            look = bytes_look_like(self.path, "onnx")
            it = f"it looks like {look}; " if look else ""
            raise InputError(
                f"--detector: {self.path} is no YuNet face detector that OpenCV {cv2.__version__}"
                f" can run; {it}{advice()}"
            ) from error

    def __call__(self, image: np.ndarray) -> list[Face]:
        height, width = image.shape[:2]
        scale = min(1.0, self.longest / max(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image
        self.network.setInputSize(size)
        _, rows = self.network.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        if rows is None:
            return []
        back = np.array([width / size[0], height / size[1]])
        faces = []
        for row in rows.astype(np.float64):
            box = (*(row[:2] * back), *(row[2:4] * back))
            # right eye, left eye, nose, right and left corner of the mouth, as the person has
            # them: left to right as seen
            points = row[4:14].reshape(5, 2) * back
            faces.append(Face(box, points, float(row[14])))
        return from_left(faces)


def file_names() -> tuple[str, str]:
    """The names of YuNet's files that the installed OpenCV can run, the recommended one first."""
    return (STATIC, DYNAMIC) if int(cv2.__version__.split(".")[0]) < 5 else (DYNAMIC, STATIC)


def default_file() -> Path:
    """The first of ``file_names()`` that lies in deploy/; if neither does, where the first
    should.
    """
    places = [FOLDER / name for name in file_names()]
    return next((place for place in places if place.is_file()), places[0])


def advice() -> str:
    recommended, other = file_names()
    return f"fetch {recommended} (for OpenCV {cv2.__version__}; {other} works, too) from {SOURCE}"


def from_left(faces: list[Face]) -> list[Face]:
    return sorted(faces, key=lambda face: float(face.points[:, 0].mean()))


def choose(
    faces: list[Face], which: str = "only", min_score: float = MIN_SCORE, min_size: float = 0
) -> Face:
    """The face that is meant.

    which: "only" (there must be one), "largest", or its number from the left, which an image with
    one face ignores. min_score, min_size (pixels, see ``Face.size``): of faces that count.
    Raises InputError that says why there is none, one of REASONS first.
    """
    if not faces:
        raise InputError("no face")
    sure = [face for face in faces if face.score >= min_score]
    if not sure:
        raise InputError(f"low score: {max(face.score for face in faces):.2f}, below {min_score:g}")
    usable = [face for face in sure if face.size >= min_size]
    if not usable:
        raise InputError(
            f"too small: {max(face.size for face in sure):.0f} pixels, below {min_size:g}"
        )
    if len(usable) == 1:
        return usable[0]
    if which == "largest":
        return max(usable, key=lambda face: face.size)
    if which.isdecimal() and 1 <= int(which) <= len(usable):
        return usable[int(which) - 1]
    described = "; ".join(face.describe() for face in usable)
    raise InputError(f"several faces: {len(usable)}, from left to right {described}")
