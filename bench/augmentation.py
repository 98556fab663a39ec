"""AdaFace's augmentations of a batch: image by image with torchvision, against all at once."""

import numpy as np
import torch
from torchvision.transforms.v2 import functional as tv

from utils import augment

BATCH, BATCHES, SIZE = 128, 4, 112


class Way:
    """The same images, in the layout that training has them in."""

    def __init__(self, device: str):
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator) * 2 - 1
        self.images = images.to(device, memory_format=torch.channels_last)

    def step(self) -> dict:
        total = torch.zeros((), dtype=torch.float64, device=self.images.device)
        for batch in range(BATCHES):
            changed = self.augment(self.images.clone(), batch * BATCH)
            # a few pixels of each image: adding up all of them would take as long
            total += changed[:, :, ::16, ::16].sum(dtype=torch.float64)
        return dict(sum=total.item())


class Plain(Way):
    def augment(self, images: torch.Tensor, position: int) -> torch.Tensor:
        return one_by_one(images, augment.draw(len(images), 0, 0, position))


class Ours(Way):
    def augment(self, images: torch.Tensor, position: int) -> torch.Tensor:
        return augment.augment(images, 0, 0, position)


def one_by_one(images: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
    """What ``utils.augment.augment`` makes of the images for these ``numbers``, in place."""
    for image, drawn in zip(images, numbers, strict=True):
        chosen = drawn[augment.CHOICES] < augment.SHARE
        if chosen[0]:
            image[:] = crop(image, *drawn[augment.BOX])
        if chosen[1]:
            image[:] = lower_resolution(image, *drawn[augment.RESOLUTION])
        if chosen[2]:
            image[:] = change_light(image, *drawn[augment.LIGHT])
    return images


def crop(image: torch.Tensor, area: float, ratio: float, top: float, left: float) -> torch.Tensor:
    size = image.shape[-1]
    area, ratio = 0.2 + 0.8 * area, np.exp((2 * ratio - 1) * np.log(4 / 3))
    height = min(size, round(size * (area / ratio) ** 0.5))
    width = min(size, round(size * (area * ratio) ** 0.5))
    top, left = int(top * (size - height + 1)), int(left * (size - width + 1))
    black = torch.full_like(image, -1)
    box = (slice(None), slice(top, top + height), slice(left, left + width))
    black[box] = image[box]
    return black


def lower_resolution(image: torch.Tensor, scale: float, down: float, up: float) -> torch.Tensor:
    side = round(image.shape[-1] * (0.2 + 0.8 * scale))
    ways = [tv.InterpolationMode(name) for name in ("nearest", "bilinear", "bicubic")]
    small = tv.resize(image, [side, side], interpolation=ways[int(3 * down)])
    return tv.resize(small, list(image.shape[1:]), interpolation=ways[int(3 * up)]).clamp(-1, 1)


def change_light(image: torch.Tensor, *factors: float) -> torch.Tensor:
    pixels = (image + 1) / 2
    adjustments = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for adjust, factor in zip(adjustments, factors, strict=True):
        pixels = adjust(pixels, 0.5 + float(factor))
    return pixels * 2 - 1
