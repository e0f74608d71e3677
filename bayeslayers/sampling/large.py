"""A large tensor sampled by a kernel, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayeslayers.curvature.kernels.draw import StandardNormal


def drawn(
    mean: Tensor, precision: Tensor, deviation: Tensor | None, noise: Tensor | None, normal: StandardNormal
) -> Tensor:
    """Return a sample, through which gradients reach the mean.

    Args:
        mean: Mean for which `draw.fits` holds.
        precision: Its precision.
        deviation: Its standard deviation, if known.
        noise: Memory that keeps the noise; None if it is not needed.
        normal: Source of the noise.
    """
    return _Sample.apply(mean, precision, deviation, noise, normal)  # pyright: ignore[reportReturnType]


class _Sample(torch.autograd.Function):
    """A sample, whose gradient is that of the mean."""

    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        precision: Tensor,
        deviation: Tensor | None,
        noise: Tensor | None,
        normal: StandardNormal,
    ) -> Tensor:
        out = torch.empty_like(mean)
        normal.sample_(out, mean, precision, deviation, noise)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None, None, None
