"""The table of what `to_bayesian` converts: classes of `torch.nn`, each with its Bayesian version."""

from __future__ import annotations

from torch import nn

from bayeslayers import layers
from bayeslayers.layers import BayesianLayer

COUNTERPARTS: dict[type[nn.Module], type[BayesianLayer]] = {
    nn.Linear: layers.BayesLinear,
    nn.Conv1d: layers.BayesConv1d,
    nn.Conv2d: layers.BayesConv2d,
    nn.Conv3d: layers.BayesConv3d,
    nn.ConvTranspose1d: layers.BayesConvTranspose1d,
    nn.ConvTranspose2d: layers.BayesConvTranspose2d,
    nn.ConvTranspose3d: layers.BayesConvTranspose3d,
    nn.BatchNorm1d: layers.BayesBatchNorm1d,
    nn.BatchNorm2d: layers.BayesBatchNorm2d,
    nn.BatchNorm3d: layers.BayesBatchNorm3d,
    nn.GroupNorm: layers.BayesGroupNorm,
    nn.LayerNorm: layers.BayesLayerNorm,
    layers.FilterResponseNorm2d: layers.BayesFilterResponseNorm2d,
    nn.Embedding: layers.BayesEmbedding,
    nn.EmbeddingBag: layers.BayesEmbeddingBag,
    nn.Bilinear: layers.BayesBilinear,
    nn.MultiheadAttention: layers.BayesMultiheadAttention,
    nn.RNN: layers.BayesRNN,
    nn.LSTM: layers.BayesLSTM,
    nn.GRU: layers.BayesGRU,
    nn.RNNCell: layers.BayesRNNCell,
    nn.LSTMCell: layers.BayesLSTMCell,
    nn.GRUCell: layers.BayesGRUCell,
}
