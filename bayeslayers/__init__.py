"""Bayesian layers for PyTorch: weights that carry a precision beside their mean."""

from types import ModuleType

from bayeslayers import distributed, plots
from bayeslayers.conformal import ConformalFit, conformal
from bayeslayers.continual import posterior_to_prior
from bayeslayers.convert import ConversionReport, last_layer, norms, register_rule, to_bayesian, to_deterministic
from bayeslayers.corruptions import corrupt
from bayeslayers.diagnosis import Diagnosis, Finding, TensorDiagnosis, diagnose
from bayeslayers.evaluate import Evaluation, evaluate
from bayeslayers.export import to_exported, to_onnx
from bayeslayers.inputs import Inputs
from bayeslayers.laplace import LaplaceFit, laplace
from bayeslayers.layers import (
    BayesBatchNorm1d,
    BayesBatchNorm2d,
    BayesBatchNorm3d,
    BayesBilinear,
    BayesConv1d,
    BayesConv2d,
    BayesConv3d,
    BayesConvTranspose1d,
    BayesConvTranspose2d,
    BayesConvTranspose3d,
    BayesEmbedding,
    BayesEmbeddingBag,
    BayesFilterResponseNorm2d,
    BayesGroupNorm,
    BayesGRU,
    BayesGRUCell,
    BayesianLayer,
    BayesLayerNorm,
    BayesLinear,
    BayesLSTM,
    BayesLSTMCell,
    BayesMultiheadAttention,
    BayesRNN,
    BayesRNNCell,
    attach_posterior,
)
from bayeslayers.likelihoods import Bernoulli, Categorical, Gaussian
from bayeslayers.merge import merge
from bayeslayers.metrics.corrupted import CorruptionMetrics
from bayeslayers.optim import BBB, IVON, KFAC, OGN, SWAG, VOGN, NoisyKFAC
from bayeslayers.prediction import Prediction, SlidingWindow, predict
from bayeslayers.prediction.linearised import linearised_moments, linearised_outputs
from bayeslayers.recalibrate import Recalibration, recalibrate
from bayeslayers.sampling import kl_divergence, posterior, sampled, tracked
from bayeslayers.storage.adapters import load_adapters, save_adapters
from bayeslayers.storage.card import Card, PosteriorError
from bayeslayers.storage.posterior import load_posterior, save_posterior

__all__ = [
    "BBB",
    "BayesBatchNorm1d",
    "BayesBatchNorm2d",
    "BayesBatchNorm3d",
    "BayesBilinear",
    "BayesConv1d",
    "BayesConv2d",
    "BayesConv3d",
    "BayesConvTranspose1d",
    "BayesConvTranspose2d",
    "BayesConvTranspose3d",
    "BayesEmbedding",
    "BayesEmbeddingBag",
    "BayesFilterResponseNorm2d",
    "BayesGRU",
    "BayesGRUCell",
    "BayesGroupNorm",
    "BayesLSTM",
    "BayesLSTMCell",
    "BayesLayerNorm",
    "BayesLinear",
    "BayesMultiheadAttention",
    "BayesRNN",
    "BayesRNNCell",
    "BayesianLayer",
    "Bernoulli",
    "Card",
    "Categorical",
    "ConformalFit",
    "ConversionReport",
    "CorruptionMetrics",
    "Diagnosis",
    "Evaluation",
    "Finding",
    "Gaussian",
    "IVON",
    "Inputs",
    "LaplaceFit",
    "KFAC",
    "NoisyKFAC",
    "OGN",
    "PosteriorError",
    "Prediction",
    "Recalibration",
    "SlidingWindow",
    "SWAG",
    "TensorDiagnosis",
    "VOGN",
    "attach_posterior",
    "conformal",
    "corrupt",
    "diagnose",
    "distributed",
    "evaluate",
    "kl_divergence",
    "laplace",
    "last_layer",
    "linearised_moments",
    "linearised_outputs",
    "load_adapters",
    "load_posterior",
    "merge",
    "norms",
    "plots",
    "posterior",
    "posterior_to_prior",
    "predict",
    "recalibrate",
    "register_rule",
    "sampled",
    "save_adapters",
    "save_posterior",
    "to_bayesian",
    "to_deterministic",
    "to_exported",
    "to_onnx",
    "tracked",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    """Return the zoo, which is imported only when `bayeslayers.zoo` is first asked for."""
    if name == "zoo":
        import bayeslayers.zoo as zoo

        return zoo
    raise AttributeError(f"module 'bayeslayers' has no attribute {name!r}")
