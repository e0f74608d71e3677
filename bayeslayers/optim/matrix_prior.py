"""A matrix-variate prior in the step with Kronecker factors: the coordinates in which it is isotropic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayeslayers.distributions.gaussian import in_double
from bayeslayers.distributions.matrix_gaussian import leading_root
from bayeslayers.dtypes import at_least_float32
from bayeslayers.layers import BayesianLayer


@dataclass(frozen=True)
class MatrixPrior:
    """A prior N(M0, covariance) of a layer's matrix W = [weight | bias], of roots R_in and R_out.

    With W = M0 + R_out V R_in^T the prior of V is N(0, I), and factors A (x) G of the curvature in W are those of

        R_in^T A R_in (x) R_out^T G R_out

    in V. So a sum of the two is damped in V as for an isotropic prior, of precision 1, and brought back.

    Attributes:
        key: The layer's buffers that it is made of.
        input_root: R_in, `(i, i)`.
        output_root: R_out, `(o, o)`.
        input_precision: The inverse of R_in R_in^T.
        output_precision: The inverse of R_out R_out^T.
    """

    key: tuple[Tensor, Tensor]
    input_root: Tensor
    output_root: Tensor
    input_precision: Tensor
    output_precision: Tensor

    @classmethod
    def of(cls, layer: BayesianLayer, inputs: int, known: MatrixPrior | None = None) -> MatrixPrior | None:
        """Return the prior of a layer's matrix of so many columns, None where it is not matrix-variate.

        Args:
            layer: The layer.
            inputs: Columns, the bias among them unless it is frozen.
            known: What an earlier call returned, taken again if it is of the same buffers.
        """
        roots = layer.prior_roots
        if roots is None or len(roots[0]) < inputs:
            return None
        if known is not None and known.key[0] is roots[0] and known.key[1] is roots[1]:
            if len(known.input_root) == inputs:
                return known
        ordered = at_least_float32(roots[0]), at_least_float32(roots[1])
        if len(ordered[0]) > inputs:
            ordered = leading_root(ordered[0], inputs), ordered[1]
        precisions = [torch.cholesky_inverse(_lower(root)).to(root) for root in ordered]
        return cls(roots, *ordered, *precisions)

    def whitened(self, input_factor: Tensor, output_factor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors in the prior's coordinates."""
        pairs = (self.input_root, at_least_float32(input_factor)), (self.output_root, at_least_float32(output_factor))
        return tuple(root.mT @ factor @ root for root, factor in pairs)  # pyright: ignore[reportReturnType]

    def restored(self, input_root: Tensor, output_root: Tensor) -> tuple[Tensor, Tensor]:
        """Return roots of a covariance in the prior's coordinates as roots in those of the weights."""
        return self.input_root @ input_root, self.output_root @ output_root

    def damping(self, damping: float) -> float:
        """Return what a multiple of I in the coordinates of the weights is in the prior's, in the mean."""
        return damping * float(self.input_root.square().sum(0).mean() * self.output_root.square().sum(0).mean())

    def pull(self, difference: Tensor) -> Tensor:
        """Return the prior's precision times a matrix M - M0, the gradient of minus its log density."""
        return self.output_precision @ at_least_float32(difference) @ self.input_precision


def _lower(root: Tensor) -> Tensor:
    """Return the Cholesky factor of the covariance of a root, in float64."""
    wide = in_double(root)
    return torch.linalg.cholesky(wide @ wide.mT)
