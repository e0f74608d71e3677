"""A large tensor sampled in one pass: on a CPU in blocks that stay in the cache of a core, on a GPU by a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayeslayers.curvature.kernels import draw
from bayeslayers.curvature.op import is_eager
from bayeslayers.distributions.noise import BLOCK, SCALE, StandardNormal, in_blocks


def fits_blocks(mean: Tensor, precision: Tensor) -> bool:
    """Return whether `drawn` can sample a tensor: a large one, where neither vmap nor a compiler looks on."""
    if not in_blocks(mean):
        return draw.fits(mean, precision)
    return precision.dtype == mean.dtype and precision.is_contiguous() and is_eager()


def noise_scale(mean: Tensor) -> float:
    """Return what `drawn` divides the noise of a tensor by."""
    return SCALE if in_blocks(mean) else 1.0


def drawn(
    mean: Tensor, precision: Tensor, deviation: Tensor | None, noise: Tensor | None, normal: StandardNormal
) -> Tensor:
    """Return a sample, through which gradients reach the mean.

    Args:
        mean: Mean for which `fits_blocks` holds.
        precision: Its precision.
        deviation: Its standard deviation, if known.
        noise: Memory that keeps the noise divided by `noise_scale`; None if it is not needed.
        normal: Source of the noise.
    """

    def fill(out: Tensor) -> None:
        if not in_blocks(out):
            draw.sample_(out, mean.detach(), precision, deviation, noise, normal)
            return
        memory = out.new_empty(2, BLOCK)
        known = precision if deviation is None else deviation
        parts = [x.detach().view(-1).split(BLOCK) for x in (out, mean, known, out if noise is None else noise)]
        for sample, center, scale, kept in zip(*parts, strict=True):
            values = memory[0, : len(sample)] if noise is None else kept
            normal.fill_block_(values)
            if deviation is None:
                scale = torch.rsqrt(scale, out=memory[1, : len(sample)])
            torch.addcmul(center, values, scale, value=SCALE, out=sample)

    return _Sample.apply(mean, fill)  # pyright: ignore[reportReturnType]


class _Sample(torch.autograd.Function):
    """A tensor that a function fills, and whose gradient is that of the mean."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, fill: Callable[[Tensor], None]) -> Tensor:
        out = torch.empty_like(mean)
        fill(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None
