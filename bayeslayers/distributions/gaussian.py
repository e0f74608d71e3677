"""Pure maths of the diagonal Gaussian q(w) = N(mean, 1/precision), independent of any module."""

from __future__ import annotations

import math

import torch
from torch import Tensor

POINT_PRECISION = 2.0**46  # of a weight known up to rounding: a deviation of 2^-23, float32's rounding of a weight of 1


def kl_divergence(mean: Tensor, precision: Tensor, prior_mean: Tensor, prior_precision: Tensor) -> Tensor:
    """Return KL(N(mean, 1/precision) || N(prior_mean, 1/prior_precision)), summed, in nats.

        KL = sum_i [ log(p / p0) + p0 / p + p0 (m - m0)^2 - 1 ] / 2

    The prior's tensors broadcast against the mean: scalars or the same shape.
    """
    ratio = prior_precision / precision
    return 0.5 * (ratio - ratio.log() + prior_precision * (mean - prior_mean).square() - 1).sum()


def natural_gradient_step_(
    mean: Tensor,
    precision: Tensor,
    grad: Tensor,
    curvature: Tensor,
    *,
    prior_mean: Tensor,
    prior_precision: Tensor,
    ess: float,
    lr: float,
    precision_lr: float,
    damping: float = 0.0,
    curvature_scale: float = 1.0,
    clip_radius: float = math.inf,
) -> None:
    """Move a diagonal Gaussian posterior, in place, by one VOGN update.

        precision <- (1 - b) precision + b (ess curvature + prior_precision)
        mean      <- mean - lr (ess grad + prior_precision (mean - prior_mean)) / (precision + ess damping)

    with b = `precision_lr`. The mean's step uses the new precision. The squared per-example
    gradient stands in for the Hessian, so the precision converges to ess E_q[g^2] + prior_precision,
    not to the exact mean-field posterior's. Every term of the precision is non-negative and the
    prior's is positive, so it stays positive without a clamp.

    Source: Osawa et al. 2019 (arXiv 1906.02506), Eqs. 8 and 9; Khan et al. 2018 (arXiv 1806.04854), VOGN.

    Args:
        mean: Mean of the posterior; changed.
        precision: Its precision, > 0, the shape of `mean`; changed.
        grad: Mean over examples of the loss gradient (or its momentum average), in nats.
        curvature: Mean over examples of the squared loss gradient, >= 0; overwritten as scratch memory.
        prior_mean: Mean of the prior, a scalar or the shape of `mean`.
        prior_precision: Precision of the prior, > 0, a scalar or the shape of `mean`.
        ess: Effective sample size, the data set's size divided by the temperature.
        lr: Step size of the mean.
        precision_lr: Weight of the new precision in its moving average, in (0, 1].
        damping: Added to the curvature in the mean's step alone, in units of curvature.
        curvature_scale: Factor that makes `curvature` a mean over examples; applied here, it costs no pass.
        clip_radius: Bound on each entry of the mean's step before `lr`.
    """
    precision.lerp_(prior_precision, precision_lr).add_(curvature, alpha=precision_lr * ess * curvature_scale)
    scale = precision + ess * damping if damping else precision
    prior = {"prior_mean": prior_mean, "prior_precision": prior_precision}
    mean_step_(mean, scale, grad, curvature, **prior, ess=ess, lr=lr, clip_radius=clip_radius)


def mean_step_(
    mean: Tensor,
    scale: Tensor,
    grad: Tensor,
    scratch: Tensor,
    *,
    prior_mean: Tensor,
    prior_precision: Tensor,
    ess: float,
    lr: float,
    clip_radius: float = math.inf,
) -> None:
    """Move the mean, in place, by its part of `natural_gradient_step_`.

    Args:
        mean: Mean of the posterior; changed.
        scale: What the gradient is divided by.
        grad: This and the following as for `natural_gradient_step_`.
        scratch: Memory of the shape of `mean`; overwritten.
        prior_mean: See there.
        prior_precision: See there.
        ess: See there.
        lr: See there.
        clip_radius: See there.
    """
    direction = torch.sub(mean, prior_mean, out=scratch).mul_(prior_precision).add_(grad, alpha=ess)
    if clip_radius == math.inf:
        mean.addcdiv_(direction, scale, value=-lr)
    else:
        mean.add_(direction.div_(scale).clamp_(-clip_radius, clip_radius), alpha=-lr)


def retracted_precision(precision: Tensor, target: Tensor, weight: float) -> Tensor:
    """Return a precision moved toward a target of any sign; the result is always positive.

        p (1 - r + r^2 / 2) = p (1 + (1 - r)^2) / 2,  r = weight (p - target) / p

    To first order in the weight it is the moving average (1 - weight) p + weight target, and it is at
    least p / 2.

    Source: Lin et al. 2020 (arXiv 2002.10060); Shen et al. 2024 (arXiv 2402.17641), Algorithm 1.

    Args:
        precision: p, > 0.
        target: The shape of `precision`; overwritten by the result.
        weight: In (0, 1].
    """
    rest = target.div_(precision).mul_(weight).add_(1 - weight)  # 1 - r
    return rest.square_().mul_(precision).add_(precision).mul_(0.5)


def in_double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64 on the CPU: sums over many weights cancel, and not every device has float64."""
    return tensor.detach().cpu().double()


def product(means: Tensor, precisions: Tensor, prior_mean: Tensor, prior_precision: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and precision of the product of K posteriors, with their shared prior counted once.

        q(w) ~ prod_k q_k(w) / p(w)^(K - 1)
        precision = sum_k p_k - (K - 1) p0
        mean      = (sum_k p_k m_k - (K - 1) p0 m0) / precision

    Where the posteriors together are less certain than K - 1 priors, the precision is not positive and
    there is no such Gaussian. Source: Broderick et al. 2013 (arXiv 1307.6769), section 2.2.

    Args:
        means: `(K, *)`.
        precisions: Likewise.
        prior_mean: Mean of the prior, a scalar or `(*)`.
        prior_precision: Precision of the prior, > 0, likewise.
    """
    repeats = len(means) - 1
    precision = precisions.sum(0) - repeats * prior_precision
    return ((precisions * means).sum(0) - repeats * prior_precision * prior_mean) / precision, precision


def mixture(means: Tensor, precisions: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and precision of the Gaussian with the moments of a uniform mixture of K Gaussians.

        mean        = mean_k m_k
        1/precision = mean_k (1/p_k + (m_k - mean)^2)

    It minimises KL(mixture || Gaussian) among Gaussians; entries are treated as independent.
    Source: Lakshminarayanan et al. 2017 (arXiv 1612.01474), section 2.4.

    Args:
        means: `(K, *)`.
        precisions: Likewise, > 0.
    """
    mean = means.mean(0)
    return mean, 1 / (1 / precisions + (means - mean).square()).mean(0)
