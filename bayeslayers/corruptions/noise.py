"""Noise of a sensor: of its electronics, of few photons, of dead pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from bayeslayers.corruptions.fields import normal, uniform


def gaussian_noise(x: Tensor, level: float, generator: torch.Generator | None) -> Tensor:
    """Add normal noise of standard deviation `level`, as in low light."""
    return x + level * normal(tuple(x.shape), x, generator)


def shot_noise(x: Tensor, level: float, generator: torch.Generator | None) -> Tensor:
    """Count photons, of which a white pixel sends `1 / level` on average: Poisson noise, stronger where it is light."""
    return level * torch.poisson(x / level, generator=generator)


def impulse_noise(x: Tensor, level: float, generator: torch.Generator | None) -> Tensor:
    """Set a share `level` of the values to 0 or 1: salt and pepper."""
    chance = uniform(x.shape, x, generator)
    return torch.where(chance < level, (chance < level / 2).to(x.dtype), x)
