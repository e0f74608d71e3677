"""Bayesian layers for PyTorch: weights that carry a precision beside their mean."""

from bayeslayers.card import Card, PosteriorError
from bayeslayers.checkpoint import load_posterior, save_posterior
from bayeslayers.layers import (
    BayesBatchNorm1d,
    BayesBatchNorm2d,
    BayesBatchNorm3d,
    BayesConv1d,
    BayesConv2d,
    BayesConv3d,
    BayesConvTranspose1d,
    BayesConvTranspose2d,
    BayesConvTranspose3d,
    BayesEmbedding,
    BayesGroupNorm,
    BayesianLayer,
    BayesLayerNorm,
    BayesLinear,
)
from bayeslayers.likelihoods import Bernoulli, Categorical, Gaussian
from bayeslayers.optim import VOGN
from bayeslayers.predict import Prediction, predict
from bayeslayers.sampling import kl_divergence, posterior, sampled, tracked

__all__ = [
    "BayesBatchNorm1d",
    "BayesBatchNorm2d",
    "BayesBatchNorm3d",
    "BayesConv1d",
    "BayesConv2d",
    "BayesConv3d",
    "BayesConvTranspose1d",
    "BayesConvTranspose2d",
    "BayesConvTranspose3d",
    "BayesEmbedding",
    "BayesGroupNorm",
    "BayesLayerNorm",
    "BayesLinear",
    "BayesianLayer",
    "Bernoulli",
    "Card",
    "Categorical",
    "Gaussian",
    "PosteriorError",
    "Prediction",
    "VOGN",
    "kl_divergence",
    "load_posterior",
    "posterior",
    "predict",
    "sampled",
    "save_posterior",
    "tracked",
]
__version__ = "0.1.0"
