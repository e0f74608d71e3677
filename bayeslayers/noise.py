"""Standard normal noise at the lowest cost: on a CPU it is the dearest part of drawing a weight."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_FEW = 2**13  # values below which `normal_` is as fast
_BLOCK = 2**16  # values that stay in the cache from the first operation to the last


def fill_standard_normal_(out: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill a tensor with standard normal values.

    For many float32 values on a CPU this inverts the distribution function at uniform values of 24
    bits, the resolution of float32 and of `Tensor.normal_`. The bits come from NumPy's SFC64, seeded
    by one word of the generator: 0.4 of the time of `normal_`, whose Mersenne twister makes one
    word at a time. Elsewhere it is `normal_`.

    Args:
        out: Tensor to fill.
        generator: Source of randomness on the tensor's device; torch's default one if None.
    """
    if out.device.type != "cpu" or out.dtype != torch.float32 or out.numel() < _FEW or not out.is_contiguous():
        return out.normal_(generator=generator)
    source = np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_(generator=generator)))
    for block in out.view(-1).split(_BLOCK):
        words = torch.from_numpy(source.random_raw((len(block) + 1) // 2).view(np.int32))
        # The factor keeps the largest word, which float32 rounds up to 2^31, below 1.
        uniform = block.copy_(words[: len(block)]).mul_(2**-31 * (1 - 2**-24))
        uniform.erfinv_().mul_(math.sqrt(2))
    return out
