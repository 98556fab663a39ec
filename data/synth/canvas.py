"""Where a synthetic face is drawn: face coordinates, the camera, and OpenCV polygons.

Face coordinates: pixels of the 112x112 crop, origin between the eyes, x to the right of the image,
y down, z towards the camera. Features lie on an ellipsoid that is turned by yaw and pitch, so they
move sideways and the far side is foreshortened.
"""

import cv2
import numpy as np

SIZE = 112
# the eye midpoint of InsightFace's alignment template, a little lower to show more forehead
ORIGIN = np.array([56.0, 53.0])
# drawn larger, then averaged: smooth edges without the price of cv2.LINE_AA
SUPERSAMPLE = 2
# cv2 takes polygon corners as fixed-point integers
FRACTION_BITS = 4


def to_scalar(colour) -> list[float]:
    """Bring a colour into 0..255, as cv2 takes it."""
    return [min(max(float(channel), 0.0), 255.0) for channel in colour]


def cut_out(image: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the part of the image around a polygon, which may be empty; the polygon's corners in it)."""
    limits = image.shape[1::-1]
    x0, y0 = np.clip(corners.min(0) >> FRACTION_BITS, 0, limits)
    x1, y1 = np.clip((corners.max(0) >> FRACTION_BITS) + 2, 0, limits)
    return image[y0:y1, x0:x1], corners - (np.array([x0, y0], np.int32) << FRACTION_BITS)


class Canvas:
    """The image, its shadows, and the camera that one photograph of a person is taken with; colours
    are RGB.
    """

    def __init__(self, who, look, rng):
        self.who = who
        self.look = look
        self.rng = rng
        self.canvas = np.empty((SIZE * SUPERSAMPLE, SIZE * SUPERSAMPLE, 3), np.uint8)
        self.shade = np.ones((SIZE, SIZE), np.float32)
        self.sin = np.sin(look.yaw)
        self.cos = np.cos(look.yaw)
        nod = np.sin(look.pitch)
        # yaw, pitch, and no perspective
        head = np.array([(self.cos, 0.0), (0.0, np.cos(look.pitch)), (self.sin, -nod)])
        sin, cos = np.sin(look.roll), np.cos(look.roll)
        self.camera = look.zoom * head @ np.array([(cos, sin), (-sin, cos)])
        # alignment brings the eyes, nose and mouth back to the middle: it undoes most of the turn's
        # shift, and the head moves instead
        shift = ORIGIN + (look.shift_x, look.shift_y)
        self.center = shift - 0.8 * who.depth * np.array([self.sin, -nod])

    # -- from face coordinates to the canvas

    def place(self, x, y, z) -> np.ndarray:
        """Turn points of the head by yaw and pitch, then roll, zoom and shift: crop coordinates (N,
        2).
        """
        return np.array([x, y, z]).T @ self.camera + self.center

    def place_feature(self, points, relief=0.0) -> np.ndarray:
        """Place points (N, 2) that lie on the face's surface, ``relief`` pixels above it."""
        x, y = np.asarray(points, np.float64).T
        round_off = 1 - (x / (self.who.head_width + 4)) ** 2 - 0.45 * (y / self.who.chin) ** 2
        return self.place(x, y, self.who.depth * np.sqrt(np.maximum(round_off, 0.02)) + relief)

    def place_outline(self, points) -> np.ndarray:
        """Place points (N, 2) of the silhouette: the skull shows its longer side as it turns, the
        chin goes with the face.
        """
        x, y = np.asarray(points, np.float64).T
        widen = np.hypot(self.cos, 1.1 * self.who.depth / self.who.head_width * self.sin)
        depth = self.who.depth * np.interp(y / self.who.chin, [-1, 0, 1], [0.1, 0.25, 0.75])
        # a silhouette is never foreshortened: undo the cosine
        return self.place(x * widen / self.cos, y, depth)

    def fill(self, placed, colour, alpha=1.0) -> None:
        """Fill a polygon of crop coordinates, mixing with what is there when ``alpha`` < 1."""
        corners = np.rint(placed * (SUPERSAMPLE << FRACTION_BITS)).astype(np.int32)
        colour = to_scalar(colour)
        if alpha >= 1:
            cv2.fillPoly(self.canvas, [corners], colour, cv2.LINE_8, FRACTION_BITS)
            return
        region, corners = cut_out(self.canvas, corners)
        if region.size:
            painted = region.copy()
            cv2.fillPoly(painted, [corners], colour, cv2.LINE_8, FRACTION_BITS)
            region[...] = cv2.addWeighted(painted, alpha, region, 1 - alpha, 0)

    def stroke(self, placed, colour, width) -> None:
        """Draw an open line, ``width`` in pixels of the crop."""
        corners = np.rint(placed * (SUPERSAMPLE << FRACTION_BITS)).astype(np.int32)
        thickness = max(1, round(width * SUPERSAMPLE))
        cv2.polylines(
            self.canvas, [corners], False, to_scalar(colour), thickness, cv2.LINE_8, FRACTION_BITS
        )

    def cast(self, placed, amount) -> None:
        """Darken (amount < 0) or brighten a polygon by that fraction; ``light`` blurs the edges.

        Overlaps multiply.
        """
        corners = np.rint(placed * (1 << FRACTION_BITS)).astype(np.int32)
        region, corners = cut_out(self.shade, corners)
        if region.size:
            factor = np.ones_like(region)
            cv2.fillPoly(factor, [corners], float(1 + amount), cv2.LINE_8, FRACTION_BITS)
            region *= factor
