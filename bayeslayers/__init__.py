"""Bayesian layers for PyTorch: weights that carry a precision beside their mean."""

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
from bayeslayers.optim import VOGN
from bayeslayers.sampling import kl_divergence, posterior, sampled, tracked
