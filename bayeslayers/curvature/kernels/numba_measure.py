"""Numba kernels: norms and the smallest value of what enters a step, from which its numbers are bounded."""

# pyright: reportArgumentType=false

from __future__ import annotations

import math
from functools import partial

import numpy as np
from numpy import float32, int32
from torch import Tensor

from bayeslayers.curvature.kernels.numba_jit import floats, in_parts, jit, places


@partial(jit, fastmath={"contract", "reassoc"})
def _squares(values):
    total = float32(0)
    for i in range(len(values)):
        total += values[i] * values[i]
    return total


@jit
def _extremes(bits):
    least, largest = int32(0x7FFFFFFF), int32(-0x80000000)
    for i in range(len(bits)):
        least = bits[i] if bits[i] < least else least
        largest = bits[i] if bits[i] > largest else largest
    return int32(least), int32(largest)


@jit
def _norm(address, size):
    return math.sqrt(_squares(floats(address, size)))


@jit
def _smallest(address, size):
    """Bits of values > 0 are in the order of these; those of negative ones are below them."""
    least, largest = _extremes(floats(address, size).view(np.int32))
    return int32(least).view(float32) if 0 < least and largest < int32(0x7F800000) else float32(0)


def norm(values: Tensor) -> float:
    """Return the Euclidean norm: infinite or NaN if a value is, or if a square is too large.

    Args:
        values: Any number, which fill their memory.
    """
    return math.hypot(*in_parts(values.numel(), lambda start, count: _norm(*places((values,), start), count)))


def smallest(values: Tensor) -> float:
    """Return the smallest of some values; 0 if one is not finite, or not above 0.

    Args:
        values: At least one, which fill their memory.
    """
    return min(in_parts(values.numel(), lambda start, count: _smallest(*places((values,), start), count)))
