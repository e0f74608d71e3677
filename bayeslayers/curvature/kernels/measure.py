"""Norms and smallest values of what enters a step on a CPU, by kernels where these can run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from bayeslayers.curvature.kernels.launch import attempt, in_one_order, is_large, language_of, runs

_NAME = "measure"

T = TypeVar("T")


def norms(lists: Sequence[Sequence[Tensor]]) -> list[list[float]] | None:
    """Return the Euclidean norms of tensors by a kernel; None where none can run, or where all tensors are small.

    Args:
        lists: Tensors, in lists.
    """

    def launch() -> list[list[float]]:
        from bayeslayers.curvature.kernels.numba_measure import norm

        return [[norm(x) for x in tensors] for tensors in lists]

    return _attempt([x for tensors in lists for x in tensors], launch)


def smallest(tensors: Sequence[Tensor]) -> list[float] | None:
    """Return the smallest value of each tensor, 0 where one is not finite or not above 0, by a kernel; None as `norms`.

    Args:
        tensors: Tensors of at least one value.
    """

    def launch() -> list[float]:
        from bayeslayers.curvature.kernels import numba_measure

        return [numba_measure.smallest(x) for x in tensors]

    return _attempt(tensors, launch)


def _attempt(tensors: Sequence[Tensor], launch: Callable[[], T]) -> T | None:
    fits = (
        any(language_of(x) == "numba" and is_large(x) for x in tensors)
        and all(x.dtype == torch.float32 and in_one_order(x) for x in tensors)
        and runs(_NAME, *tensors)
    )
    return attempt(_NAME, tensors[0], launch) if fits else None
