"""Noise and samples of large tensors on a GPU, by a Triton kernel where it can run."""

from __future__ import annotations

import torch
from torch import Tensor

from bayeslayers.curvature.kernels.launch import LARGE, attempt, in_one_order, runs
from bayeslayers.distributions.noise import StandardNormal

_NAME = "draw"


def fits(mean: Tensor, *others: Tensor) -> bool:
    """Return whether a kernel can sample a tensor.

    Args:
        mean: The mean, or the memory of noise alone.
        *others: What else the kernel reads.
    """
    return (
        mean.numel() >= LARGE
        and all(x.dtype == torch.float32 for x in (mean, *others))
        and in_one_order(mean, *others)
        and runs(_NAME, mean, *others)
    )


def fill_unscaled_(normal: StandardNormal, out: Tensor) -> float:
    """Fill a tensor as `StandardNormal.fill_unscaled_` does; a large one on a GPU with the noise of `sample_`.

    Args:
        normal: Source of the noise.
        out: The tensor.
    """
    if fits(out):
        from_kernel = attempt(_NAME, lambda: _fill(normal, out))
        if from_kernel:
            return 1.0
    return normal.fill_unscaled_(out)


def sample_(
    out: Tensor, mean: Tensor, precision: Tensor, deviation: Tensor | None, noise: Tensor | None, normal: StandardNormal
) -> None:
    """Fill a tensor with a sample of a Gaussian for which `fits` holds.

    Args:
        out: The tensor.
        mean: Mean.
        precision: Precision.
        deviation: Standard deviation, if known.
        noise: Memory that keeps the noise; None if it is not needed.
        normal: Source of the noise.
    """
    spread, of_precision = (precision, True) if deviation is None else (deviation, False)
    if attempt(_NAME, lambda: _sample(out, mean, spread, of_precision, noise, normal)):
        return
    values = torch.empty_like(out) if noise is None else noise
    torch.addcmul(mean, normal.fill_(values), spread.rsqrt() if of_precision else spread, out=out)


def _fill(normal: StandardNormal, out: Tensor) -> bool:
    from bayeslayers.curvature.kernels import triton_draw

    with torch.cuda.device_of(out):
        triton_draw.fill(out, *normal.counters(triton_draw.counters(out.numel()), out.device))
    return True


def _sample(
    out: Tensor, mean: Tensor, spread: Tensor, of_precision: bool, noise: Tensor | None, normal: StandardNormal
) -> bool:
    from bayeslayers.curvature.kernels import triton_draw

    with torch.cuda.device_of(out):
        place = normal.counters(triton_draw.counters(out.numel()), out.device)
        triton_draw.sample(out, mean, spread, of_precision, noise, *place)
    return True
