"""Real targets with Gaussian noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayeslayers.checks import positive
from bayeslayers.likelihoods.base import same_shape


@dataclass(frozen=True)
class Gaussian:
    """A real target with Gaussian noise, whose variance is either known or predicted by the network.

    One variance for all examples that training learns is a parameter of the network, which then gives its log as the
    second half of its output: the last module of `zoo.create("regressor")` does.

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
        return -self.log_prob(output, target).mean()

    def log_prob(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the log density of each example's target, summed over its elements, `(n,)`."""
        mean, variance = self.per_draw(output)
        same_shape(mean, target)
        density = 0.5 * ((target - mean).square() / variance + (2 * math.pi * variance).log())
        return -density.flatten(1).sum(1) if density.dim() > 1 else -density

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
