"""Curvature of batch normalisation, from the kernels that torch has for the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from bayeslayers.curvature.accumulate import chunks, sum_of_squares
from bayeslayers.curvature.rule import CurvatureRule, Tensors, Use


@dataclass
class Normalisation:
    """What one call of batch normalisation takes beside its input, scale and shift, and what its forward finds.

    Attributes:
        running_mean: Running means, `(c,)`, or None.
        running_var: Running variances, `(c,)`, or None.
        training: Whether the statistics are those of the batch, and move the running ones.
        momentum: Of the running ones.
        eps: Added to the variance.
        mean: Means that the forward subtracted.
        rstd: Inverse standard deviations that it multiplied by.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float
    mean: Any = None
    rstd: Any = None


class _BatchNorm(CurvatureRule):
    """Batch normalisation of `(n, c, *)` with scale and shift `(c,)`; the settings are a `Normalisation` of one call.

    As under `AFFINE`, per-example gradients hold the normalised input fixed. That input is computed again from the
    mean, in tiles, so that the backward pass keeps the input alone, which torch keeps anyway.
    """

    tensors = ("weight", "bias")
    casts = False

    def forward(self, inputs: tuple[Tensor, ...], tensors: Any, settings: Normalisation) -> Tensor:
        own = settings
        y, own.mean, own.rstd = torch.ops.aten.native_batch_norm(
            inputs[0], *tensors, own.running_mean, own.running_var, own.training, own.momentum, own.eps
        )
        if not own.training and own.running_mean is not None and own.running_var is not None:
            own.mean, own.rstd = own.running_mean.clone(), (own.running_var + own.eps).rsqrt()
        return y

    def input_gradients(self, use: Use, g: Tensor) -> list[Tensor | None]:
        own: Normalisation = use.settings
        if not use.needs[0]:
            return [None]
        variance = None if own.training else own.rstd.square().reciprocal() - own.eps
        return [
            torch.ops.aten.native_batch_norm_backward(
                g, use.inputs[0], use.tensors[0], own.mean, variance, own.mean, own.rstd, own.training, own.eps,
                [True, False, False],
            )[0]
        ]  # fmt: skip

    def per_example(self, use: Use, g: Tensor) -> Tensors:
        (x,), own = use.inputs, cast(Normalisation, use.settings)
        mean = own.mean.reshape(-1, *[1] * (x.dim() - 2))
        scale = [_sum_positions((x[part] - mean).mul_(g[part])) for part in chunks(len(x), x[0].numel(), x)]
        shift = None if use.tensors[1] is None else _sum_positions(g)
        return torch.cat(scale) * own.rstd, shift

    def squares(self, use: Use, g: Tensor) -> Sequence[Tensor | None]:
        found: list[Tensor | None] = [None] * 4
        if any(use.needs[1:]):
            rows = self.per_example(use, g)
            found = [None if x is None else x.sum(0) for x in rows]
            found += [None if x is None else sum_of_squares(x) for x in rows]
        return (*self.input_gradients(use, g), *found)


BATCH_NORM = _BatchNorm()


def _sum_positions(x: Tensor) -> Tensor:
    return x.flatten(2).sum(2) if x.dim() > 2 else x
