"""Prediction by averaging over draws of the weights, with its uncertainty taken apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bayeslayers.checks import at_least_one
from bayeslayers.likelihoods import Bernoulli, Likelihood, likelihood_of
from bayeslayers.sampling import Sampler, posterior

_WAITING_DRAWS, _WAITING_VALUES = 16, 2**16  # whose outputs memory may hold beside their averages


@dataclass(frozen=True)
class Prediction:
    """What the posterior predicts for a batch.

    Attributes:
        mean: Posterior predictive mean: class probabilities `(n, c, *)`, the probability of yes
            `(n, *)`, or the mean of a real target.
        total: Total uncertainty: an entropy in nats `(n, *)`, or a variance.
        aleatoric: The part that is noise in the data: more training data would not remove it.
        epistemic: The part that is ignorance of the weights, `total - aleatoric`, >= 0.
        standard_error: Monte-Carlo standard error of `mean`; NaN from a single draw.
        num_samples: Draws averaged.
        likelihood: The likelihood that gives these numbers their meaning.
    """

    mean: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    standard_error: Tensor
    num_samples: int
    likelihood: Likelihood

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def probs(self) -> Tensor:
        """Probabilities, `(n, c, *)` for classes, `(n, *)` for yes or no."""
        if not self.likelihood.discrete:
            raise AttributeError("probs: a Gaussian prediction has a mean and variances, no probabilities.")
        return self.mean

    @property
    def labels(self) -> Tensor:
        """The most probable class, or 1 where yes is more probable than no."""
        return (self.probs > 0.5).long() if isinstance(self.likelihood, Bernoulli) else self.probs.argmax(1)

    @property
    def confidence(self) -> Tensor:
        """Probability of `labels`, in [0, 1]."""
        if isinstance(self.likelihood, Bernoulli):
            return torch.maximum(self.probs, 1 - self.probs)
        return self.probs.amax(1)


def predict(
    model: nn.Module,
    x: Tensor,
    num_samples: int = 64,
    *,
    likelihood: Likelihood | None = None,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    method: Literal["sample", "mean"] = "sample",
) -> Prediction:
    """Return the posterior predictive distribution for a batch, averaged over draws of the weights.

    Draws stream: memory does not grow with `num_samples`. The model runs in eval mode, and every
    module's own mode is restored.

    Args:
        model: Model with Bayesian layers.
        x: Inputs, examples in dimension 0; moved to the model's device.
        num_samples: Draws, >= 1.
        likelihood: Meaning of the outputs; None takes `model.likelihood`, else `Categorical()`.
        batch_size: Examples per forward pass; None takes all at once. Each draw serves all batches.
        generator: Source of the draws, on the model's device; torch's default one if None.
        method: "sample" averages over draws; "mean" is one pass with the posterior means, whose
            epistemic part is 0.

    Raises:
        ValueError: If `x` is empty or not finite, `num_samples` < 1, the method is unknown, or no
            layer is Bayesian.

    Example:
        >>> import torch, bayeslayers as bl
        >>> prediction = bl.predict(bl.BayesLinear(4, 3), torch.randn(5, 4), num_samples=8)
        >>> prediction.probs.shape, prediction.labels.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """
    at_least_one("num_samples", num_samples)
    _check_input(x)
    if method not in ("sample", "mean"):
        raise ValueError(f"method must be 'sample' or 'mean', got {method!r}.")
    sites = list(posterior(model))
    if not sites:
        raise ValueError("model must have Bayesian layers, got none: every draw would be the same.")
    likelihood = likelihood or likelihood_of(model)
    batches = x.to(sites[0].mean.device).split(
        at_least_one("batch_size", batch_size) if batch_size is not None else len(x)
    )
    averages = [_Average(likelihood) for _ in batches]
    if method == "mean":
        num_samples, draw = 1, nullcontext
    else:
        draw = Sampler(sites, generator, frozen=True).draw
    with torch.no_grad(), evaluation_mode(model):
        for _ in range(num_samples):
            with draw():
                for average, batch in zip(averages, batches, strict=True):
                    average.add(model(batch))
    parts = [average.result() for average in averages]
    mean, total, aleatoric, epistemic, error = (torch.cat(column) for column in zip(*parts, strict=True))
    return Prediction(mean, total, aleatoric, epistemic, error, num_samples, likelihood)


class _Average:
    """Running mean and variance over draws (Chan et al. 1983), which do not cancel as a sum of squares does.

    Small outputs wait for those of further draws: the operations cost more than the numbers in them.
    """

    count = 0
    mean: Tensor
    squares: Tensor  # sum of squared deviations from the mean
    aleatoric: Tensor

    def __init__(self, likelihood: Likelihood):
        self.likelihood = likelihood
        self._waiting: list[Tensor] = []

    def add(self, output: Tensor) -> None:
        self._waiting.append(output)
        if len(self._waiting) >= min(_WAITING_DRAWS, _WAITING_VALUES / output.numel()):
            self._merge()

    def _merge(self) -> None:
        draws = len(self._waiting)
        means, noise = (part.unflatten(0, (draws, -1)) for part in self.likelihood.per_draw(torch.cat(self._waiting)))
        self._waiting = []
        mean, aleatoric = means.mean(0), noise.mean(0)
        squares = (means - mean).square().sum(0)
        if self.count == 0:
            self.mean, self.squares, self.aleatoric = mean, squares, aleatoric
        else:
            share = draws / (self.count + draws)
            deviation = mean - self.mean
            self.mean += share * deviation
            self.squares += squares + share * self.count * deviation.square()
            self.aleatoric += share * (aleatoric - self.aleatoric)
        self.count += draws

    def result(self) -> tuple[Tensor, ...]:
        """Return mean, total, aleatoric, epistemic and the standard error of the mean."""
        if self._waiting:
            self._merge()
        total, epistemic = self.likelihood.split(self.mean, self.squares / self.count, self.aleatoric)
        error = (self.squares / (self.count - 1) / self.count).sqrt() if self.count > 1 else self.mean * math.nan
        return self.mean, total, self.aleatoric, epistemic, error


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode inside the scope, and each of its modules back in its own mode after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _check_input(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}. torch.as_tensor converts arrays.")
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(f"x must hold at least one example in dimension 0, got shape {tuple(x.shape)}.")
    if x.is_floating_point() and (bad := int((~x.isfinite()).sum())):
        raise ValueError(f"x must be finite, got {bad} of {x.numel()} values that are NaN or infinite.")
