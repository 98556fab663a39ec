"""uint8 images to what the networks read, the same in training and evaluation."""

import cv2
import torch


def mirror(x: torch.Tensor) -> torch.Tensor:
    """Flip (B, 3, H, W) images left to right."""
    return x.flip(-1)


def to_input(
    images: torch.Tensor,
    flip: torch.Tensor | None = None,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Turn uint8 images into what the networks read, on the device they lie on.

    ``images``: (B, H, W, 3) uint8 RGB. ``flip``: (B,) bool on the same device, True mirrors that
    image. Returns (B, 3, H, W), (x / 255 - 0.5) / 0.5 in [-1, 1], computed in float32; ``dtype``
    bfloat16 rounds that. Raises TypeError for images of another dtype: floats in 0…1 would
    otherwise give plausible, wrong features.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, not {images.dtype}")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if images.device.type == "cpu":
        return look_up(images, flip, dtype).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    if flip is not None:
        images = torch.where(flip[:, None, None, None], images.flip(2), images)
    return normalise(images.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)).to(dtype)


def normalise(x: torch.Tensor) -> torch.Tensor:
    """float32 0 ... 255 to [-1, 1], in place."""
    return x.div_(255).sub_(0.5).div_(0.5)


def look_up(images: torch.Tensor, flip: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """``normalise`` on a CPU: (B, H, W, 3) uint8 to ``dtype`` through a table of its 256 values,
    image by image in the cache: a quarter of the time, the same bits.
    """
    table = normalise(torch.arange(256, dtype=torch.float32)).to(dtype)
    x = torch.empty(images.shape, dtype=dtype)
    # NumPy does not know bfloat16: its bits
    known = torch.int16 if dtype == torch.bfloat16 else dtype
    table, rows = table.view(known).numpy(), x.view(known).numpy()
    flips = [False] * len(images) if flip is None else flip.tolist()
    for image, out, mirrored in zip(images.numpy(), rows, flips, strict=True):
        cv2.LUT(cv2.flip(image, 1) if mirrored else image, table, dst=out)
    return x
