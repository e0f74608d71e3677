"""Layers of one, three and four tensors under names of their own, each with no more of a rule than its forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import bayeslayers as bl
from bayeslayers.curvature import CurvatureRule


class Gain(nn.Module):
    """One tensor: a factor per feature."""

    def __init__(self, features: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(features))

    def forward(self, x):
        return x * self.gain


class LowRank(nn.Module):
    """Three tensors: a linear map of low rank, and a shift."""

    def __init__(self, features: int, rank: int, outputs: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(features, rank))
        self.up = nn.Parameter(torch.randn(rank, outputs))
        self.shift = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return (x @ self.down) @ self.up + self.shift


class _GainRule(CurvatureRule):
    tensors = ("gain",)

    def forward(self, inputs, tensors, settings):
        return inputs[0] * tensors[0]


class _LowRankRule(CurvatureRule):
    tensors = ("down", "up", "shift")

    def forward(self, inputs, tensors, settings):
        down, up, shift = tensors
        return (inputs[0] @ down) @ up + shift


class _CellRule(CurvatureRule):
    """Four tensors: the cell of an Elman network."""

    tensors = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def forward(self, inputs, tensors, settings):
        (x, h), (weight_ih, weight_hh, bias_ih, bias_hh) = inputs, tensors
        return torch.tanh(F.linear(x, weight_ih, bias_ih) + F.linear(h, weight_hh, bias_hh))


class BayesGain(bl.BayesianLayer, Gain):
    rule = _GainRule()

    def forward(self, x):
        return self.compute(x)


class BayesLowRank(bl.BayesianLayer, LowRank):
    rule = _LowRankRule()

    def forward(self, x):
        return self.compute(x)


class BayesCell(bl.BayesianLayer, nn.RNNCell):
    rule = _CellRule()

    def forward(self, input, hx=None):
        return self.compute(input, input.new_zeros(*input.shape[:-1], self.hidden_size) if hx is None else hx)


class Net(nn.Module):
    """All three in one network."""

    def __init__(self):
        super().__init__()
        self.gain, self.cell, self.head = Gain(3), nn.RNNCell(3, 4), LowRank(4, 2, 2)

    def forward(self, x):
        return self.head(self.cell(self.gain(x), 0.1 * torch.ones(len(x), 4, dtype=x.dtype)))


PAIRS = {Gain: BayesGain, LowRank: BayesLowRank, nn.RNNCell: BayesCell}
