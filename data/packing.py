"""What all ways of packing images have in common: what is stored of an image, and the files of a
finished set.

No command.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2

from utils.errors import InputError, RecordError
from utils.files import csv_text, replacing
from utils.images import decode_bgr
from utils.images import resize as resize_image
from utils.jpeg import JPEG_START, ends_early
from utils.recordio.files import IMAGE_SIZE

# from class numbers to the labels of the source, where these are others
LABEL_MAP = "label_map.csv"


class BadImage(InputError):
    """An image that cannot be read, or not to its end, or that has no label: ``--skip-bad`` leaves
    it out.
    """


def image_encoder(quality: int, resize: bool) -> Callable[[bytes, str], bytes]:
    """A function from an image file's content and name to the JPEG bytes to store.

    It raises BadImage naming an image that cannot be read, InputError for one of another size.
    """

    def encode(content: bytes, name: str) -> bytes:
        try:
            if ends_early(content):
                raise RecordError("the JPEG ends early (no end marker)")
            image = decode_bgr(content)
        except RecordError as error:
            raise BadImage(f"cannot read the image {name}: {error}") from None
        if image.shape[:2] != IMAGE_SIZE:
            if not resize:
                raise InputError(
                    f"{name} is {image.shape[1]}x{image.shape[0]}, not 112x112; align "
                    "and crop it, or add --resize"
                )
            image = resize_image(image, IMAGE_SIZE)
        elif content.startswith(JPEG_START):
            return content
        return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()

    return encode


def check_output(output: str) -> None:
    """Raises InputError if the folder for the records is a file."""
    if os.path.exists(output) and not os.path.isdir(output):
        raise InputError(f"--output {output} is a file; name the folder to write train.rec into")


def place_for_work(output: str | Path) -> Path:
    """Where on the disk of the folder ``output`` files are written before they are moved there."""
    output = Path(output)
    return output if os.path.ismount(output) else output.parent


def install(temporary: str, output: str) -> None:
    """Move the checked files into ``output``, on the same disk; the record file last, so that it
    never meets another set's index or map. Once more, if that was interrupted.
    """
    if not os.path.exists(os.path.join(temporary, "train.rec")):
        return
    os.makedirs(output, exist_ok=True)
    for name in ("train.rec", LABEL_MAP):
        if os.path.exists(os.path.join(output, name)):
            os.unlink(os.path.join(output, name))
    if os.path.exists(os.path.join(temporary, LABEL_MAP)):
        # a copy, so that the next attempt has it, too
        shutil.copyfile(os.path.join(temporary, LABEL_MAP), os.path.join(output, LABEL_MAP))
    for name in ("property", "train.lst", "train.idx", "train.rec"):
        if os.path.exists(os.path.join(temporary, name)):
            os.replace(os.path.join(temporary, name), os.path.join(output, name))


def write_table(path: str | Path, header: tuple[str, ...], rows: Iterable[tuple]) -> None:
    """Write CSV; the names of files as their bytes, whatever their encoding."""
    with replacing(path) as file:
        file.write(os.fsencode(csv_text([header, *rows])))
