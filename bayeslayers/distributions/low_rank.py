"""The inverse of a damped positive semi-definite matrix, and its root, by eigenvalues that stand out from the others.

With the r largest eigenvalues a of A, in directions U (i, r), and m the mean of the others,

    (A + d I)^p ~ s I - U diag(s - (a + d)^p) U^T,  s = (m + d)^p

for the inverse, p = -1, and its symmetric root, p = -1/2: the square of the second is exactly the first. Of the others
the largest is at most (1 + tolerance) (m + d) - d, so that no eigenvalue of the inverse is more than `tolerance` too
large; s keeps the sum of those of A + d I. A product with either takes 2 r i multiply-adds a row in place of i i.
Source: Puiu 2022 (arXiv 2206.15397), Randomized K-FACs; Halko, Martinsson & Tropp 2011 (arXiv 0909.4061), Algorithms
4.4 and 5.3, for the eigenvalues.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayeslayers.distributions.matrix_gaussian import inverse, inverse_root

_FEWEST = 64  # directions to begin with; a matrix of fewer than twice as many is inverted whole
_MOST = 1 / 2  # of the directions: with as many, products with the whole inverse are as fast
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


def between(left: Reduced, matrix: Tensor, right: Reduced) -> Tensor:
    """Return L M R^T for a matrix M `(o, i)`; where both L and R are reduced, in one pass over M after their products.

    With L = s I - V V^T and R = t I - U U^T it is s t M - [s M U | V] [U^T; V^T M R].
    """
    if not (left.rest and right.rest):
        return left @ (matrix @ right if right.rest else matrix @ right.matrix.mT)
    columns = torch.cat([matrix @ right.matrix * left.rest, left.matrix], 1)
    rows = torch.cat([right.matrix.mT, (left.matrix.mT @ matrix) @ right])
    return torch.addmm(matrix, columns, rows, beta=left.rest * right.rest, alpha=-1)


class Spectrum(NamedTuple):
    """The large eigenvalues of a positive semi-definite matrix A.

    Attributes:
        values: The eigenvalues `(r,)`, the largest first.
        directions: Their directions `(i, r)`.
        others: The mean of the other eigenvalues.
    """

    values: Tensor
    directions: Tensor
    others: float

    def for_damping(self, damping: float, tolerance: float) -> Spectrum:
        """Return the fewer eigenvalues that stand out where `damping` is larger."""
        size, count = self.directions.shape
        fewer, others = _standing_out(self.values, self.others * (size - count), size, damping, tolerance)
        return Spectrum(self.values[:fewer], self.directions[:, :fewer], others)

    def inverse(self, damping: float) -> Reduced:
        """Return (A + damping I)^-1."""
        return self._power(damping, -1.0)

    def inverse_root(self, damping: float) -> Reduced:
        """Return the symmetric root of what `inverse` does."""
        return self._power(damping, -0.5)

    def _power(self, damping: float, power: float) -> Reduced:
        rest = (self.others + damping) ** power
        return Reduced(self.directions * (rest - (self.values + damping) ** power).clamp(min=0).sqrt(), rest)


def damped_inverse(matrix: Tensor, damping: float, tolerance: float, start: Tensor | None = None) -> Reduced:
    """Return (A + damping I)^-1, reduced where that is cheaper to multiply by.

    Args:
        matrix: A `(i, i)`, positive semi-definite.
        damping: > 0.
        tolerance: By how much of itself an eigenvalue may be too large, but for what chance leaves; 0 gives the whole
            inverse.
        start: What is known of the directions, as those of a matrix like this one `(i, k)`, of any lengths.

    Raises:
        FloatingPointError: If a whole inverse is asked for, and A + damping I is not positive definite in its dtype.
    """
    if (spectrum := large_eigenvalues(matrix, damping, tolerance, start)) is not None:
        return spectrum.inverse(damping)
    return Reduced(inverse(_damped(matrix, damping)))


def inverse_with_root(
    matrix: Tensor,
    damping: float,
    root_damping: float,
    tolerance: float,
    start: Tensor | None = None,
    reduces_root: bool = True,
) -> tuple[Reduced, Reduced]:
    """Return (A + damping I)^-1, and a root R with R R^T = (A + root_damping I)^-1.

    Args:
        matrix: As for `damped_inverse`.
        damping: At least `root_damping`.
        root_damping: > 0.
        tolerance: As for `damped_inverse`, of the eigenvalues of R R^T too.
        start: As for `damped_inverse`.
        reduces_root: Whether the root may be reduced.

    Raises:
        FloatingPointError: As for `damped_inverse`.
    """
    if reduces_root and (spectrum := large_eigenvalues(matrix, root_damping, tolerance, start)) is not None:
        return spectrum.for_damping(damping, tolerance).inverse(damping), spectrum.inverse_root(root_damping)
    return damped_inverse(matrix, damping, tolerance, start), Reduced(inverse_root(_damped(matrix, root_damping)))


def large_eigenvalues(matrix: Tensor, damping: float, tolerance: float, start: Tensor | None = None) -> Spectrum | None:
    """Return the eigenvalues that stand out, with their directions; None where a whole inverse is better.

    They are found by products of A with the start and random directions; where these turn out to be too few, more are
    added.

    Args:
        matrix: As for `damped_inverse`.
        damping: Likewise.
        tolerance: Likewise.
        start: Likewise.
    """
    generator = torch.Generator(matrix.device).manual_seed(0)  # all ranks, and all runs, look at the same directions
    size, trace = len(matrix), matrix.diagonal().sum()
    most = int(_MOST * size) if tolerance > 0 else 0
    known = 0 if start is None else start.shape[1]
    basis = matrix.new_empty(size, 0) if start is None else start
    rank = max(_FEWEST, min(most, known + known // 2))
    while rank <= most:
        new = torch.randn(
            size, max(rank - known, 0), generator=generator, dtype=matrix.dtype, device=matrix.device
        )  # fmt: skip
        basis = torch.cat([basis[:, :rank], new], 1)
        for _ in range(2 if known else 3):
            basis = torch.linalg.qr(matrix @ basis).Q
        core = basis.mT @ matrix @ basis
        if not core.isfinite().all():  # as the whole inverse will say
            return None
        values, turn = (found.flip(-1) for found in torch.linalg.eigh(core))
        if damping < _RESOLUTION * values[0]:
            return None
        count, others = _standing_out(values, float(trace - values.sum()), size, damping, tolerance)
        if count <= rank - rank // 4:  # the smallest ones found are not yet exact
            return Spectrum(values[:count], basis @ turn[:, :count], others)
        known, rank = rank, 2 * rank if rank == most or 2 * rank <= most else most
    return None


def _standing_out(values: Tensor, remainder: float, size: int, damping: float, tolerance: float) -> tuple[int, float]:
    """Return how many of the largest eigenvalues stand out from all others, and the mean of these.

    Args:
        values: The largest eigenvalues, in descending order.
        remainder: The sum of all others.
        size: The number of all.
        damping: As for `damped_inverse`.
        tolerance: Likewise.
    """
    found = values.tolist()
    total = max(remainder, 0.0) + sum(found)
    for count, value in enumerate(found):
        others = total / (size - count)
        if value + damping <= (1 + tolerance) * (others + damping):
            return count, others
        total -= value
    return len(found), max(remainder, 0.0) / (size - len(found))


def _damped(matrix: Tensor, damping: float) -> Tensor:
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    return damped
