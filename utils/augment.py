"""AdaFace's augmentations (Kim et al., CVPR 2022), each on a fifth of the images: crop, low
resolution, brightness/contrast/saturation.
"""

import numpy as np
import torch
from torchvision.transforms.v2 import functional as tv

SHARE = 0.2
BLACK = -1.0
INTERPOLATIONS = (
    tv.InterpolationMode.NEAREST,
    tv.InterpolationMode.BILINEAR,
    tv.InterpolationMode.BICUBIC,
)


def augment(images: torch.Tensor, seed: list[int]) -> torch.Tensor:
    """Change (B, 3, H, W) images in [-1, 1] in place and return them; what is drawn depends on
    ``seed`` (integers) alone.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.random((len(images), 3)) < SHARE
    for row, on in zip(*chosen.nonzero(), strict=True):
        images[row] = (crop, lower_resolution, change_light)[on](images[row], rng)
    return images


def crop(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Keep a box of 20 to 100 % of the area where it is, black around it."""
    height, width = image.shape[1:]
    area = rng.uniform(0.2, 1.0)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    h = min(height, round(height * (area / ratio) ** 0.5))
    w = min(width, round(width * (area * ratio) ** 0.5))
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    kept = torch.full_like(image, BLACK)
    kept[:, top : top + h, left : left + w] = image[:, top : top + h, left : left + w]
    return kept


def lower_resolution(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Scale down to 20 to 100 % of the side and back, by an interpolation drawn for each way."""
    size, scale = image.shape[1:], rng.uniform(0.2, 1.0)
    down, up = (INTERPOLATIONS[number] for number in rng.integers(len(INTERPOLATIONS), size=2))
    small = tv.resize(image, [max(1, round(side * scale)) for side in size], interpolation=down)
    return tv.resize(small, list(size), interpolation=up).clamp(-1, 1)


def change_light(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Brightness, contrast and saturation by factors of 0.5 to 1.5."""
    pixels = (image + 1) / 2
    for adjust in (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation):
        pixels = adjust(pixels, float(rng.uniform(0.5, 1.5)))
    return pixels * 2 - 1
