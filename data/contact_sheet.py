"""A contact sheet of a training set: rows of identities, and of images that two identities share.

No command; check_rec.py draws it.
"""

from pathlib import Path

import cv2
import numpy as np

from utils.dataset.base import FaceImages, sampled
from utils.files import replacing
from utils.images import decode_bgr

# images in a row; pixels of an image, and of the title above it
COLUMNS, TILE, STRIP = 10, 112, 14
IDENTITIES, SHARED = 16, 4  # rows


def draw_sheet(
    path: Path, dataset: FaceImages, labels: np.ndarray, shared: list[np.ndarray]
) -> None:
    """Write the sheet as PNG: the largest and the smallest identity, IDENTITIES spread over the
    classes, then images under two identities.

    labels: (N,) of the images, NaN where one is unreadable. shared: indices of equal images, a
    group a row.
    """
    known, sizes = np.unique(labels[~np.isnan(labels)], return_counts=True)
    rows = []
    if len(known):
        chosen = [
            ("largest, ", sizes.argmax()),
            ("smallest, ", sizes.argmin()),
            *(("", at) for at in sampled(len(known), IDENTITIES)),
        ]
        for word, at in chosen:
            members = np.flatnonzero(labels == known[at])
            title = f"{word}label {known[at]:g}: {sizes[at]} image{'' if sizes[at] == 1 else 's'}"
            rows.append(draw_row(dataset, members[sampled(len(members), COLUMNS)], [title]))
    for group in shared[:SHARED]:
        rows.append(
            draw_row(
                dataset,
                group[:COLUMNS],
                [f"shared: label {labels[index]:g}" for index in group[:COLUMNS]],
            )
        )
    sheet = np.vstack(rows) if rows else draw_row(dataset, [], ["no readable image"])
    with replacing(str(path)) as file:
        file.write(cv2.imencode(".png", sheet)[1].tobytes())


def draw_row(dataset: FaceImages, indices, titles: list[str]) -> np.ndarray:
    """Images side by side (BGR) below their titles, white where the row is not full."""
    row = np.full((STRIP + TILE, COLUMNS * TILE, 3), 255, np.uint8)
    for column, index in enumerate(indices):
        row[STRIP:, column * TILE : (column + 1) * TILE] = decode_bgr(dataset.stored(int(index))[0])
    for column, title in enumerate(titles):
        cv2.putText(
            row,
            title,
            (column * TILE + 3, 11),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.36,
            (0, 0, 0),
            1,
            cv2.LINE_AA,
        )
    return row
