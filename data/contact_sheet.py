"""Contact sheets: rows of images below their titles, as one PNG."""

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.dataset.base import FaceImages
from utils.files import replacing
from utils.images import decode_bgr
from utils.recordio.image_records import sampled

# images in a row
COLUMNS = 10
# pixels of an image, and of the title above it
TILE, STRIP = 112, 14
# rows of a training set's sheet
IDENTITIES, SHARED = 16, 4


class Row(NamedTuple):
    """At most COLUMNS encoded images, and the titles of the first of them."""

    images: list[bytes]
    titles: list[str]


def draw_sheet(path: Path, rows: list[Row]) -> None:
    """Write the rows, one below the other, as PNG."""
    sheet = np.vstack([draw_row(row) for row in rows])
    with replacing(path) as file:
        file.write(cv2.imencode(".png", sheet)[1].tobytes())


def draw_row(row: Row) -> np.ndarray:
    """Images side by side (BGR) below their titles, white where the row is not full."""
    drawn = np.full((STRIP + TILE, COLUMNS * TILE, 3), 255, np.uint8)
    for column, image in enumerate(row.images):
        drawn[STRIP:, column * TILE : (column + 1) * TILE] = fit_tile(decode_bgr(image))
    for column, title in enumerate(row.titles):
        place = (column * TILE + 3, 11)
        cv2.putText(drawn, title, place, cv2.FONT_HERSHEY_SIMPLEX, 0.38, (0, 0, 0), 1, cv2.LINE_AA)
    return drawn


def fit_tile(image: np.ndarray) -> np.ndarray:
    """Shrink a bigger image into (TILE, TILE, 3), with white beside it."""
    scale = TILE / max(image.shape[:2])
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    rows, columns = TILE - image.shape[0], TILE - image.shape[1]
    borders = rows // 2, rows - rows // 2, columns // 2, columns - columns // 2
    return cv2.copyMakeBorder(image, *borders, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def training_set_rows(
    dataset: FaceImages, labels: np.ndarray, shared: list[np.ndarray]
) -> list[Row]:
    """The largest and the smallest identity, IDENTITIES spread over the classes, then images under
    two identities.

    labels: (N,) of the images, NaN where one is unreadable. shared: indices of equal images, a
    group a row.
    """
    classes, sizes = np.unique(labels[~np.isnan(labels)], return_counts=True)
    chosen = [("", number) for number in sampled(len(classes), IDENTITIES)]
    if chosen:
        chosen = [("largest, ", sizes.argmax()), ("smallest, ", sizes.argmin()), *chosen]
    rows = []
    for prefix, number in chosen:
        label, size = classes[number], sizes[number]
        members = np.flatnonzero(labels == label)
        images = stored_images(dataset, members[sampled(len(members), COLUMNS)])
        plural = "" if size == 1 else "s"
        rows.append(Row(images, [f"{prefix}label {label:g}: {size} image{plural}"]))
    for group in shared[:SHARED]:
        titles = [f"shared: label {labels[index]:g}" for index in group[:COLUMNS]]
        rows.append(Row(stored_images(dataset, group[:COLUMNS]), titles))
    return rows or [Row([], ["no readable image"])]


def stored_images(dataset: FaceImages, indices: np.ndarray) -> list[bytes]:
    return [dataset.stored(index)[0] for index in indices.tolist()]
