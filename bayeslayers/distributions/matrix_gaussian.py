"""Pure maths of the matrix-variate Gaussian, whose covariance is a Kronecker product, independent of any module.

A layer's weight and bias are one matrix W = [weight | bias] of shape (o, i), the kernel of a
convolution flattened into i and the bias its last column. With roots R_in (i, i) and R_out (o, o)

    W = M + R_out E R_in^T,  E ~ N(0, 1)  =>  Cov(W_oi, W_pj) = (R_out R_out^T)_op (R_in R_in^T)_ij

Any finite roots define a valid covariance, so they need no check when they are read. A scale S (o, i) may stand between
them, of positive or negative entries,

    W = M + R_out (S * E) R_in^T

as where a curvature that is a Kronecker product is added to a prior: then roots and S come from the eigenvectors and
eigenvalues of both factors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayeslayers.distributions.gaussian import in_double
from bayeslayers.dtypes import at_least_float32


def as_matrix(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the matrix [weight | bias], the weight alone without a bias."""
    matrix = weight.flatten(1)
    return matrix if bias is None else torch.cat([matrix, bias[:, None]], 1)


def damp(input_factor: Tensor, output_factor: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the Kronecker factors of a curvature A (x) G to which `damping` is added, approximately.

        (A + pi sqrt(damping) I) (x) (G + sqrt(damping) / pi I),  pi^2 = (tr A / dim A) / (tr G / dim G)

    The product is A (x) G + damping I plus two further terms, whose trace norm this pi minimises. If a
    trace is 0, so is A (x) G, and the factors are exactly those of damping I.
    Source: Martens & Grosse 2015 (arXiv 1503.05671), section 6.3.

    Args:
        input_factor: A, `(i, i)`, positive semi-definite.
        output_factor: G, `(o, o)`, likewise.
        damping: > 0.
    """
    if is_zero_product(input_factor, output_factor):
        return _scaled_identity(input_factor, math.sqrt(damping)), _scaled_identity(output_factor, math.sqrt(damping))
    shares = damping_shares(input_factor, output_factor, damping)
    return (
        input_factor + _scaled_identity(input_factor, shares[0]),
        output_factor + _scaled_identity(output_factor, shares[1]),
    )


def is_zero_product(input_factor: Tensor, output_factor: Tensor) -> bool:
    """Return whether a trace of positive semi-definite factors is 0, and so is their product."""
    return not (input_factor.diagonal().any() and output_factor.diagonal().any())


def damping_shares(input_factor: Tensor, output_factor: Tensor, damping: float) -> tuple[float, float]:
    """Return what `damp` adds to the diagonals of both factors, pi sqrt(damping) and sqrt(damping) / pi.

    Args:
        input_factor: As for `damp`.
        output_factor: Likewise.
        damping: Likewise.
    """
    mean_in, mean_out = float(input_factor.diagonal().mean()), float(output_factor.diagonal().mean())
    pi = math.sqrt(mean_in / mean_out) if mean_in > 0 and mean_out > 0 else 1.0
    return pi * math.sqrt(damping), math.sqrt(damping) / pi


def inverse(matrix: Tensor) -> Tensor:
    """Return the inverse of a symmetric positive definite matrix.

    Raises:
        FloatingPointError: If it is not positive definite in its dtype.
    """
    return torch.cholesky_inverse(_cholesky(matrix))


def inverse_root(matrix: Tensor) -> Tensor:
    """Return R with R R^T the inverse of a symmetric positive definite matrix: its Cholesky factor's inverse transpose.

    Raises:
        FloatingPointError: As for `inverse`.
    """
    lower = _cholesky(matrix)
    return torch.linalg.solve_triangular(lower, _scaled_identity(lower, 1.0), upper=False).mT.contiguous()


def correlated(noise: Tensor, input_root: Tensor, output_root: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return R_out (S * E) R_in^T for standard normal values E `(o, i)`; S is 1 where it is None."""
    return output_root @ (noise if scale is None else noise * scale) @ input_root.mT


def marginal_precision(input_root: Tensor, output_root: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return the marginal precision of each entry, one over its variance, `(o, i)`."""
    if scale is None:
        return 1 / torch.outer(output_root.square().sum(1), input_root.square().sum(1))
    return 1 / (output_root.square() @ scale.square() @ input_root.square().mT)


def without_scale(input_root: Tensor, output_root: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return roots of the Kronecker product nearest to a Gaussian with a scale, which is one already without.

    Nearest is in the mean square of the logarithm of the scale, which keeps the determinant; see `strengthened`.
    """
    if scale is None:
        return input_root, output_root
    entries = scale.abs().log()
    half = entries.mean() / 2
    return input_root * (entries.mean(0) - half).exp(), output_root * (entries.mean(1) - half).exp()


def kl_divergence(
    mean: Tensor,
    input_root: Tensor,
    output_root: Tensor,
    prior_mean: Tensor,
    prior_precision: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """Return KL(N(M, covariance) || N(M0, 1/P0)) in nats; entries are independent under the prior.

        KL = 1/2 sum [p0 v + p0 (m - m0)^2 - 1 - log p0] - i log abs det R_out - o log abs det R_in - sum log abs S

    with v the marginal variance of each entry.

    Args:
        mean: M, `(o, i)`.
        input_root: R_in, `(i, i)`.
        output_root: R_out, `(o, o)`.
        prior_mean: M0, a scalar or the shape of `mean`.
        prior_precision: P0, > 0, likewise.
        scale: S, None for 1.
    """
    o, i = mean.shape
    variance = 1 / marginal_precision(at_least_float32(input_root), at_least_float32(output_root), scale)
    terms = prior_precision * (variance + (mean - prior_mean).square()) - 1 - prior_precision.log()
    volumes = [torch.linalg.slogdet(at_least_float32(root)).logabsdet for root in (output_root, input_root)]
    return 0.5 * terms.sum() - i * volumes[0] - o * volumes[1] - _log_volume(scale)


def _log_volume(scale: Tensor | None) -> Tensor | float:
    return 0.0 if scale is None else scale.abs().log().sum()


def divergence_of_matrices(
    mean: Tensor,
    roots: tuple[Tensor, Tensor],
    prior_mean: Tensor,
    prior_roots: tuple[Tensor, Tensor],
    scale: Tensor | None = None,
) -> Tensor:
    """Return KL(N(M, covariance) || N(M0, prior covariance)) in nats, of two matrix-variate Gaussians, in float64.

        KL = 1/2 [ a^T S^2 b + sum((P_out (M - M0) P_in^T)^2) - o i ]
             - i log abs det Q_out - o log abs det Q_in - sum log abs S

    with P the inverse of a prior root, Q = P R for the posterior's root R, and a and b the sums of squares of the
    columns of Q_out and Q_in.

    Args:
        mean: M, `(o, i)`.
        roots: R_in `(i, i)` and R_out `(o, o)`.
        prior_mean: M0, a scalar or the shape of `mean`.
        prior_roots: Those of the prior.
        scale: S of the posterior, None for 1.
    """
    o, i = mean.shape
    (prior_in, prior_out), (root_in, root_out) = ([in_double(root) for root in pair] for pair in (prior_roots, roots))
    ratio_in, ratio_out = torch.linalg.solve(prior_in, root_in), torch.linalg.solve(prior_out, root_out)
    distance = torch.linalg.solve(prior_in, torch.linalg.solve(prior_out, in_double(mean - prior_mean)).mT)
    variances = mean.new_ones(o, i, dtype=torch.float64) if scale is None else in_double(scale).square()
    traces = ratio_out.square().sum(0) @ variances @ ratio_in.square().sum(0)
    volumes = [torch.linalg.slogdet(ratio).logabsdet for ratio in (ratio_out, ratio_in)]
    spread = traces + distance.square().sum() - o * i
    return 0.5 * spread - i * volumes[0] - o * volumes[1] - _log_volume(None if scale is None else in_double(scale))


def strengthened(
    roots: tuple[Tensor, Tensor], prior_roots: tuple[Tensor, Tensor], strength: float
) -> tuple[Tensor, Tensor]:
    """Return roots of the Gaussian whose precision is the prior's and `strength` times what the posterior's adds.

    In the coordinates in which the prior's precision is I and the posterior's diagonal, with entries x, the new
    entries y = 1 + strength (x - 1) are no Kronecker product. The product nearest in the mean square of the logarithm,
    which keeps the determinant, takes their place:

        log y_oi ~ mean_i log y_oi + mean_o log y_oi - mean log y

    An entry of less precision than the prior's (x < 1) is not strengthened beyond x.

    Args:
        roots: R_in and R_out of the posterior.
        prior_roots: Those of the prior.
        strength: > 0; 1 gives the posterior.
    """
    (prior_in, prior_out), (root_in, root_out) = ([in_double(root) for root in pair] for pair in (prior_roots, roots))
    basis_in, variance_in = _relative(prior_in, root_in)
    basis_out, variance_out = _relative(prior_out, root_out)
    gained = 1 / torch.outer(variance_out, variance_in) - 1
    entries = (1 + torch.where(gained > 0, strength, min(strength, 1.0)) * gained).log()
    half = entries.mean() / 2
    found = basis_in * ((half - entries.mean(0)) / 2).exp(), basis_out * ((half - entries.mean(1)) / 2).exp()
    return found[0].to(roots[0]), found[1].to(roots[1])


def _relative(prior_root: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Return the basis in which a prior's covariance is I and another is diagonal, with its entries there."""
    ratio = torch.linalg.solve(prior_root, root)
    variance, basis = torch.linalg.eigh(ratio @ ratio.mT)
    return prior_root @ basis, variance


def leading_root(root: Tensor, size: int) -> Tensor:
    """Return a root `(size, size)` of the covariance of a vector's first entries, given the whole vector's root.

    Raises:
        FloatingPointError: As for `inverse`.
    """
    rows = at_least_float32(root[:size])
    return _cholesky(rows @ rows.mT).to(root.dtype)


def _cholesky(matrix: Tensor) -> Tensor:
    lower, failed = torch.linalg.cholesky_ex(at_least_float32(matrix))
    if failed or not lower.isfinite().all():
        raise FloatingPointError(
            f"a damped curvature factor must be positive definite, got one of shape {tuple(matrix.shape)} that is not "
            f"in {matrix.dtype}. The step is rejected, and the posterior is unchanged. Raise damping or "
            "prior_precision, or use float64."
        )
    return lower


def _scaled_identity(like: Tensor, value: float) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device).mul_(value)
