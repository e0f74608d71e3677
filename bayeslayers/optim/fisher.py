"""Labels drawn from the model's own predictive distribution, whose gradients have the Fisher as second moment."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bayeslayers.curvature.accumulate import wide
from bayeslayers.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood

Generator = torch.Generator | None


def _category(probs: Tensor, noise: Tensor, generator: Generator) -> Tensor:
    rows = probs.movedim(1, -1)
    return torch.multinomial(rows.reshape(-1, rows.shape[-1]), 1, generator=generator).reshape(rows.shape[:-1])


def _yes_or_no(prob: Tensor, noise: Tensor, generator: Generator) -> Tensor:
    return torch.bernoulli(prob, generator=generator)


def _real(mean: Tensor, variance: Tensor, generator: Generator) -> Tensor:
    return mean + variance.sqrt() * torch.empty_like(mean).normal_(generator=generator)


_DRAWS: Mapping[type, Callable[[Tensor, Tensor, Generator], Tensor]] = {
    Categorical: _category,
    Bernoulli: _yes_or_no,
    Gaussian: _real,
}


def check_likelihood(likelihood: object) -> None:
    """Check that labels can be drawn from a likelihood.

    Raises:
        TypeError: If they cannot.
    """
    if type(likelihood) not in _DRAWS:
        kind = type(likelihood).__name__
        raise TypeError(
            f"likelihood must be Categorical, Bernoulli or Gaussian, got {kind}: fisher='sampled' draws its labels. "
            "Use fisher='empirical'."
        )


def sampled_loss(likelihood: Likelihood, output: Tensor, generator: Generator = None) -> Tensor:
    """Return a loss at labels drawn given the output: the mean of the squares of its gradients is the loss's curvature.

    It is the sum over examples of the negative log-likelihood. Where `likelihood.loss` is a mean over
    the elements of an example too, as over pixels, the loss is 1/k of a log-likelihood, and so is its
    curvature; gradients that are squared then have the factor 1/sqrt(k).

    Args:
        likelihood: One of those that `check_likelihood` lets pass.
        output: Output of the network.
        generator: Source of the labels.

    Raises:
        FloatingPointError: If the output is not finite.
    """
    output = wide(output)
    if bad := int((~output.isfinite()).sum()):
        raise FloatingPointError(
            f"the output must be finite, got {bad} of {output.numel()} values that are not: the step is refused, the "
            "posterior is as it was. Lower lr, raise damping, or look at the batch."
        )
    target = _DRAWS[type(likelihood)](*likelihood.per_draw(output.detach()), generator)
    averaged = target.numel() if likelihood.discrete else len(target)
    return likelihood.loss(output, target) * math.sqrt(averaged * len(target))
