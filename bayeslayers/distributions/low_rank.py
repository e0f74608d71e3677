"""The inverse of a damped positive semi-definite matrix, by its few eigenvalues that damping does not hide.

With D = A + d I, of which r eigenvalues are larger than (1 + tolerance) d, in directions U (i, r),

    D^-1 ~ s I - U diag(s - 1/lambda) U^T,  1/s the mean of the other eigenvalues

in which each eigenvalue is that of D^-1 up to the tolerance. A product with it takes 2 r i multiply-adds a row in place
of i i. Source: Puiu 2022 (arXiv 2206.15397), Randomized K-FACs; Halko, Martinsson & Tropp 2011 (arXiv 0909.4061),
Algorithms 4.4 and 5.3, for the eigenvalues.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayeslayers.distributions.matrix_gaussian import inverse

_FEWEST = 64  # directions to begin with; a matrix of fewer than three times as many is inverted whole
_MOST = 1 / 3  # of the directions: with more, products with the whole inverse are as fast
_RESOLUTION = 1e-5  # of an eigenvalue beside the largest one, in float32


class Inverse(NamedTuple):
    """A symmetric inverse, whole or of low rank.

    Attributes:
        matrix: The inverse `(i, i)`, or U diag(s - 1/lambda)^1/2 `(i, r)`.
        rest: s, which is positive; 0 where the inverse is whole.
    """

    matrix: Tensor
    rest: float = 0.0

    def __matmul__(self, right: Tensor) -> Tensor:
        """Return the product of the inverse and a matrix `(i, k)`."""
        if not self.rest:
            return self.matrix @ right
        return torch.addmm(right, self.matrix, self.matrix.mT @ right, beta=self.rest, alpha=-1)

    def __rmatmul__(self, left: Tensor) -> Tensor:
        """Return the product of a matrix `(k, i)` and the inverse."""
        if not self.rest:
            return left @ self.matrix
        return torch.addmm(left, left @ self.matrix, self.matrix.mT, beta=self.rest, alpha=-1)


def damped_inverse(matrix: Tensor, damping: float, tolerance: float) -> Inverse:
    """Return the inverse of a damped matrix, of low rank where that is cheaper to multiply by.

    Args:
        matrix: A + d I, `(i, i)`, with A positive semi-definite.
        damping: d > 0.
        tolerance: Largest relative error of an eigenvalue, but for what chance leaves; 0 gives the whole inverse.

    Raises:
        FloatingPointError: If a whole inverse is asked for, and the matrix is not positive definite in its dtype.
    """
    if tolerance > 0 and (found := _large_eigenvalues(matrix, damping, tolerance)) is not None:
        values, directions = found
        rest = (len(matrix) - len(values)) / float(matrix.diagonal().sum() - values.sum())
        return Inverse(directions * (rest - 1 / values).clamp(min=0).sqrt(), rest)
    return Inverse(inverse(matrix))


def _large_eigenvalues(matrix: Tensor, damping: float, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """Return the eigenvalues above (1 + tolerance) damping with their directions; None where a whole inverse is better.

    The directions are those that two products with A leave of random ones.
    """
    generator = torch.Generator(matrix.device).manual_seed(0)  # all ranks, and all runs, look at the same directions
    most = int(_MOST * len(matrix))
    rank = _FEWEST
    while rank <= most:
        basis = torch.randn(len(matrix), rank, generator=generator, dtype=matrix.dtype, device=matrix.device)
        for _ in range(2):
            basis = torch.linalg.qr(torch.addmm(basis, matrix, basis, beta=-damping)).Q
        core = basis.mT @ matrix @ basis
        if not core.isfinite().all():  # as the whole inverse will say
            return None
        values, turn = torch.linalg.eigh(core)
        if damping < _RESOLUTION * values[-1]:
            return None
        if values[rank // 4] <= (1 + tolerance) * damping:  # the smallest ones found are not yet exact
            large = values > (1 + tolerance) * damping
            return values[large], basis @ turn[:, large]
        rank = 2 * rank if rank == most or 2 * rank <= most else most
    return None
