"""Pure maths of the Gaussian with a dense covariance, given by a root R of it: w = m + R e with e ~ N(0, 1).

A prior is given by a root R0 `(d, d)` too, or by the standard deviations `(d,)` of independent entries. In its
coordinates v, with w = m0 + R0 v, the prior is N(0, I), and a curvature H in w is R0^T H R0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayeslayers.distributions.gaussian import in_double


def whitened(curvature: Tensor, prior_root: Tensor) -> Tensor:
    """Return a curvature `(d, d)` in the coordinates in which the prior is N(0, I)."""
    if prior_root.dim() == 1:
        return prior_root[:, None] * curvature * prior_root
    return prior_root.mT @ curvature @ prior_root


def restored(prior_root: Tensor, columns: Tensor) -> Tensor:
    """Return columns in the prior's coordinates as columns in those of the weights."""
    return prior_root[:, None] * columns if prior_root.dim() == 1 else prior_root @ columns


def in_prior_units(prior_root: Tensor, columns: Tensor) -> Tensor:
    """Return columns `(d, k)` in the coordinates of the weights as columns in the prior's."""
    return columns / prior_root[:, None] if prior_root.dim() == 1 else torch.linalg.solve(prior_root, columns)


def posterior_root(curvature: Tensor, prior_root: Tensor) -> tuple[Tensor, Tensor]:
    """Return a root of the covariance whose inverse is the prior's precision plus a curvature.

    With the eigenvalues x and eigenvectors Q of the whitened curvature it is R0 Q (1 + x)^(-1/2).

    Args:
        curvature: H, `(d, d)`, symmetric, positive semi-definite.
        prior_root: R0.

    Returns:
        The root, and x, `(d,)`, clipped at 0, below which only rounding can leave them.
    """
    values, vectors = torch.linalg.eigh(whitened(curvature, prior_root))
    values = values.clamp_min(0)
    return restored(prior_root, vectors * (1 + values).rsqrt()), values


def marginal_precision(root: Tensor) -> Tensor:
    """Return the marginal precision of each entry, one over its variance, `(d,)`."""
    return 1 / root.square().sum(1)


def strengthened(root: Tensor, prior_root: Tensor, strength: float) -> Tensor:
    """Return a root of the Gaussian whose precision is the prior's and `strength` times what the posterior's adds.

    In the coordinates in which the prior's precision is I and the posterior's has eigenvalues x, the new ones are
    1 + strength (x - 1). A direction of less precision than the prior's (x < 1) is not strengthened beyond x.
    """
    prior_root = in_double(prior_root)
    ratio = in_prior_units(prior_root, in_double(root))
    variance, vectors = torch.linalg.eigh(ratio @ ratio.mT)
    gained = 1 / variance - 1
    precision = 1 + torch.where(gained > 0, strength, min(strength, 1.0)) * gained
    return restored(prior_root, vectors * precision.rsqrt()).to(root)


def kl_divergence(mean: Tensor, root: Tensor, prior_mean: Tensor, prior_root: Tensor) -> Tensor:
    """Return KL(N(m, R R^T) || N(m0, R0 R0^T)) in nats, in float64.

        KL = 1/2 [ sum(Q^2) + |R0^-1 (m - m0)|^2 - d ] - log abs det Q,  Q = R0^-1 R

    Args:
        mean: m, `(d,)`.
        root: R, `(d, d)`.
        prior_mean: m0, `(d,)`.
        prior_root: R0, or standard deviations.
    """
    prior_root = in_double(prior_root)
    ratio = in_prior_units(prior_root, in_double(root))
    distance = in_prior_units(prior_root, in_double(mean - prior_mean)[:, None])
    spread = ratio.square().sum() + distance.square().sum() - len(mean)
    return 0.5 * spread - torch.linalg.slogdet(ratio).logabsdet
