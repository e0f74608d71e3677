"""Standard normal noise and samples: of large tensors by a kernel, where one can run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayeslayers.curvature.kernels.launch import attempt, kernels_of, takes

_NAME = "draw"


class StandardNormal:
    """A stream of standard normal values.

    Those of a large float32 tensor come from a kernel: from counters that Philox turns into random words, and a key
    that is one word of the generator for all counters of this stream. It stays on its device, so that no GPU is waited
    for. All other values come from `normal_`.

    Args:
        generator: Source of randomness on the device of the tensors; torch's default one if None.
    """

    def __init__(self, generator: torch.Generator | None = None):
        self.generator = generator
        self._key: Tensor | None = None
        self._counters = 0

    def fill_(self, out: Tensor) -> Tensor:
        """Fill a tensor with the next values."""
        if not (fits(out) and attempt(_NAME, out, lambda: self._fill(out))):
            out.normal_(generator=self.generator)
        return out

    def sample_(
        self, out: Tensor, mean: Tensor, precision: Tensor, deviation: Tensor | None, noise: Tensor | None
    ) -> None:
        """Fill a tensor with a sample of a Gaussian.

        Args:
            out: The tensor.
            mean: Mean.
            precision: Precision.
            deviation: Standard deviation, if known.
            noise: Memory that keeps the noise; None if it is not needed.
        """
        spread, of_precision = (precision, True) if deviation is None else (deviation, False)
        kept = [] if noise is None else [noise]
        if fits(out, mean, spread, *kept) and attempt(
            _NAME, out, lambda: self._sample(out, mean, spread, of_precision, noise)
        ):
            return
        values = self.fill_(torch.empty_like(out) if noise is None else noise)
        torch.addcmul(mean, values, (spread.rsqrt() if of_precision else spread).to(mean.dtype), out=out)

    def _fill(self, out: Tensor) -> bool:
        module = kernels_of("draw", out)
        with torch.cuda.device_of(out):
            module.fill(out, *self._place(module, out))
        return True

    def _sample(self, out: Tensor, mean: Tensor, spread: Tensor, of_precision: bool, noise: Tensor | None) -> bool:
        module = kernels_of("draw", out)
        with torch.cuda.device_of(out):
            module.sample(out, mean, spread, of_precision, noise, *self._place(module, out))
        return True

    def _place(self, module: Any, out: Tensor) -> tuple[Tensor, int]:
        """Return the key, and the first of the next counters, for a tensor."""
        if self._key is None or self._key.device != out.device:
            self._key = torch.empty((), dtype=torch.int64, device=out.device).random_(generator=self.generator)
        first, self._counters = self._counters, self._counters + module.counters(out.numel())
        return self._key, first


def fits(mean: Tensor, *others: Tensor) -> bool:
    """Return whether a kernel can sample a tensor.

    Args:
        mean: The mean, or the memory of noise alone.
        *others: What else the kernel reads.
    """
    return takes(_NAME, (mean, *others))
