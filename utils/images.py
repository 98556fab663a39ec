"""Image files and their pixels in NumPy, the same in training, evaluation and the data tools."""

import cv2
import numpy as np

from utils.errors import RecordError
from utils.jpeg import JPEG_START


def decode_bgr(encoded: bytes, order: int = cv2.IMREAD_COLOR) -> np.ndarray:
    """Decode a JPEG, PNG, ... to (H, W, 3) uint8 BGR.

    RecordError if OpenCV cannot. order: another way for OpenCV to read it.
    """
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), order) if len(encoded) else None
    # a damaged header that asks for gigapixels
    except cv2.error as error:
        raise RecordError(f"{len(encoded)} bytes that OpenCV refuses: {error.err}") from None
    if image is None:
        raise RecordError(f"{len(encoded)} bytes that are no image OpenCV can read")
    return image


def decode_rgb(encoded: bytes) -> np.ndarray:
    """As ``decode_bgr``, but RGB."""
    if bytes(encoded[:3]) == JPEG_START:
        # saves a conversion; of some rare formats OpenCV gives BGR all the same
        return decode_bgr(encoded, cv2.IMREAD_COLOR_RGB)
    return cv2.cvtColor(decode_bgr(encoded), cv2.COLOR_BGR2RGB)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale (H, W, 3) uint8 to ``size`` = (height, width), each side by itself.

    As torchvision's ``Resize`` does with PIL images: bilinear, over all pixels that one comes from.
    """
    # MXNet's own environment, where records are read too, has none
    from PIL import Image

    scaled = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(scaled)


def resize_and_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale (H, W, 3) uint8 so that the shorter side, relative to ``size`` = (height, width), fits;
    cut the centre of the other.

    The rounding is that of MXNet's ``resize_short``. An image of the right size is returned as it
    is.
    """
    height, width = size
    rows, columns = image.shape[:2]
    if (rows, columns) == size:
        return image
    if rows * width > columns * height:
        scaled = (rows * width // columns, width)
    else:
        scaled = (height, columns * height // rows)
    # Averaging avoids aliasing when pixels are dropped; enlarging has nothing to average.
    interpolation = cv2.INTER_AREA if scaled[0] < rows else cv2.INTER_CUBIC
    image = cv2.resize(image, scaled[::-1], interpolation=interpolation)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    return image[top : top + height, left : left + width]
