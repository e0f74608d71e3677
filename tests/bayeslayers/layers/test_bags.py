"""Bags of embeddings: exact curvature for each bag, in every mode, whole or by offsets."""

from __future__ import annotations

import pytest
import torch
from support.per_example import EXACT, F64, bayesian, potential, squares_by_autograd, tracked_squares
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl

IDS = torch.tensor([[1, 1, 0, 3], [2, 5, 5, 5], [0, 0, 0, 0]])


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_squares_are_exact(mode, padding):
    net = bayesian(nn.Sequential(nn.EmbeddingBag(6, 3, mode=mode, padding_idx=padding), nn.Tanh(), nn.Linear(3, 2)))

    def loss(net, ids):
        return potential(net(ids))

    assert_close(tracked_squares(net, loss, IDS), squares_by_autograd(net, loss, IDS), **EXACT)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("last", [True, False])
def test_a_sample_of_bags_by_offsets_is_that_of_the_ordinary_layer(mode, last):
    ordinary = nn.EmbeddingBag(6, 3, mode=mode, include_last_offset=last, padding_idx=5).double()
    net = bl.to_bayesian(ordinary)[0]
    ids, offsets = IDS.flatten(), torch.tensor([0, 4, 4, 9, *([12] if last else [])])
    weights = torch.rand(12, **F64) if mode == "sum" else None
    with bl.sampled(net, noise={"weight": torch.zeros(6, 3, **F64)}):
        assert_close(net(ids, offsets, weights), ordinary(ids, offsets, per_sample_weights=weights))
        if not last:
            assert_close(net(IDS), ordinary(IDS))
