"""AdaFace's augmentations: a batch at once gives what torchvision gives image by image."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.augmentation import one_by_one
from tests import rounding
from utils.augment import CHOICES, DRAWN, augment, draw, resizing

# Resizing adds at most 112 products along each axis, and torchvision's at most 25 down and 25 up;
# the weights of a pixel add up to at most 1.25 in absolute value, each way and along each axis.
BOUND = (2 * 112 + 4 * 25) * 1.25**4 * rounding.U


def some_images(count: int, size: int = 112) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, size, size, generator=generator) * 2 - 1


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_batch_at_once_is_as_image_by_image(layout):
    images = some_images(96).contiguous(memory_format=layout)
    plain = one_by_one(images.clone(), draw(96, 3, 5, 1000))
    at_once = augment(images.clone(), 3, 5, 1000)
    assert at_once.is_contiguous(memory_format=layout)
    # clamped light may multiply what resizing rounded: by 1.5 for each of three factors
    torch.testing.assert_close(at_once, plain, rtol=0, atol=1.5**3 * BOUND)
    assert not torch.equal(at_once, images)


def test_resizing_is_linear_along_each_axis():
    """Every side and pair of interpolations, against torchvision on an image."""
    image, matrices = some_images(1, 20)[0].double(), resizing(20, torch.device("cpu")).double()
    assert len(matrices) == (20 - 4 + 1) * 9
    numbers = np.zeros((len(matrices), DRAWN))
    numbers[:, CHOICES] = 1, 0, 1
    sides, down, up = np.unravel_index(np.arange(len(matrices)), (17, 3, 3))
    numbers[:, 7:10] = np.stack([sides / 16, (down + 0.5) / 3, (up + 0.5) / 3], axis=1)
    expected = one_by_one(image.repeat(len(matrices), 1, 1, 1), numbers)
    by_matrix = (matrices[:, None] @ image @ matrices[:, None].mT).clamp(-1, 1)
    # the matrices are float32, and sum up to 20 products
    torch.testing.assert_close(by_matrix, expected, rtol=0, atol=4 * 20 * 1.25**4 * rounding.U)


def test_pixels_depend_on_seed_epoch_and_position_alone():
    images = some_images(48)
    whole = augment(images.clone(), 1, 2, 100)
    # as three ranks have them, or a smaller batch
    for parts in (3, 16):
        size = 48 // parts
        starts = range(0, 48, size)
        joined = [augment(images[start:][:size].clone(), 1, 2, 100 + start) for start in starts]
        torch.testing.assert_close(torch.cat(joined), whole, rtol=0, atol=1.5**3 * BOUND)
        drawn = [draw(size, 1, 2, 100 + start) for start in starts]
        assert np.array_equal(np.concatenate(drawn), draw(48, 1, 2, 100))
    for other in ((2, 2, 100), (1, 3, 100), (1, 2, 101)):
        assert not torch.equal(augment(images.clone(), *other), whole)


def test_each_changes_a_fifth_of_the_images_and_stays_in_range():
    images = some_images(400, 32)
    changed = augment(images.clone(), 1, 2, 3)
    assert changed.shape == images.shape and changed.min() >= -1 and changed.max() <= 1
    share = (changed != images).flatten(1).any(1).double().mean()
    # 1 - 0.8^3, four standard deviations of 400 draws
    assert abs(share - 0.488) < 4 * (0.488 * 0.512 / 400) ** 0.5


class Kernels(TorchDispatchMode):
    """Counts what is computed; views are not."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += not function.is_view
        return function(*arguments, **(options or {}))


def test_the_number_of_kernels_does_not_depend_on_the_batch():
    augment(some_images(64), 0, 0, 0)
    counts = []
    for size in (64, 256):
        images = some_images(size)
        with Kernels() as kernels:
            augment(images, 0, 0, 0)
        counts.append(kernels.count)
    assert counts[0] == counts[1] <= 60
