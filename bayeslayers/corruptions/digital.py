"""What processing does to pictures: less contrast, elastic distortion, large pixels, lossy compression."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from bayeslayers.corruptions.fields import sampled_at, side, smooth_noise

_CELLS = 8  # across an image: regions that elastic distortion moves apart


def contrast(x: Tensor, level: float, generator: torch.Generator | None) -> Tensor:
    """Keep a share `level` of each channel's deviation from its mean over the image."""
    mean = x.mean((2, 3), keepdim=True)
    return mean + level * (x - mean)


def elastic_transform(x: Tensor, level: float, generator: torch.Generator | None) -> Tensor:
    """Stretch and compress small regions: each pixel moves by smooth noise, of `level` times the shorter side."""
    return sampled_at(x, level * side(x) * smooth_noise(x, 2, _CELLS, generator))


def pixelate(x: Tensor, level: float, generator: torch.Generator | None) -> Tensor:
    """Average over the cells of a grid that has `level` times as many rows and columns as the image."""
    down, across = (_cells(x, size, max(1, round(level * size))) for size in x.shape[-2:])
    return down @ x @ across


def _cells(like: Tensor, size: int, count: int) -> Tensor:
    """Return the matrix `(size, size)` that averages neighbours in `count` cells."""
    cell = torch.arange(size, device=like.device) * count // size
    same = (cell[:, None] == cell).to(like.dtype)
    return same / same.sum(1, keepdim=True)


def jpeg_compression(x: Tensor, level: float, generator: torch.Generator | None) -> Tensor:
    """Write images as JPEG of quality `level`, 1 to 100, and read them again."""
    from PIL import Image

    numbers = (255 * x).round().byte().cpu()
    found = torch.empty_like(numbers)
    for number, image in enumerate(numbers):
        stream = io.BytesIO()
        array = (image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy()
        Image.fromarray(array).save(stream, "JPEG", quality=round(level))
        pixels = bytearray(Image.open(stream).tobytes())
        found[number] = torch.frombuffer(pixels, dtype=torch.uint8).view(*image.shape[1:], -1).permute(2, 0, 1)
    return found.to(x) / 255
