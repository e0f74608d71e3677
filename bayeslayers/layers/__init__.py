"""The torch.nn layers with a Gaussian posterior: each parameter is the mean, its precision a buffer beside it.

A plain call uses the means. Inside `sampled(model)` it uses the weights drawn for that scope, and
inside `tracked(model)` the backward pass also sums squared per-example gradients.
"""

from bayeslayers.layers.attention import BayesMultiheadAttention
from bayeslayers.layers.bags import BayesEmbeddingBag
from bayeslayers.layers.base import (
    DEFAULT_INIT_PRECISION,
    DEFAULT_PRIOR_PRECISION,
    POSTERIOR_SUFFIXES,
    BayesianLayer,
    attach_posterior,
)
from bayeslayers.layers.bilinear import BayesBilinear
from bayeslayers.layers.cells import BayesGRUCell, BayesLSTMCell, BayesRNNCell
from bayeslayers.layers.correlated import POSTERIOR_STRUCTURE, PRIOR_ROOTS, PRIOR_STRUCTURE, ROOTS, STRUCTURE
from bayeslayers.layers.linear import (
    BayesConv1d,
    BayesConv2d,
    BayesConv3d,
    BayesConvTranspose1d,
    BayesConvTranspose2d,
    BayesConvTranspose3d,
    BayesEmbedding,
    BayesLinear,
    can_draw_output,
)
from bayeslayers.layers.norms import (
    BayesBatchNorm1d,
    BayesBatchNorm2d,
    BayesBatchNorm3d,
    BayesFilterResponseNorm2d,
    BayesGroupNorm,
    BayesLayerNorm,
    FilterResponseNorm2d,
)
from bayeslayers.layers.recurrent import BayesGRU, BayesLSTM, BayesRNN
from bayeslayers.layers.standardised import BayesScaledConv2d, BayesStandardisedConv2d
from bayeslayers.layers.transposed import BayesTransposedLinear

__all__ = [
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
    "BayesScaledConv2d",
    "BayesStandardisedConv2d",
    "BayesTransposedLinear",
    "BayesianLayer",
    "DEFAULT_INIT_PRECISION",
    "DEFAULT_PRIOR_PRECISION",
    "FilterResponseNorm2d",
    "POSTERIOR_SUFFIXES",
    "POSTERIOR_STRUCTURE",
    "PRIOR_ROOTS",
    "PRIOR_STRUCTURE",
    "ROOTS",
    "STRUCTURE",
    "attach_posterior",
    "can_draw_output",
]
