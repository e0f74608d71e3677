"""Blur of a lens, of frosted glass, of a moving camera, and of one that approaches.

Lengths are shares of the shorter side of the images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.corruptions.fields import sampled_at, side, uniform

_ZOOMS = 9  # pictures that zoom blur averages


def defocus_blur(x: Tensor, level: float, generator: torch.Generator | None) -> Tensor:
    """Average over a disc of radius `level`, as a lens out of focus does."""
    return filtered(x, _disc(x, level * side(x)).expand(len(x), -1, -1))


def glass_blur(x: Tensor, level: float, generator: torch.Generator | None) -> Tensor:
    """Take each pixel from a random place up to `level` away in each direction, then blur: frosted glass."""
    reach = level * side(x)
    moved = reach * (2 * uniform((len(x), 2, *x.shape[-2:]), x, generator) - 1)
    return filtered(sampled_at(x, moved.round()), _disc(x, max(0.75, reach / 2)).expand(len(x), -1, -1))


def motion_blur(x: Tensor, level: float, generator: torch.Generator | None) -> Tensor:
    """Average along a line of length `level`, in a random direction per image."""
    return streaked(x, level, math.pi * uniform((len(x),), x, generator))


def zoom_blur(x: Tensor, level: float, generator: torch.Generator | None) -> Tensor:
    """Average over zooms from 1 to `1 + level`, as a camera that approaches does."""
    zooms = torch.linspace(1, 1 + level, _ZOOMS, dtype=x.dtype).tolist()
    total = torch.zeros_like(x)
    for zoom in zooms:
        grid = F.affine_grid(x.new_tensor([[1 / zoom, 0, 0], [0, 1 / zoom, 0]])[None], [1, *x.shape[1:]], False)
        total += F.grid_sample(x, grid.expand(len(x), -1, -1, -1), padding_mode="border", align_corners=False)
    return total / len(zooms)


def streaked(x: Tensor, length: float, angle: Tensor) -> Tensor:
    """Return images averaged along lines.

    Args:
        x: Images `(n, c, h, w)`.
        length: Length of the lines, as a share of the shorter side.
        angle: Their direction per image, `(n,)`, in radians from the horizontal.
    """
    half = length * side(x) / 2
    reach = math.ceil(half)
    along = torch.linspace(-half, half, 4 * reach + 1, dtype=x.dtype, device=x.device)
    pixels = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    # Each point of a line is shared among the four pixels around it: (n, point, pixel) down and across.
    down, across = (
        (1 - (pixels - (along * part[:, None])[..., None]).abs()).clamp_min(0) for part in (angle.sin(), angle.cos())
    )
    return filtered(x, torch.einsum("npi,npj->nij", down, across))


def filtered(x: Tensor, kernels: Tensor) -> Tensor:
    """Return images `(n, c, h, w)` filtered by a kernel for each, `(n, k, k)` with k odd, which sums to 1 after it.

    Borders are mirrored.
    """
    n, c = x.shape[:2]
    kernels = kernels / kernels.sum((1, 2), keepdim=True)
    padded = F.pad(x, [kernels.shape[-1] // 2] * 4, mode="reflect").flatten(0, 1)[None]
    return F.conv2d(padded, kernels.repeat_interleave(c, 0)[:, None], groups=n * c).view_as(x)


def _disc(like: Tensor, radius: float) -> Tensor:
    """Return the share of each pixel that lies in a disc, `(k, k)`, by 7 x 7 points in each."""
    reach = math.ceil(radius - 0.5)
    points = (torch.arange(7 * (2 * reach + 1), dtype=like.dtype, device=like.device) + 0.5) / 7 - reach - 0.5
    inside = (points[:, None].square() + points.square() <= radius**2).to(like.dtype)
    return F.avg_pool2d(inside[None], 7)[0]
