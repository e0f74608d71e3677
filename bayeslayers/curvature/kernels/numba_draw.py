"""Numba kernels: standard normal noise, and a sample of a Gaussian, in one pass over memory.

Each counter gives four words of 32 bits, each word a pair of values r cos(a), r sin(a): 23 of its bits are u in
r = sqrt(-2 log(u)), so that values reach 5.8, and all 32 are a. Given u, a is one of 512 equidistant angles, so all
moments of a pair of order below 512 are those of continuous angles. Loops are short and without calls, for the
compiler to turn them into vector instructions; a value takes a fifth of the time of torch's `normal_`.

Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (Philox 4x32 with ten rounds); Box and Muller
1958, A note on the generation of random normal deviates. The coefficients of the logarithm, sine and cosine are those
of Moshier's Cephes library for single precision (netlib.org/cephes).
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# Numba's types of numbers are those of the machine: each operation on 32 bits must say that its result has 32 bits.

from __future__ import annotations

import math

import numpy as np
from numpy import float32, int32, uint32, uint64
from torch import Tensor

from bayeslayers.curvature.kernels.numba_jit import floats, in_parts, jit, places

_COUNTERS = 256  # at a time, whose words and values stay in the first cache
_VALUES = 8 * _COUNTERS


@jit
def _words(key, first, words):
    """Write the four words of each counter from `first` on."""
    for i in range(_COUNTERS):
        counter = first + uint64(i)
        c0, c1, c2, c3 = uint32(counter), uint32(counter >> uint64(32)), uint32(0), uint32(0)
        k0, k1 = uint32(key), uint32(key >> uint64(32))
        for _ in range(10):
            low, high = uint64(c0) * uint64(0xD2511F53), uint64(c2) * uint64(0xCD9E8D57)
            c0, c1 = uint32(uint32(high >> uint64(32)) ^ c1 ^ k0), uint32(high)
            c2, c3 = uint32(uint32(low >> uint64(32)) ^ c3 ^ k1), uint32(low)
            k0, k1 = uint32(k0 + uint32(0x9E3779B9)), uint32(k1 + uint32(0xBB67AE85))
        words[0, i], words[1, i], words[2, i], words[3, i] = int32(c0), int32(c1), int32(c2), int32(c3)


@jit
def _minus_log(u):
    """Return -log(u) of a normal number u > 0."""
    bits = int32(float32(u).view(int32))
    exponent = int32(int32(bits - int32(0x3F3504F3)) >> int32(23))  # of the power of two next to u
    x = int32(bits - int32(exponent << int32(23))).view(float32) - float32(1)
    y = float32(7.0376836292e-2) * x - float32(1.1514610310e-1)
    y = y * x + float32(1.1676998740e-1)
    y = y * x - float32(1.2420140846e-1)
    y = y * x + float32(1.4249322787e-1)
    y = y * x - float32(1.6668057665e-1)
    y = y * x + float32(2.0000714765e-1)
    y = y * x - float32(2.4999993993e-1)
    y = y * x + float32(3.3333331174e-1)
    square = x * x
    return -(float32(exponent) * float32(math.log(2)) + (x + square * (y * x - float32(0.5))))


@jit
def _cosine_and_sine(word):
    """Return those of the angle pi word / 2^31."""
    quarter = int32(int32(word + int32(1 << 29)) >> int32(30))
    x = float32(int32(word - int32(quarter << int32(30)))) * float32(math.pi / 2**31)
    z = x * x
    sine = ((float32(-1.9515295891e-4) * z + float32(8.3321608736e-3)) * z - float32(1.6666654611e-1)) * z * x + x
    y = (float32(2.443315711809948e-5) * z - float32(1.388731625493765e-3)) * z + float32(4.166664568298827e-2)
    cosine = y * z * z - float32(0.5) * z + float32(1)
    turned = (quarter & int32(1)) != 0
    a, b = sine if turned else cosine, cosine if turned else sine
    sign_a = int32(int32(int32(quarter + int32(1)) & int32(2)) << int32(30))
    sign_b = int32(int32(quarter & int32(2)) << int32(30))
    return (
        int32(float32(a).view(int32) ^ sign_a).view(float32),
        int32(float32(b).view(int32) ^ sign_b).view(float32),
    )


@jit
def _pairs(words, values):
    """Write the two values of each word."""
    for i in range(len(words)):
        u = float32(int32(words[i] << int32(9))) * float32(2**-32) + float32(0.5 + 2**-24)  # in (0, 1)
        radius = math.sqrt(float32(2) * _minus_log(u))
        cosine, sine = _cosine_and_sine(int32(words[i]))
        values[0, i] = radius * cosine
        values[1, i] = radius * sine


@jit
def _block(words, values, key, first):
    """Write the values of so many counters."""
    _words(key, first, words)
    for j in range(4):
        _pairs(words[j], values[j])


@jit
def _copy(values, out):
    for i in range(len(out)):
        out[i] = values[i]


@jit
def _fill(out, size, key, first):
    out = floats(out, size)
    words, values = np.empty((4, _COUNTERS), np.int32), np.empty((4, 2, _COUNTERS), np.float32)
    for start in range(0, len(out), _VALUES):
        _block(words, values, uint64(key), uint64(first + start // 8))
        _copy(values.reshape(_VALUES), out[start : start + _VALUES])


@jit
def _add(out, mean, spread, noise, of_precision):
    """Write mean + noise * spread, or mean + noise / sqrt(spread)."""
    if of_precision:
        for i in range(len(out)):
            out[i] = mean[i] + noise[i] / math.sqrt(spread[i])
    else:
        for i in range(len(out)):
            out[i] = mean[i] + noise[i] * spread[i]


@jit
def _sample(out, mean, spread, kept, of_precision, size, key, first):
    out, mean, spread = floats(out, size), floats(mean, size), floats(spread, size)
    kept = floats(kept, size if kept else 0)
    words, values = np.empty((4, _COUNTERS), np.int32), np.empty((4, 2, _COUNTERS), np.float32)
    for start in range(0, len(out), _VALUES):
        stop, noise = start + _VALUES, values.reshape(_VALUES)
        _block(words, values, uint64(key), uint64(first + start // 8))
        _add(out[start:stop], mean[start:stop], spread[start:stop], noise, of_precision)
        _copy(noise, kept[start:stop])


def counters(size: int) -> int:
    """Return how many counters the kernels use for so many values.

    Args:
        size: Number of values.
    """
    return math.ceil(size / _VALUES) * _COUNTERS


def fill(noise: Tensor, seed: Tensor, offset: int) -> None:
    """Fill a tensor with standard normal values.

    Args:
        noise: The tensor, whose memory is filled in its order.
        seed: A number.
        offset: The first counter.
    """
    key = seed.item()

    def run(start: int, count: int) -> None:
        _fill(*places((noise,), start), count, key, offset + start // 8)

    in_parts(noise.numel(), run, _VALUES)


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
        seed: A number.
        offset: The first counter.
    """
    tensors, key = (out, mean, spread, noise), seed.item()

    def run(start: int, count: int) -> None:
        _sample(*places(tensors, start), of_precision, count, key, offset + start // 8)

    in_parts(out.numel(), run, _VALUES)
