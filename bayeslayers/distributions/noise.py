"""Standard normal noise, which on a CPU is the main cost of sampling a weight."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

_FEW = 2**13  # values below which `normal_` is as fast
BLOCK = 2**16  # values at a time, which stay in a cache with their random words
SCALE = math.sqrt(2)  # of the values that `fill_block_` writes


class StandardNormal:
    """A stream of standard normal values.

    Many float32 values on a CPU come in pairs r cos(a), r sin(a) from NumPy, whose functions use the vector units of
    the core: on one thread in three fifths of the time of `normal_`. The bits come from NumPy's SFC64, which three
    words of the generator seed, 32 for a pair: 23 for u in r = sqrt(-2 log(u)), so that values reach 5.8, and 9 more
    for a. Given u, a is one of 512 equidistant angles, so all moments of a pair of order below 512 are those of
    continuous angles. In all other cases it calls `normal_`.

    Source: Box and Muller 1958, A note on the generation of random normal deviates.

    Args:
        generator: Source of randomness on the device of the tensors; torch's default one if None.
    """

    def __init__(self, generator: torch.Generator | None = None):
        self.generator = generator
        self._seed: Tensor | None = None
        self._counters = 0

    @functools.cached_property
    def _words(self) -> np.random.SFC64:
        seed = _Seed(torch.empty(3, dtype=torch.int64).random_(generator=self.generator))
        return np.random.SFC64(seed)  # pyright: ignore[reportArgumentType]

    def fill_(self, out: Tensor) -> Tensor:
        """Fill a tensor with the next values."""
        return out.mul_(self.fill_unscaled_(out))

    def fill_unscaled_(self, out: Tensor) -> float:
        """Fill a tensor with the next values divided by a factor, and return the factor; this saves a pass."""
        if not in_blocks(out):
            out.normal_(generator=self.generator)
            return 1.0
        for block in out.view(-1).split(BLOCK):
            self.fill_block_(block)
        return SCALE

    def counters(self, count: int, device: torch.device) -> tuple[Tensor, int]:
        """Return a seed, and the first of the next counters that a kernel makes noise from on a GPU.

        The seed is drawn on the device and stays there: one word of the generator for all counters of this stream.

        Args:
            count: Number of counters.
            device: Of the kernel.
        """
        if self._seed is None or self._seed.device != device:
            self._seed = torch.empty((), dtype=torch.int64, device=device).random_(generator=self.generator)
        first, self._counters = self._counters, self._counters + count
        return self._seed, first

    def fill_block_(self, block: Tensor) -> None:
        """Fill a flat block of up to `BLOCK` values with the next ones divided by `SCALE`.

        Args:
            block: The next block of a tensor for which `in_blocks` holds.
        """
        count = (len(block) + 1) // 2
        words = self._words.random_raw((count + 1) // 2).view(np.int32)[:count]
        radius, angle = np.left_shift(words, 9).astype(np.float32), words.astype(np.float32)
        np.add(np.multiply(radius, 2**-32, out=radius), 0.5 + 2**-24, out=radius)  # in (0, 1)
        np.sqrt(np.negative(np.log(radius, out=radius), out=radius), out=radius)
        np.multiply(angle, math.pi * 2**-31, out=angle)
        values = block.numpy()
        np.multiply(np.cos(angle, out=values[:count]), radius, out=values[:count])
        rest = len(block) - count
        np.multiply(np.sin(angle, out=angle)[:rest], radius[:rest], out=values[count:])


class _Seed(ISeedSequence):
    """Random words as a seed. NumPy would hash them, as if they were poor, which takes as long as 5,000 values."""

    def __init__(self, words: Tensor):
        self._words = words

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> np.ndarray:
        return self._words.numpy().view(np.uint64)


def in_blocks(out: Tensor) -> bool:
    """Return whether the values of a tensor are made block by block, in pairs."""
    return out.device.type == "cpu" and out.dtype == torch.float32 and out.numel() >= _FEW and out.is_contiguous()
