"""Metrics of a sequence of tasks, from its accuracy matrix: row i after task i, column j of task j."""

from __future__ import annotations

import math

from torch import Tensor


def average_accuracy(matrix: Tensor) -> float:
    """Return the mean accuracy over all tasks after the last one.

    Args:
        matrix: `(tasks, tasks)`; entries above the diagonal do not count.
    """
    return float(_square(matrix)[-1].mean())


def backward_transfer(matrix: Tensor) -> float:
    """Return how much the accuracy of the earlier tasks has changed since each was learned, in the mean.

        1 / (T - 1) sum_{j < T - 1} (R[T - 1, j] - R[j, j])

    It is negative where tasks are forgotten; NaN for a single task. Source: Lopez-Paz & Ranzato 2017
    (arXiv 1706.08840), section 2.

    Args:
        matrix: R, as for `average_accuracy`.

    Example:
        >>> import torch
        >>> backward_transfer(torch.tensor([[0.75, 0.1], [0.5, 0.8]]))
        -0.25
    """
    if len(_square(matrix)) < 2:
        return math.nan
    return float((matrix[-1] - matrix.diagonal())[:-1].mean())


def _square(matrix: Tensor) -> Tensor:
    if matrix.dim() != 2 or len(matrix) != matrix.shape[1] or len(matrix) == 0:
        raise ValueError(f"matrix must have a row and a column for each task, got the shape {tuple(matrix.shape)}.")
    return matrix
