"""The evidence of a Gaussian approximation, and the prior precision that maximises it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bayeslayers.distributions.gaussian import in_double


def best_prior_precision(curvature: Tensor, distance: float) -> float:
    """Return the prior precision p0 that maximises the evidence, for posterior precisions h + p0.

        d log evidence / d log p0 = 1/2 [ sum_w h / (h + p0) - p0 sum_w (m - m0)^2 ]

    The first sum, the number of weights that the data determine, falls with p0, and the second term
    rises. So there is one root, and it is a maximum. Bisection on log p0 finds it between two bounds: the
    root if all weights were determined, and the root if only the weight with the largest h were.

    Source: MacKay 1992 ("A Practical Bayesian Framework for Backpropagation Networks"), with h fixed.

    Args:
        curvature: The h, float64, >= 0 and not all 0; the eigenvalues of a curvature with correlations.
        distance: Sum of (m - m0)^2, > 0.
    """
    largest = float(curvature.max())
    low = 2 * largest / (largest * distance + math.sqrt(largest * distance * (largest * distance + 4)))
    high = curvature.numel() / distance
    while high > low * (1 + 1e-13):
        middle = math.sqrt(low * high)
        if float((curvature / (curvature + middle)).sum()) > middle * distance:
            low = middle
        else:
            high = middle
    return low


def best_for(names: Sequence[str], eigenvalues: Sequence[Tensor], distance: float) -> float:
    """Return the prior precision of some tensors, and refuse where the evidence has no maximum.

    Args:
        names: Their names.
        eigenvalues: Of the curvature of their pieces.
        distance: Sum of squared distances to the prior means.

    Raises:
        ValueError: If all weights are at their prior means, or the loss has no gradient in them.
    """
    values = torch.cat([in_double(each).flatten() for each in eigenvalues])
    some = ", ".join(f"'{name}'" for name in names[:3]) + (", ..." if len(names) > 3 else "")
    if distance == 0:
        raise ValueError(
            f"prior_precision must be a number if all weights ({some}) are at their prior means, got 'marglik': "
            "the evidence grows without bound with it."
        )
    if not values.any():
        raise ValueError(
            f"prior_precision must be a number if the loss has no gradient in the weights ({some}), got 'marglik': "
            "the evidence grows without bound as it shrinks."
        )
    return best_prior_precision(values, distance)
