"""Baselines of continual learning: a point estimate held near that of the task before, by L2 or by online EWC."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bayeslayers as bl
from bayeslayers.likelihoods import Likelihood
from recipes.data.examples import Examples, InOrder

_BATCH = 500


@dataclass(frozen=True)
class Penalised:
    """The loss of a likelihood, and minus the log density of the weights under priors that are earlier posteriors.

        loss + 1 / (2 N) sum prior_precision (w - prior_mean)^2

    Before the first task is learned there is no such prior, and nothing is added.

    Attributes:
        likelihood: The likelihood.
        model: The network.
        dataset_size: Training examples of the task, N.
    """

    likelihood: Likelihood
    model: nn.Module
    dataset_size: int

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the penalised mean loss of a batch."""
        pulls = [
            (site.prior_precision * (site.mean - site.prior_mean).square()).sum()
            for site in bl.posterior(self.model)
            if site.prior_is_posterior
        ]
        loss = self.likelihood.loss(output, target)
        return loss + torch.stack(pulls).sum() / (2 * self.dataset_size) if pulls else loss


def _equal(model: nn.Module, examples: Examples, strength: float, generator: torch.Generator) -> None:
    """Hold all weights equally, with a precision of `strength`."""
    for site in bl.posterior(model):
        site.precision.fill_(strength)
    bl.posterior_to_prior(model)


def _by_fisher(model: nn.Module, examples: Examples, strength: float, generator: torch.Generator) -> None:
    """Hold each weight by what its task's Fisher information adds to the precision of the tasks before (online EWC)."""
    batches = InOrder(examples, _BATCH, next(model.parameters()).device)
    fitted = bl.laplace(model, batches, prior_precision=None, fisher="sampled", generator=generator)
    precisions = {site.name: site.precision for site in bl.posterior(fitted)}
    for site in bl.posterior(model):
        site.precision.copy_(precisions[site.name])
    bl.posterior_to_prior(model, strength)


PENALTIES: dict[str, Callable[[nn.Module, Examples, float, torch.Generator], None]] = {
    "l2": _equal,
    "ewc": _by_fisher,
}


def remember(model: nn.Module, examples: Examples, penalty: str, strength: float, generator: torch.Generator) -> None:
    """Make the point estimate the prior mean of the next task, with the precisions of a penalty.

    Source: Kirkpatrick et al. 2017 (arXiv 1612.00796), EWC and L2; Schwarz et al. 2018 (arXiv 1805.06370), online EWC,
    here without decay.

    Args:
        model: Network after a task.
        examples: Training examples of that task.
        penalty: "l2" or "ewc".
        strength: Weight of the penalty.
        generator: Source of the labels of the Fisher information.
    """
    with torch.no_grad():
        PENALTIES[penalty](model, examples, strength, generator)
