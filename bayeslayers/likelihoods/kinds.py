"""The likelihoods by name, and that of a model."""

from __future__ import annotations

from torch import nn

from bayeslayers.checks import did_you_mean
from bayeslayers.likelihoods.base import Likelihood
from bayeslayers.likelihoods.bernoulli import Bernoulli
from bayeslayers.likelihoods.categorical import Categorical
from bayeslayers.likelihoods.gaussian import Gaussian
from bayeslayers.unwrap import unwrapping

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
