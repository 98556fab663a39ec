"""AdaFace's augmentations (Kim et al., CVPR 2022), each on a fifth of the images: crop, low
resolution, brightness/contrast/saturation.

What happens to an image is drawn for it alone, and computed for all images of a batch at once.
"""

from functools import lru_cache

import numpy as np
import torch
from torchvision.transforms.v2 import functional as tv

from utils.dataset.workers import to_device

SHARE = 0.2
BLACK = -1.0
INTERPOLATIONS = (
    tv.InterpolationMode.NEAREST,
    tv.InterpolationMode.BILINEAR,
    tv.InterpolationMode.BICUBIC,
)
# of the side that a lower resolution keeps at least, and of the area that a crop does
SMALLEST = 0.2
# uniform numbers of an image, and what they decide; a multiple of the four that Philox gives at a
# time
DRAWN = 16
CHOICES, BOX, RESOLUTION, LIGHT = slice(0, 3), slice(3, 7), slice(7, 10), slice(10, 13)
# of red, green and blue in the brightness of a pixel (ITU-R BT.601)
LUMA = 0.2989, 0.587, 0.114


def augment(images: torch.Tensor, seed: int, epoch: int, position: int) -> torch.Tensor:
    """Change (B, 3, S, S) float32 images in [-1, 1] in place and return them.

    position: that of the first in the epoch, counted over all ranks. What is drawn for an image
    depends on seed, epoch and its position alone, on any number of ranks.
    """
    numbers = draw(len(images), seed, epoch, position)
    in_channels_last = images.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if in_channels_last else torch.contiguous_format
    changes = (crop, lower_resolution, change_light)
    parts = (BOX, RESOLUTION, LIGHT)
    for change, part, chosen in zip(changes, parts, numbers[:, CHOICES].T < SHARE, strict=True):
        rows = chosen.nonzero()[0]
        if len(rows):
            places = on_device(rows, images)
            # channel by channel for the products and sums, and back for the copy
            changed = change(images[places].contiguous(), numbers[rows, part])
            images[places] = changed.contiguous(memory_format=layout)
    return images


def draw(count: int, seed: int, epoch: int, position: int) -> np.ndarray:
    """(count, DRAWN) uniform numbers in [0, 1): those of the images from ``position`` on."""
    stream = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    stream.advance(position * DRAWN // 4)
    return np.random.Generator(stream).random((count, DRAWN))


def crop(images: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
    """Keep a box of 20 to 100 % of the area where it is, black around it. numbers: (n, 4)."""
    size = images.shape[-1]
    area = SMALLEST + (1 - SMALLEST) * numbers[:, 0]
    ratio = np.exp((2 * numbers[:, 1] - 1) * np.log(4 / 3))
    # (2, n): heights and widths
    sides = np.rint(size * np.sqrt([area / ratio, area * ratio])).clip(max=size)
    starts = np.floor(numbers[:, 2:].T * (size - sides + 1))
    begin, end = on_device(np.stack([starts, starts + sides]), images)[..., None]
    at = torch.arange(size, device=images.device)
    rows, columns = (at >= begin) & (at < end)
    kept = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(kept, images, BLACK)


def lower_resolution(images: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
    """Scale to 20 to 100 % of the side and back, by drawn interpolations. numbers: (n, 3)."""
    size = images.shape[-1]
    sides = np.rint(size * (SMALLEST + (1 - SMALLEST) * numbers[:, 0])).astype(np.int64)
    down, up = (numbers[:, 1:] * len(INTERPOLATIONS)).astype(np.int64).T
    chosen = ((sides - smallest_side(size)) * len(INTERPOLATIONS) + down) * len(INTERPOLATIONS) + up
    matrices = resizing(size, images.device)[on_device(chosen, images)]
    # along the columns: all rows of all channels at once
    lines = images.view(len(images), -1, size)
    resized = (lines @ matrices.mT).view(images.shape)
    # along the rows
    channels = [matrices @ channel for channel in resized.unbind(1)]
    return torch.stack(channels, dim=1).clamp_(-1, 1)


@lru_cache(2)
def resizing(size: int, device: torch.device) -> torch.Tensor:
    """(sides * 9, size, size): what ``resize`` down and up again does along one axis.

    Resizing is linear and the same along both axes, so that its matrix is what it makes of the unit
    matrix. By the smaller side, from the smallest on, then the interpolation down, then up.
    """
    unit = torch.eye(size)[None]
    matrices = []
    for side in range(smallest_side(size), size + 1):
        for down in INTERPOLATIONS:
            small = tv.resize(unit, [side, size], interpolation=down)
            matrices += [tv.resize(small, [size, size], interpolation=up) for up in INTERPOLATIONS]
    return torch.cat(matrices).to(device)


def smallest_side(size: int) -> int:
    return round(SMALLEST * size)


def change_light(images: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
    """Brightness, contrast and saturation by factors of 0.5 to 1.5. numbers: (n, 3)."""
    brightness, contrast, saturation = on_device(0.5 + numbers.T, images)[..., None, None, None]
    pixels = ((images + 1).mul_(brightness / 2)).clamp_(0, 1)
    mean = grey(pixels).mean((2, 3), keepdim=True)
    pixels = torch.lerp(mean, pixels, contrast).clamp_(0, 1)
    pixels = torch.lerp(grey(pixels), pixels, saturation).clamp_(0, 1)
    return pixels.mul_(2).sub_(1)


def grey(pixels: torch.Tensor) -> torch.Tensor:
    """(n, 1, S, S) brightness of (n, 3, S, S) pixels."""
    red, green, blue = pixels.split(1, 1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def on_device(values: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    """The values where the images are; floats in their type."""
    tensor = torch.from_numpy(values)
    if tensor.is_floating_point():
        tensor = tensor.to(images.dtype)
    return to_device(tensor, images.device)
