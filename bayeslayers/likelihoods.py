"""Likelihoods: the training loss, the predictive distribution of one posterior sample, and labels drawn from it.

A likelihood gives a predictive mean and an aleatoric uncertainty per posterior sample; `predict` averages both
over samples, and `split` completes the decomposition total = aleatoric + epistemic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayeslayers.checks import did_you_mean, positive
from bayeslayers.dtypes import at_least_float32
from bayeslayers.unwrap import unwrapping


class Likelihood(Protocol):
    """p(target | output of the network)."""

    name: ClassVar[str]
    discrete: ClassVar[bool]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean negative log-likelihood over the batch, in nats."""
        ...

    def per_draw(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predictive mean and the aleatoric uncertainty under one sample of the weights."""
        ...

    def split(self, mean: Tensor, variance: Tensor, aleatoric: Tensor) -> tuple[Tensor, Tensor]:
        """Return the total and the epistemic uncertainty from averages over posterior samples.

        Args:
            mean: Mean over samples of the predictive mean.
            variance: Variance over samples of the predictive mean.
            aleatoric: Mean over samples of the aleatoric uncertainty.
        """
        ...


@dataclass(frozen=True)
class Categorical:
    """Classes in dimension 1 of the logits: `(n, c)`, or `(n, c, *)` with a label per position.

    Uncertainties are entropies in nats, per example or position: total H(E[p]), aleatoric E[H(p)],
    epistemic their difference, the mutual information of label and weights.
    Source: Depeweg et al. 2018 (arXiv 1710.07283), Eq. 4; Houlsby et al. 2011 (arXiv 1112.5745).
    """

    name: ClassVar[str] = "categorical"
    discrete: ClassVar[bool] = True

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy; `target` holds class indices, `(n,)` or `(n, *)`."""
        return F.cross_entropy(_with_classes(output), target)

    def per_draw(self, output: Tensor) -> tuple[Tensor, Tensor]:
        probs = _with_classes(output).softmax(1)
        return probs, torch.special.entr(probs).sum(1)

    def split(self, mean: Tensor, variance: Tensor, aleatoric: Tensor) -> tuple[Tensor, Tensor]:
        return _mutual_information(torch.special.entr(mean).sum(1), aleatoric)


@dataclass(frozen=True)
class Bernoulli:
    """A binary label per element of the logits, of any shape `(n, *)`; probabilities are those of the label 1.

    Uncertainties are entropies in nats, as for `Categorical`.
    """

    name: ClassVar[str] = "bernoulli"
    discrete: ClassVar[bool] = True

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean binary cross entropy; `target` is 0 or 1 in the shape of `output`."""
        _same_shape(output, target)
        return F.binary_cross_entropy_with_logits(output, target.to(output.dtype))

    def per_draw(self, output: Tensor) -> tuple[Tensor, Tensor]:
        prob = output.sigmoid()
        return prob, _binary_entropy(prob)

    def split(self, mean: Tensor, variance: Tensor, aleatoric: Tensor) -> tuple[Tensor, Tensor]:
        return _mutual_information(_binary_entropy(mean), aleatoric)


@dataclass(frozen=True)
class Gaussian:
    """A real target with Gaussian noise, whose variance is either known or predicted by the network.

    Uncertainties are variances in the target's squared units: aleatoric E[noise variance], epistemic
    Var[mean], total their sum (Kendall & Gal 2017, arXiv 1703.04977, Eq. 9).

    Args:
        variance: Variance of the noise, > 0; the output is then the mean. With None, the output holds
            the mean in the first half of dimension 1 and the log variance in the second half.
    """

    variance: float | None = None
    name: ClassVar[str] = "gaussian"
    discrete: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.variance is not None:
            positive("variance", self.variance)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the negative log density, summed over an example's elements and averaged over examples."""
        mean, variance = self.per_draw(output)
        _same_shape(mean, target)
        density = 0.5 * ((target - mean).square() / variance + (2 * math.pi * variance).log())
        return density.sum() / len(target)

    def per_draw(self, output: Tensor) -> tuple[Tensor, Tensor]:
        if self.variance is not None:
            return output, torch.full_like(output, self.variance)
        if output.dim() < 2 or output.shape[1] % 2:
            raise ValueError(
                f"output must hold means and log variances in two halves of dimension 1, got shape "
                f"{tuple(output.shape)}. Double the network's last layer, or give Gaussian a variance."
            )
        mean, log_variance = output.chunk(2, dim=1)
        return mean, log_variance.exp()

    def split(self, mean: Tensor, variance: Tensor, aleatoric: Tensor) -> tuple[Tensor, Tensor]:
        return aleatoric + variance, variance


KINDS: dict[str, type[Categorical] | type[Bernoulli] | type[Gaussian]] = {
    kind.name: kind for kind in (Categorical, Bernoulli, Gaussian)
}


def likelihood_named(name: str) -> Likelihood:
    """Return the likelihood of that name."""
    if name not in KINDS:
        raise ValueError(f"unknown likelihood {name!r}.{did_you_mean(name, KINDS)} Known: {', '.join(KINDS)}.")
    return KINDS[name]()


def likelihood_of(model: nn.Module) -> Likelihood:
    """Return `model.likelihood`, or that of the network inside torch's wrappers, else `Categorical()`."""
    found = (getattr(module, "likelihood", None) for module in unwrapping(model))
    return next((likelihood for likelihood in found if likelihood is not None), Categorical())


def _with_classes(output: Tensor) -> Tensor:
    if output.dim() < 2 or output.shape[1] < 2:
        raise ValueError(
            f"output must have two or more classes in dimension 1, got shape {tuple(output.shape)}. "
            "For one logit per example use Bernoulli()."
        )
    return output


def _same_shape(output: Tensor, target: Tensor) -> None:
    if output.shape != target.shape:
        raise ValueError(f"target must have the shape {tuple(output.shape)}, got {tuple(target.shape)}.")


def _mutual_information(total: Tensor, aleatoric: Tensor) -> tuple[Tensor, Tensor]:
    # The difference is non-negative by Jensen's inequality; only rounding can make it negative.
    return total, (total - aleatoric).clamp_min(0)


def _binary_entropy(prob: Tensor) -> Tensor:
    return torch.special.entr(prob) + torch.special.entr(1 - prob)


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


def sampled_loss(likelihood: Likelihood, output: Tensor, generator: Generator = None) -> Tensor:
    """Return a loss at labels drawn from the output, whose mean squared gradient is the curvature of the true loss.

    It is the sum over examples of the negative log-likelihood. If `likelihood.loss` also averages over the
    k elements of an example, such as pixels, then the loss and its curvature are 1/k of a log-likelihood's;
    gradients that are squared then have the factor 1/sqrt(k).

    Args:
        likelihood: A likelihood that passes `check_likelihood`.
        output: Output of the network.
        generator: Source of the labels.

    Raises:
        FloatingPointError: If the output is not finite.
    """
    output = at_least_float32(output)
    if bad := int((~output.isfinite()).sum()):
        raise FloatingPointError(
            f"the output must be finite, got {bad} of {output.numel()} values that are not. The step is rejected, and "
            "the posterior is unchanged. Lower lr, raise damping, or check the batch."
        )
    target = _DRAWS[type(likelihood)](*likelihood.per_draw(output.detach()), generator)
    averaged = target.numel() if likelihood.discrete else len(target)
    return likelihood.loss(output, target) * math.sqrt(averaged * len(target))
