"""The five-point similarity against scikit-image's and a plain search, and the warp against plain
bilinear interpolation.
"""

import numpy as np
import pytest
from skimage.transform import SimilarityTransform

from tests.saved_sets import smooth
from utils.align import SIZE, TEMPLATE, align, similarity
from utils.errors import InputError

RNG = np.random.default_rng(3)


def estimate(points, template) -> np.ndarray:
    """scikit-image's (2, 3) matrix; its newer versions have another way to it."""
    if hasattr(SimilarityTransform, "from_estimate"):
        return SimilarityTransform.from_estimate(points, template).params[:2]
    transform = SimilarityTransform()
    assert transform.estimate(points, template)
    return transform.params[:2]


def moved(angle=0.0, scale=1.0, shift=(0, 0), noise=0.0) -> np.ndarray:
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return TEMPLATE.astype(np.float64) @ turn.T + shift + noise * RNG.normal(size=(5, 2))


def misfit(matrix, points) -> float:
    return float(np.square(points @ matrix[:, :2].T + matrix[:, 2] - TEMPLATE).sum())


def test_template_is_that_of_the_specification():
    assert TEMPLATE.dtype == np.float32 and not TEMPLATE.flags.writeable and SIZE == 112
    np.testing.assert_array_equal(
        TEMPLATE,
        np.float32(
            [
                [38.2946, 51.6963],
                [73.5318, 51.5014],
                [56.0252, 71.7366],
                [41.5493, 92.3655],
                [70.7299, 92.2041],
            ]
        ),
    )


@pytest.mark.parametrize(
    "points",
    [
        moved(),
        moved(0.3, 2.5, (40, -7)),
        moved(3.1, 0.2, (1000, 1000)),
        moved(-1, 1, noise=3),
        moved(0.1, 4, (9, 9), noise=20),
        # mirrored: the best rotation, no mirroring back
        RNG.normal(size=(5, 2)),
        RNG.normal(50, 30, (5, 2)),
        moved() * (-1, 1),
        # in a line
        np.column_stack([np.arange(5), 2 * np.arange(5)]).astype(float),
    ],
)
def test_similarity_is_scikit_images(points):
    matrix = similarity(points)
    np.testing.assert_allclose(
        matrix, estimate(points, TEMPLATE.astype(np.float64)), rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(similarity(points.astype(np.float32)), matrix, rtol=1e-3, atol=1e-3)
    assert matrix.shape == (2, 3) and np.linalg.det(matrix[:, :2]) > 0


@pytest.mark.parametrize("noise", [0, 5, 50])
def test_similarity_is_the_least_misfit(noise):
    points = moved(0.4, 1.7, (12, 30), noise)
    matrix = similarity(points)
    best = misfit(matrix, points)
    assert noise or best < 1e-8
    for step in (1e-3, -1e-3):
        for change in (
            [[1, 0, 0], [0, 1, 0]],
            [[0, -1, 0], [1, 0, 0]],
            [[0, 0, 1], [0, 0, 0]],
            [[0, 0, 0], [0, 0, 1]],
        ):
            assert misfit(matrix + step * np.array(change), points) > best


@pytest.mark.parametrize(
    "points, message",
    [
        (np.zeros((5, 2)), r"5 points in one place \(0, 0\)"),
        (np.full((5, 2), 1e4), "in one place"),
        (np.full((5, 2), 100.1) + RNG.normal(0, 1e-7, (5, 2)), "in one place"),
        (np.where(np.eye(5, 2) > 0, np.nan, TEMPLATE), "not finite"),
        (np.where(np.eye(5, 2) > 0, np.inf, TEMPLATE), "not finite"),
        (TEMPLATE[:4], r"\(4, 2\) where \(5, 2\)"),
        (TEMPLATE.T, r"\(2, 5\)"),
        (TEMPLATE.reshape(-1), r"\(10,\)"),
    ],
)
def test_unsuitable_points(points, message):
    with pytest.raises(InputError, match=message):
        similarity(points)


def test_points_that_no_rotation_brings_nearer():
    triangle = np.array([[0, 0], [1, 0], [0.5, np.sqrt(0.75)]])
    with pytest.raises(InputError, match="unlike"):
        similarity(triangle * (-1, 1), triangle)


def bilinear(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The warp pixel by pixel in float64; outside of the image is black."""
    back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    padded = np.zeros((image.shape[0] + 4, image.shape[1] + 4, 3))
    padded[2:-2, 2:-2] = image
    out = np.zeros((SIZE, SIZE, 3))
    for y in range(SIZE):
        for x in range(SIZE):
            u, v, _ = back @ (x, y, 1) + (2, 2, 0)
            i, j = int(np.floor(v)), int(np.floor(u))
            if 0 <= i < padded.shape[0] - 1 and 0 <= j < padded.shape[1] - 1:
                s, t = v - i, u - j
                out[y, x] = (1 - s) * ((1 - t) * padded[i, j] + t * padded[i, j + 1]) + s * (
                    (1 - t) * padded[i + 1, j] + t * padded[i + 1, j + 1]
                )
    return out


@pytest.mark.parametrize(
    "angle, scale, shift, inside",
    [
        (0, 1, (0, 0), True),
        (-0.5, 0.6, (60, 40), True),
        (0.3, 1.5, (30, -20), False),
        (2, 1, (190, 90), False),
    ],
)
def test_align_is_the_plain_warp(angle, scale, shift, inside):
    image = smooth(1, (150, 170))[0]
    points = moved(angle, scale, shift)
    crop = align(image, points)
    assert crop.shape == (SIZE, SIZE, 3) and crop.dtype == np.uint8 and crop.flags.c_contiguous
    difference = np.abs(crop - bilinear(image, similarity(points)))
    # OpenCV interpolates at 1/32 of a pixel; at the black border a pixel may weigh otherwise by as
    # much
    assert np.quantile(difference, 0.98) <= 3 and difference.max() <= 20
    assert (crop > 0).any(axis=2).all() == inside


def test_identity_leaves_the_image():
    image = smooth(1)[0]
    np.testing.assert_array_equal(align(image, TEMPLATE), image)


def test_five_dots_come_to_lie_on_the_template():
    points = np.round(moved(0.2, 2, (80, 20)))
    image = np.zeros((300, 300, 3), np.uint8)
    for x, y in points.astype(int):
        image[y - 2 : y + 3, x - 2 : x + 3] = 255
    crop = align(image, points)
    for x, y in np.round(TEMPLATE).astype(int):
        assert crop[y, x].min() > 100
    assert (crop.max(axis=2) > 0).mean() < 0.02


def test_bad_points_in_align():
    with pytest.raises(InputError, match="in one place"):
        align(smooth(1)[0], np.zeros((5, 2)))
