"""Triton kernels: standard normal noise, and a sample of a Gaussian, in one pass over its memory.

Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (Philox 4x32 with ten rounds); Box and Muller
1958. Each counter gives four values; they reach sqrt(-2 log(1e-7)) = 5.7.
"""

# pyright: reportArgumentType=false
# A parameter of type `tl.constexpr` takes a plain value.

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_COUNTERS = 512  # of a program, which makes four times as many values


@triton.jit
def _write(
    part: tl.constexpr, noise, mean, spread, sample, kept, size,
    OF_PRECISION: tl.constexpr, SAMPLES: tl.constexpr, KEEPS: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """Write one of the four values of each counter: those of a program lie in four runs, one after the other."""
    places = (tl.program_id(0).to(tl.int64) * 4 + part) * COUNTERS + tl.arange(0, COUNTERS)
    own = places < size
    if KEEPS:
        tl.store(kept + places, noise, mask=own)
    if SAMPLES:
        scale = tl.load(spread + places, mask=own, other=1.0)
        if OF_PRECISION:
            scale = 1.0 / tl.sqrt(scale)
        tl.store(sample + places, tl.load(mean + places, mask=own, other=0.0) + noise * scale, mask=own)


@triton.jit(do_not_specialize=["offset"])
def draw_kernel(
    mean, spread, sample, kept, seed, offset, size,
    OF_PRECISION: tl.constexpr, SAMPLES: tl.constexpr, KEEPS: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """Sample mean + noise / sqrt(precision), with the noise of the counters from `offset` on.

    The seed is loaded here, so that the processor never waits for the GPU.
    """
    counters = offset + tl.program_id(0).to(tl.int64) * COUNTERS + tl.arange(0, COUNTERS)
    a, b, c, d = tl.randn4x(tl.load(seed), counters)
    _write(0, a, mean, spread, sample, kept, size, OF_PRECISION, SAMPLES, KEEPS, COUNTERS)
    _write(1, b, mean, spread, sample, kept, size, OF_PRECISION, SAMPLES, KEEPS, COUNTERS)
    _write(2, c, mean, spread, sample, kept, size, OF_PRECISION, SAMPLES, KEEPS, COUNTERS)
    _write(3, d, mean, spread, sample, kept, size, OF_PRECISION, SAMPLES, KEEPS, COUNTERS)


def counters(size: int) -> int:
    """Return how many counters the programs of so many values use.

    Args:
        size: Number of values.
    """
    return triton.cdiv(size, 4 * _COUNTERS) * _COUNTERS


def fill(noise: Tensor, seed: Tensor, offset: int) -> None:
    """Fill a tensor with standard normal values.

    Args:
        noise: The tensor, whose memory is filled in its order.
        seed: A number on its device.
        offset: The first counter.
    """
    _launch(noise, noise, noise, noise, seed, offset, OF_PRECISION=False, SAMPLES=False, KEEPS=True)


def sample(
    out: Tensor, mean: Tensor, spread: Tensor, of_precision: bool, noise: Tensor | None, seed: Tensor, offset: int
) -> None:
    """Fill a tensor with a sample of a Gaussian.

    Args:
        out: The tensor.
        mean: Its mean, which fills its memory in the same order, as all of them do.
        spread: Its precision or its standard deviation.
        of_precision: Whether it is the precision.
        noise: Memory that keeps the noise; None if it is not needed.
        seed: A number on their device.
        offset: The first counter.
    """
    kept = out if noise is None else noise
    _launch(mean, spread, out, kept, seed, offset, OF_PRECISION=of_precision, SAMPLES=True, KEEPS=noise is not None)


def _launch(mean: Tensor, spread: Tensor, out: Tensor, kept: Tensor, seed: Tensor, offset: int, **flags: Any) -> None:
    size = out.numel()
    grid = (triton.cdiv(size, 4 * _COUNTERS),)
    flags["COUNTERS"] = _COUNTERS
    draw_kernel[grid](mean, spread, out, kept, seed, offset, size, **flags)
