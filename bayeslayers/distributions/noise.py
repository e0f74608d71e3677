"""Standard normal noise, which on a CPU is the main cost of sampling a weight."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

_FEW = 2**16  # values below which `normal_` is as fast
BLOCK = 2**16  # values at a time, which stay in a cache with their random words
SCALE = math.sqrt(2)  # of the inverse error function of a uniform value


class StandardNormal:
    """A stream of standard normal values.

    For many float32 values on a CPU it inverts the distribution function at uniform values of 24
    bits, the resolution of float32 and of `Tensor.normal_`. The bits come from NumPy's SFC64, which one
    word of the generator seeds. On one thread it takes as long as `normal_`: 60 % of it is the inverse, 25 % are the
    bits. In all other cases it calls `normal_`.

    Args:
        generator: Source of randomness on the device of the tensors; torch's default one if None.
    """

    def __init__(self, generator: torch.Generator | None = None):
        self.generator = generator

    @functools.cached_property
    def _words(self) -> np.random.SFC64:
        return np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_(generator=self.generator)))

    def fill_(self, out: Tensor) -> Tensor:
        """Fill a tensor with the next values."""
        return out.mul_(self.fill_unscaled_(out))

    def fill_unscaled_(self, out: Tensor) -> float:
        """Fill a tensor with the next values divided by a factor, and return the factor; this saves a pass."""
        if not inverts(out):
            out.normal_(generator=self.generator)
            return 1.0
        for block in out.view(-1).split(BLOCK):
            self.fill_block_(block)
        return SCALE

    def fill_block_(self, block: Tensor) -> None:
        """Fill a flat block of up to `BLOCK` values with the next ones divided by `SCALE`.

        Args:
            block: The next block of a tensor for which `inverts` holds.
        """
        words = torch.from_numpy(self._words.random_raw((len(block) + 1) // 2).view(np.int32))
        # The factor keeps the largest word, which float32 rounds up to 2^31, below 1.
        block.copy_(words[: len(block)]).mul_(2**-31 * (1 - 2**-24)).erfinv_()


def inverts(out: Tensor) -> bool:
    """Return whether the values of a tensor are made by inverting the distribution function, block by block."""
    return out.device.type == "cpu" and out.dtype == torch.float32 and out.numel() >= _FEW and out.is_contiguous()
