"""Weather, all of it drawn here: snow, frost, fog, and the light of the day."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayeslayers.corruptions.blur import streaked
from bayeslayers.corruptions.fields import plasma, side, smooth_noise, uniform

_ICE = (0.85, 0.93, 1.0)  # the colour of ice on a picture in colour


def snow(x: Tensor, level: float, generator: torch.Generator | None) -> Tensor:
    """Whiten images, and let flakes fall across them in one direction per image.

    Args:
        x: Images.
        level: Weight of the white, in (0, 1); the flakes become more and larger with it.
        generator: Source of the flakes and of their direction.
    """
    angle = math.pi * (0.25 + 0.5 * uniform((len(x),), x, generator))
    cells = round(6 * side(x) ** 0.5)  # of a pixel in images of 36 pixels, finer ones in larger images
    flakes = (smooth_noise(x, 1, cells, generator) - 1.6 + 2 * level).clamp(0, 1)
    flakes = (2.5 * streaked(flakes, 3 / cells, angle)).clamp_max(0.95)
    grey = x.mean(1, keepdim=True)
    pale = x + level * (0.4 + 0.6 * grey - x)
    return 1 - (1 - pale) * (1 - flakes)


def frost(x: Tensor, level: float, generator: torch.Generator | None) -> Tensor:
    """Cover images with ice, thickest at the border and along crystals: the ridges of a fractal.

    Args:
        x: Images.
        level: Opacity of the ice at the border, in (0, 1).
        generator: Source of the crystals.
    """
    crystals = (1 - (2 * plasma(x, 0.75, generator) - 1).abs()).pow(3)
    height, width = (torch.linspace(-1, 1, size, dtype=x.dtype, device=x.device) for size in x.shape[-2:])
    border = torch.maximum(height.abs()[:, None], width.abs()).square()
    cover = level * (0.35 + 0.65 * border) * (0.4 + 0.6 * crystals)
    colour = x.new_tensor(_ICE if x.shape[1] == 3 else _ICE[-1:])[:, None, None]
    return x + cover * (colour * (0.7 + 0.3 * crystals) - x)


def fog(x: Tensor, level: float, generator: torch.Generator | None) -> Tensor:
    """Mix images with a fractal of fog whose weight is `level` to 1."""
    return (x + level * plasma(x, 0.55, generator)) / (1 + level)


def brightness(x: Tensor, level: float, generator: torch.Generator | None) -> Tensor:
    """Add `level` to the value of each colour, its largest channel; hue and saturation stay, and black becomes grey."""
    value = x.amax(1, keepdim=True)
    raised = (value + level).clamp_max(1)
    return torch.where(value > 0, x * raised / value.clamp_min(1e-6), raised)
