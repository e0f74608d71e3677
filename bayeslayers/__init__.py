"""Bayesian layers for PyTorch: weights that carry a precision beside their mean."""

from bayeslayers.card import Card, PosteriorError
from bayeslayers.checkpoint import load_posterior, save_posterior
from bayeslayers.convert import ConversionReport, last_layer, norms, register_rule, to_bayesian, to_deterministic
from bayeslayers.export import to_exported, to_onnx
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
    BayesFilterResponseNorm2d,
    BayesGroupNorm,
    BayesianLayer,
    BayesLayerNorm,
    BayesLinear,
)
from bayeslayers.likelihoods import Bernoulli, Categorical, Gaussian
from bayeslayers.merge import merge, posterior_to_prior
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
    "BayesFilterResponseNorm2d",
    "BayesGroupNorm",
    "BayesLayerNorm",
    "BayesLinear",
    "BayesianLayer",
    "Bernoulli",
    "Card",
    "Categorical",
    "ConversionReport",
    "Gaussian",
    "PosteriorError",
    "Prediction",
    "VOGN",
    "kl_divergence",
    "last_layer",
    "load_posterior",
    "merge",
    "norms",
    "posterior",
    "posterior_to_prior",
    "predict",
    "register_rule",
    "sampled",
    "save_posterior",
    "to_bayesian",
    "to_deterministic",
    "to_exported",
    "to_onnx",
    "tracked",
]
__version__ = "0.1.0"
