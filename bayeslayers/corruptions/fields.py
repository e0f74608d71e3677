"""Random fields over images, which blurs, weather and distortions are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def side(x: Tensor) -> int:
    """Return the shorter side of images `(n, c, h, w)`, in pixels: the unit of every length of a corruption."""
    return min(x.shape[-2:])


def normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal noise with the dtype and the device of a tensor."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def uniform(shape: tuple[int, ...] | torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return uniform noise in [0, 1) with the dtype and the device of a tensor."""
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)


def smooth_noise(x: Tensor, channels: int, cells: int, generator: torch.Generator | None) -> Tensor:
    """Return normal noise on a grid of `cells` by `cells`, interpolated to `(n, channels, h, w)` of the images."""
    coarse = normal((len(x), channels, cells, cells), x, generator)
    return F.interpolate(coarse, x.shape[-2:], mode="bicubic", align_corners=True)


def plasma(x: Tensor, roughness: float, generator: torch.Generator | None) -> Tensor:
    """Return a fractal per image, `(n, 1, h, w)`, from 0 to 1: noise on grids of 3, 5, 9, ... cells.

    Args:
        x: Images, for the size.
        roughness: Amplitude of a grid relative to that of twice its cell size, in (0, 1).
        generator: Source of the noise.
    """
    total, cells, amplitude = x.new_zeros(len(x), 1, *x.shape[-2:]), 3, 1.0
    while cells <= max(x.shape[-2:]):
        total += amplitude * smooth_noise(x, 1, cells, generator)
        cells, amplitude = 2 * cells - 1, roughness * amplitude
    low, high = total.amin((1, 2, 3), keepdim=True), total.amax((1, 2, 3), keepdim=True)
    return (total - low) / (high - low)


def sampled_at(x: Tensor, moved: Tensor) -> Tensor:
    """Return images whose pixel at p shows what lies at p + moved; beyond the border, they are mirrored.

    Args:
        x: Images `(n, c, h, w)`.
        moved: Displacement in pixels, `(n, 2, h, w)`: across, then down.
    """
    height, width = x.shape[-2:]
    down, across = (torch.arange(size, dtype=x.dtype, device=x.device) for size in (height, width))
    grid = torch.stack([(across + moved[:, 0]) / width, (down[:, None] + moved[:, 1]) / height], -1)
    grid = 2 * grid + x.new_tensor([1 / width, 1 / height]) - 1  # the centre of pixel 0 lies half a pixel inside
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
