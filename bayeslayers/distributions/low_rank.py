"""The inverse of a damped positive semi-definite matrix, and its root, by the few eigenvalues seen above the damping.

With r eigenvalues a of A that are larger than `tolerance` d, in directions U (i, r), and lambda = a + d,

    (A + d I)^-1    ~ s I - U diag(s - 1/lambda) U^T,  1/s the mean of the other eigenvalues of A + d I
    (A + d I)^-1/2  ~ s^1/2 I - U diag(s^1/2 - lambda^-1/2) U^T

in which each eigenvalue is that of the inverse up to the tolerance, and the square of the root is exactly the first. A
product with either takes 2 r i multiply-adds a row in place of i i. Source: Puiu 2022 (arXiv 2206.15397), Randomized
K-FACs; Halko, Martinsson & Tropp 2011 (arXiv 0909.4061), Algorithms 4.4 and 5.3, for the eigenvalues.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayeslayers.distributions.matrix_gaussian import inverse, inverse_root

_FEWEST = 64  # directions to begin with; a matrix of fewer than three times as many is inverted whole
_MOST = 1 / 3  # of the directions: with more, products with the whole inverse are as fast
_RESOLUTION = 1e-5  # of an eigenvalue beside the largest one, in float32


class Reduced(NamedTuple):
    """A square matrix, whole, or reduced to a multiple of I less a symmetric product of low rank.

    Attributes:
        matrix: The whole matrix `(i, i)`, or V `(i, r)` of s I - V V^T.
        rest: s, which is positive; 0 where the matrix is whole.
    """

    matrix: Tensor
    rest: float = 0.0

    def __matmul__(self, right: Tensor) -> Tensor:
        """Return the product with a matrix `(i, k)`."""
        if not self.rest:
            return self.matrix @ right
        return torch.addmm(right, self.matrix, self.matrix.mT @ right, beta=self.rest, alpha=-1)

    def __rmatmul__(self, left: Tensor) -> Tensor:
        """Return the product of a matrix `(k, i)` and this one."""
        if not self.rest:
            return left @ self.matrix
        return torch.addmm(left, left @ self.matrix, self.matrix.mT, beta=self.rest, alpha=-1)

    @property
    def mT(self) -> Reduced:
        """The transpose."""
        return self if self.rest else Reduced(self.matrix.mT)

    def scaled(self, factor: float) -> Reduced:
        """Return the product with a number > 0."""
        return Reduced(self.matrix * (factor**0.5 if self.rest else factor), self.rest * factor)

    def whole(self) -> Tensor:
        """Return all entries."""
        if not self.rest:
            return self.matrix
        product = self.matrix @ self.matrix.mT
        product.neg_().diagonal().add_(self.rest)
        return product


class Spectrum(NamedTuple):
    """The large eigenvalues of a positive semi-definite matrix A.

    Attributes:
        values: The eigenvalues `(r,)`.
        directions: Their directions `(i, r)`.
        others: The mean of the other eigenvalues.
    """

    values: Tensor
    directions: Tensor
    others: float

    def above(self, least: float) -> Spectrum:
        """Return what a larger bound on the eigenvalues leaves."""
        large = self.values > least
        values, count = self.values[large], len(self.directions) - len(self.values)
        total = self.others * count + float(self.values.sum() - values.sum())
        return Spectrum(values, self.directions[:, large], total / (len(self.directions) - len(values)))

    def inverse(self, damping: float) -> Reduced:
        """Return (A + damping I)^-1."""
        return self._power(damping, -1.0)

    def inverse_root(self, damping: float) -> Reduced:
        """Return the symmetric root of what `inverse` does."""
        return self._power(damping, -0.5)

    def _power(self, damping: float, power: float) -> Reduced:
        rest = (self.others + damping) ** power
        return Reduced(self.directions * (rest - (self.values + damping) ** power).clamp(min=0).sqrt(), rest)


def damped_inverse(matrix: Tensor, damping: float, tolerance: float) -> Reduced:
    """Return (A + damping I)^-1, reduced where that is cheaper to multiply by.

    Args:
        matrix: A `(i, i)`, positive semi-definite.
        damping: > 0.
        tolerance: Largest relative error of an eigenvalue, but for what chance leaves; 0 gives the whole inverse.

    Raises:
        FloatingPointError: If a whole inverse is asked for, and A + damping I is not positive definite in its dtype.
    """
    if (spectrum := large_eigenvalues(matrix, damping, tolerance)) is not None:
        return spectrum.inverse(damping)
    return Reduced(inverse(_damped(matrix, damping)))


def inverse_with_root(matrix: Tensor, damping: float, root_damping: float, tolerance: float) -> tuple[Reduced, Reduced]:
    """Return (A + damping I)^-1, and a root R with R R^T = (A + root_damping I)^-1.

    Args:
        matrix: As for `damped_inverse`.
        damping: At least `root_damping`.
        root_damping: > 0.
        tolerance: As for `damped_inverse`, of the eigenvalues of R R^T too.

    Raises:
        FloatingPointError: As for `damped_inverse`.
    """
    if (spectrum := large_eigenvalues(matrix, root_damping, tolerance)) is not None:
        return spectrum.above(tolerance * damping).inverse(damping), spectrum.inverse_root(root_damping)
    return damped_inverse(matrix, damping, tolerance), Reduced(inverse_root(_damped(matrix, root_damping)))


def large_eigenvalues(matrix: Tensor, damping: float, tolerance: float) -> Spectrum | None:
    """Return the eigenvalues above tolerance * damping with their directions; None where a whole inverse is better.

    The directions are those that two products with A leave of random ones.

    Args:
        matrix: As for `damped_inverse`.
        damping: Likewise.
        tolerance: Likewise.
    """
    generator = torch.Generator(matrix.device).manual_seed(0)  # all ranks, and all runs, look at the same directions
    most = int(_MOST * len(matrix)) if tolerance > 0 else 0
    rank = _FEWEST
    while rank <= most:
        basis = torch.randn(len(matrix), rank, generator=generator, dtype=matrix.dtype, device=matrix.device)
        for _ in range(2):
            basis = torch.linalg.qr(matrix @ basis).Q
        core = basis.mT @ matrix @ basis
        if not core.isfinite().all():  # as the whole inverse will say
            return None
        values, turn = torch.linalg.eigh(core)
        if damping < _RESOLUTION * values[-1]:
            return None
        if values[rank // 4] <= tolerance * damping:  # the smallest ones found are not yet exact
            large = values > tolerance * damping
            values = values[large]
            others = float(matrix.diagonal().sum() - values.sum()) / (len(matrix) - len(values))
            return Spectrum(values, basis @ turn[:, large], max(others, 0.0))
        rank = 2 * rank if rank == most or 2 * rank <= most else most
    return None


def _damped(matrix: Tensor, damping: float) -> Tensor:
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    return damped
