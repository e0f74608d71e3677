"""Bounds on what a step makes, from norms: where they are far inside the range of numbers, nothing else is checked.

The norms stay on the device until all bounds of the step are known, and are read together. Where a bound is not small,
`guard` looks at the numbers themselves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from bayeslayers.curvature.kernels import measure
from bayeslayers.optim.bundle import Bundle
from bayeslayers.readings import Readings
from bayeslayers.sampling.flat import joined

_HEADROOM = 1e3  # between the bound and the largest number


def magnitudes(readings: Readings, *lists: Sequence[Tensor]) -> Callable[[], list[float]]:
    """Return what will give for each list of tensors a bound on the absolute values in it, 0 for an empty list.

    It is the largest Euclidean norm: on a CPU it takes a twentieth of the time of the largest value. It is infinite if
    a value is not finite.

    Args:
        readings: Where the norms wait.
        *lists: Tensors.
    """
    if (measured := measure.norms(lists)) is not None:
        known = [_largest(own) for own in measured]
        return lambda: known
    parts = [joined(tensors) for tensors in lists]
    norms = _norms([x for part in parts for x in part])
    values = readings.later([torch.stack(own) for own in norms.values()])

    @functools.cache
    def found() -> list[float]:
        by_kind, at = {}, 0
        for kind, own in norms.items():
            by_kind[kind], at = iter(values()[at : at + len(own)]), at + len(own)
        return [_largest([next(by_kind[x.dtype]) for x in part]) for part in parts]

    return found


def smallest(readings: Readings, tensors: Sequence[Tensor]) -> Callable[[], float]:
    """Return what will give the smallest value in tensors: 0 if one is not finite, infinity if there is none.

    Args:
        readings: Where the values wait.
        tensors: Tensors of values > 0.
    """
    tensors = [x for x in tensors if x.numel()]
    if (measured := measure.smallest(tensors)) is not None:
        return lambda: min(measured)
    values = readings.later([x.amin() for x in joined(tensors)])
    return lambda: min(found, default=math.inf) if math.isfinite(sum(found := values())) else 0.0


def _norms(tensors: Sequence[Tensor]) -> dict[torch.dtype, list[Tensor]]:
    """Return the Euclidean norms of tensors, in their order, by type."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    return {kind: list(torch._foreach_norm(own)) for kind, own in kinds.items()}  # pyright: ignore


def _largest(values: Sequence[float]) -> float:
    """Return the largest value, 0 if there is none, infinity if one is NaN, which `max` may pass over."""
    return max(values, default=0.0) if math.isfinite(sum(values)) else math.inf


class NaturalBounds:
    """Bounds on what enters a step m - lr (ess g + p0 (m - m0)) / p of bundles.

    Args:
        readings: Where they wait.
        bundles: Uncertain tensors that move, with their gradients g and what these are averaged with.
        precisions: Tensors of bounds below p.
        others: Further tensors of the bundles.
    """

    def __init__(
        self, readings: Readings, bundles: Sequence[Bundle], precisions: Sequence[Tensor], *others: Sequence[Tensor]
    ):
        self._magnitudes = magnitudes(
            readings,
            [each.mean for each in bundles],
            [each.prior_mean for each in bundles],
            [each.prior_precision for each in bundles],
            [x for each in bundles for x in (each.grad, *each.momenta)],
            *others,
        )
        self._least = smallest(readings, precisions)

    def least(self) -> float:
        """Return the bound below p."""
        return self._least()

    def prior(self) -> float:
        """Return the bound on p0."""
        return self._magnitudes()[2]

    def gradient(self) -> float:
        """Return the bound on g, and on what it is averaged with."""
        return self._magnitudes()[3]

    def others(self) -> list[float]:
        """Return the bounds on the further tensors."""
        return self._magnitudes()[4:]

    def reach(self, ess: float, lr: float, least: float | None = None) -> float:
        """Return the bound on the means after the step.

        Args:
            ess: Effective sample size.
            lr: Step size.
            least: Another bound below p.
        """
        least = self.least() if least is None else least
        mean, center, prior, gradient, *_ = self._magnitudes()
        return mean + lr * (ess * gradient + prior * (mean + center)) / least if least > 0 else math.inf


def retracted_bound(precision: float, least: float, target: float, weight: float) -> float:
    """Return a bound on `gaussian.retracted_precision`, and on what it computes on the way.

    Args:
        precision: Bound on the precisions.
        least: Bound below them.
        target: Bound on the targets.
        weight: Their weight.
    """
    if not least > 0:
        return math.inf
    rest = 1 + weight * target / least  # 1 - r
    return target + target / least + rest * rest * (1 + precision) + precision


def adam_ratio(beta1: float, beta2: float) -> float:
    """Return a bound on Adam's m / sqrt(v), which does not depend on the gradients (Cauchy-Schwarz).

    m_t^2 <= v_t (1 - beta1)^2 / ((1 - beta2) (1 - beta1^2 / beta2)),  before the correction of both
    """
    rest = (1 - beta2) * (1 - beta1**2 / beta2) if beta2 > 0 else 0.0
    return 1 / math.sqrt(rest) if rest > 0 else math.inf


def is_harmless(reach: float, parameters: Iterable[Tensor]) -> bool:
    """Return whether a bound is so far below the largest number that nothing can overflow.

    Args:
        reach: The bound.
        parameters: What it bounds.
    """
    dtypes = {p.dtype for p in parameters} | {torch.float32}
    return reach < min(torch.finfo(dtype).max for dtype in dtypes) / _HEADROOM
