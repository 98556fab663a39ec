"""Face alignment by five points, as ArcFace's networks were trained on: a similarity onto one
template of 112 x 112 pixels.
"""

import cv2
import numpy as np

from utils.errors import InputError

SIZE = 112
# (x, y) in pixels of the eyes, the nose's tip and the corners of the mouth, left to right as seen.
# Source: InsightFace, face_align.py
TEMPLATE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ],
    np.float32,
)
TEMPLATE.flags.writeable = False
# relative: less of a spread or of a likeness to the template is rounding
NEGLIGIBLE = 1e-6


def similarity(points: np.ndarray, template: np.ndarray = TEMPLATE) -> np.ndarray:
    """The rotation, uniform scale and shift (no mirroring) that bring ``points`` nearest to
    ``template`` in the least-squares sense.

    ``points``, ``template``: (K, 2) as (x, y) in pixels. Returns the (2, 3) float64 matrix M of x'
    = M [x, y, 1]. Raises InputError for points that are not finite, all in one place, or such that
    no rotation brings them nearer than a single point would be. In the plane this minimum (Umeyama
    1991) is a regression of complex numbers, template = a * points + b.
    """
    points, template = (np.asarray(array, np.float64) for array in (points, template))
    if points.shape != template.shape or points.ndim != 2 or points.shape[1] != 2:
        raise InputError(
            f"points of shape {points.shape} where {template.shape} are needed: (x, y) of each"
        )
    if not np.isfinite(points).all():
        raise InputError("points that are not finite (NaN or infinite)")
    z, w = points @ (1, 1j), template @ (1, 1j)
    from_center, to_center = z - z.mean(), w - w.mean()
    spread, covariance = np.linalg.norm(from_center), np.vdot(from_center, to_center)
    if spread <= NEGLIGIBLE * (1 + np.abs(z).max()):
        raise InputError(f"{len(z)} points in one place ({points[0, 0]:g}, {points[0, 1]:g})")
    if abs(covariance) <= NEGLIGIBLE * spread * np.linalg.norm(to_center):
        raise InputError(
            f"{len(z)} points unlike a face: no rotation brings them near the template"
        )
    a = covariance / spread**2
    b = w.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def align(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Warp a photograph so that its five points lie on the template; linear interpolation, black
    where the photograph ends.

    ``image``: (H, W, 3) uint8. ``points``: (5, 2) as (x, y) in its pixels, in the template's order.
    Returns (112, 112, 3) uint8. Raises InputError as ``similarity`` does.
    """
    return cv2.warpAffine(
        image,
        similarity(points),
        (SIZE, SIZE),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=0,
    )
