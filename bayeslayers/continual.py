"""Continual learning: the posterior becomes the prior for the next task."""

from __future__ import annotations

from torch import nn

from bayeslayers.sampling import sites_of


def posterior_to_prior(model: nn.Module) -> None:
    """Make the posterior of every Bayesian layer its prior, in place, before training on the next task.

    Prior mean and precision become tensors of the weights' shape, so that KL(posterior || prior) is 0.
    Training on the next task then starts from what the previous tasks have taught.

    Source: Nguyen et al. 2018 (arXiv 1710.10628), variational continual learning, Eq. 2.

    Args:
        model: Model with Bayesian layers; existing optimisers see the new prior.

    Raises:
        ValueError: If no layer is Bayesian.
    """
    for site in sites_of(model):
        setattr(site.module, f"{site.key}_prior_mean", site.mean.detach().clone())
        setattr(site.module, f"{site.key}_prior_precision", site.precision.clone())
