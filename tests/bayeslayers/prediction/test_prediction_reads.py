"""How often a prediction waits for the device."""

from __future__ import annotations

import math

import pytest
import torch
from support.sync import reads_of_device
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.prediction.output_draws import OncePerExample

pytestmark = pytest.mark.usefixtures("one_thread")


def network(depth, width=300):
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, width), nn.ReLU(), *layers, nn.Dropout(0.1), nn.Linear(width, 2))
    return bl.to_bayesian(net)[0]


@pytest.mark.parametrize("method", ["auto", "sample", "mean", "local", "moments", "linearised", "dropout"])
def test_inputs_and_results_are_read_once_each_whatever_the_depth(method):
    for depth in (1, 4):
        with reads_of_device() as reads:
            bl.predict(network(depth), torch.randn(5, 2, 2), 40, method=method)
        assert len(reads) == 2


def test_batches_of_one_tensor_are_read_together():
    with reads_of_device() as reads:
        bl.predict(network(1), torch.randn(50, 4), 4, batch_size=10)
    assert len(reads) == 2


def test_samples_of_the_first_layer_s_outputs_compare_no_inputs(monkeypatch):
    net, kept = network(1), []
    original = OncePerExample._moments
    monkeypatch.setattr(OncePerExample, "_moments", lambda self, *args: (kept.append(1), original(self, *args))[1])
    with reads_of_device() as reads:
        bl.predict(net, torch.randn(5, 2, 2), 64)
    assert kept  # some layer sampled its outputs
    assert not [read for read in reads if read.endswith("equal")]


def test_moments_are_those_of_the_present_input():
    layer = bl.BayesLinear(3, 2)
    outputs = OncePerExample({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, 4, True)
    op = torch.nn.functional.linear

    def mean(x):
        return outputs.moments(op, x, layer.weight, layer.bias)[0]

    x = torch.randn(4, 3)
    with torch.no_grad():
        first = mean(x)
        with reads_of_device() as reads:
            assert mean(x) is first
            assert mean(x.view(4, 3)) is first
        assert reads == []
        assert mean(x.clone()) is first  # other memory is compared
        x.add_(1)
        assert_close(mean(x), op(x, layer.weight, layer.bias))
        assert_close(mean(x.t().contiguous().t()), op(x, layer.weight, layer.bias))
        with torch.inference_mode():
            own = torch.randn(4, 3)
            assert mean(own) is mean(own)
            assert_close(mean(own + 1), op(own + 1, layer.weight, layer.bias))


@pytest.mark.parametrize("batch", [0, 2])
def test_the_first_batch_that_is_not_finite_is_named(batch):
    net = network(1)
    x = torch.randn(15, 4)
    x[5 * batch + 3] = 3e38
    with pytest.raises(FloatingPointError, match=rf"in 1 of 5 examples of batch {batch}, the first of them 3\."):
        bl.predict(net, x, 4, batch_size=5)
    x[4, 0] = math.nan
    with pytest.raises(ValueError, match="x must be finite, got 1 of 60 values"):
        bl.predict(net, x, 4, batch_size=5)
