"""Likelihoods: the training loss, the predictive distribution of one posterior sample, and labels drawn from it.

A likelihood gives a predictive mean and an aleatoric uncertainty per posterior sample; `predict` averages both
over samples, and `split` completes the decomposition total = aleatoric + epistemic.
"""

from bayeslayers.likelihoods.base import Likelihood
from bayeslayers.likelihoods.bernoulli import Bernoulli
from bayeslayers.likelihoods.categorical import Categorical
from bayeslayers.likelihoods.gaussian import Gaussian
from bayeslayers.likelihoods.kinds import KINDS, likelihood_named, likelihood_of
from bayeslayers.likelihoods.sampled import check_likelihood, sampled_loss, sampled_targets

__all__ = [
    "KINDS",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "check_likelihood",
    "likelihood_named",
    "likelihood_of",
    "sampled_loss",
    "sampled_targets",
]
