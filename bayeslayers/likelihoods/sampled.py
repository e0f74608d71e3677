"""Labels drawn from the output, and the loss at them, whose squared gradients are the curvature of the true loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bayeslayers.dtypes import at_least_float32
from bayeslayers.likelihoods.base import Likelihood
from bayeslayers.likelihoods.bernoulli import Bernoulli
from bayeslayers.likelihoods.categorical import Categorical
from bayeslayers.likelihoods.gaussian import Gaussian

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
            f"likelihood must be Categorical, Bernoulli or Gaussian, got {kind}: fisher='sampled' draws labels from "
            "it. Use fisher='empirical'."
        )


def sampled_loss(
    likelihood: Likelihood, output: Tensor, generator: Generator = None, place: tuple[int, int] | None = None
) -> Tensor:
    """Return a loss at labels drawn from the output, whose mean squared gradient is the curvature of the true loss.

    It is the sum over examples of the negative log-likelihood. If `likelihood.loss` also averages over the
    k elements of an example, such as pixels, then the loss and its curvature are 1/k of a log-likelihood's;
    gradients that are squared then have the factor 1/sqrt(k).

    Args:
        likelihood: A likelihood that passes `check_likelihood`.
        output: Output of the network.
        generator: Source of the labels.
        place: Examples before these in a batch that is drawn for as a whole, and all of its examples; None where these
            are all.

    Raises:
        FloatingPointError: If the output is not finite.
    """
    output = at_least_float32(output)
    if bad := int((~output.isfinite()).sum()):
        raise FloatingPointError(
            f"the output must be finite, got {bad} of {output.numel()} values that are not. The step is rejected, and "
            "the posterior is unchanged. Lower lr, raise damping, or check the batch."
        )
    whole, own = output.detach(), slice(None)
    if place is not None:
        own = slice(place[0], place[0] + len(output))
        whole = output.new_zeros(place[1], *output.shape[1:])
        whole[own] = output.detach()
    target = sampled_targets(likelihood, whole, generator)[own]
    averaged = target.numel() if likelihood.discrete else len(target)
    return likelihood.loss(output, target) * math.sqrt(averaged * len(target))


def sampled_targets(likelihood: Likelihood, output: Tensor, generator: Generator = None) -> Tensor:
    """Return targets drawn from the distribution that an output stands for.

    Args:
        likelihood: A likelihood that passes `check_likelihood`.
        output: Output of the network, in float32 or wider.
        generator: Source of the targets.
    """
    return _DRAWS[type(likelihood)](*likelihood.per_draw(output.detach()), generator)
