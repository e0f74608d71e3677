"""The default of `predict`: outputs or weights, whichever costs less, each example as under sampled weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.prediction import automatic
from bayeslayers.prediction.automatic import automatic_draws, samples_outputs
from bayeslayers.prediction.chunks import AtOnce, Plan
from bayeslayers.prediction.draws import weight_draws
from bayeslayers.prediction.output_draws import NotOncePerExampleError

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLES = 1500


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(*shape):
    return torch.randn(*shape, generator=generator(1), dtype=torch.float64)


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Small layers sample their outputs too."""
    monkeypatch.setattr(automatic, "_CALL", 0.0)
    monkeypatch.setattr(automatic, "_PRODUCT", 0.0)


def network():
    torch.manual_seed(0)
    first, second = bl.BayesLinear(8, 20, init_precision=5.0), bl.BayesLinear(20, 16, init_precision=20.0)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), bl.BayesLinear(16, 3)).double()


def chosen(net, x):
    net.eval()
    with torch.no_grad():
        return set(automatic._chosen(net, x, AtOnce(net, Plan(4))))


def assert_equal_distributions(found, expected):
    error = (found.standard_error.square() + expected.standard_error.square()).sqrt()
    assert ((found.mean - expected.mean) / error).abs().max() < 5
    assert_close(found.standard_error, expected.standard_error, rtol=0.2, atol=0)
    assert_close(found.total, expected.total, rtol=0.1, atol=0.01)
    assert_close(found.epistemic, expected.epistemic, rtol=0.25, atol=2e-3)


def test_the_rule_counts_values_and_products(monkeypatch):
    assert [samples_outputs(n, 100, 50, first=False) for n in (1, 60, 70)] == [True, True, False]
    monkeypatch.setattr(automatic, "_PRODUCT", 0.1)
    assert [samples_outputs(n, 100, 50, first=False) for n in (1, 20, 40)] == [True, True, False]
    assert samples_outputs(10**6, 100, 50, first=True)
    monkeypatch.setattr(automatic, "_CALL", 1e6)
    assert not samples_outputs(1, 100, 50, first=False)


@pytest.mark.parametrize("rows, chunk", [(1, "auto"), (5, "auto"), (5, 50), (5, 1), (10, "auto")])
def test_each_example_is_predicted_as_by_sampled_weights(rows, chunk):
    net, x = network(), inputs(rows, 8)
    layers = {net[0], net[2], net[4]} if rows < 8 else {net[2]}
    assert chosen(net, x) == layers
    expected = bl.predict(net, x, SAMPLES, generator=generator(), method="sample")
    found = bl.predict(net, x, SAMPLES, method="auto", generator=generator(1), sample_chunk=chunk)
    assert_equal_distributions(found, expected)


def test_a_linear_model_is_exact():
    net, x = bl.BayesLinear(9, 2, init_precision=4.0).double(), inputs(6, 9)
    assert chosen(net, x) == {net}
    found = bl.predict(net, x, SAMPLES, likelihood=bl.Gaussian(0.1), method="auto", generator=generator())
    variance = (x.square().sum(1, keepdim=True) + 1).expand(6, 2) / 4
    assert ((found.mean - net(x).detach()) / (variance / SAMPLES).sqrt()).abs().max() < 5
    assert ((found.epistemic - variance) / (variance * math.sqrt(2 / SAMPLES))).abs().max() < 5


def test_a_networks_other_layers_sample_weights():
    torch.manual_seed(0)
    layers = [bl.BayesConv2d(2, 4, 3, padding=1), bl.BayesBatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    net = nn.Sequential(*layers, bl.BayesLinear(16, 8), nn.ReLU(), bl.BayesLinear(8, 3)).double()
    for site in bl.posterior(net):
        site.precision.fill_(20.0)
    x = inputs(4, 2, 4, 4)
    assert chosen(net, x) == {net[5], net[7]}
    expected = bl.predict(net, x, SAMPLES, generator=generator(), method="sample")
    assert_equal_distributions(bl.predict(net, x, SAMPLES, method="auto", generator=generator(1)), expected)


class Positions(nn.Module):
    """Layers that run otherwise than once on one row for each example."""

    def __init__(self):
        super().__init__()
        self.on_tokens, self.on_table = bl.BayesLinear(6, 6), bl.BayesLinear(6, 6)
        self.twice, self.folded, self.last = bl.BayesLinear(6, 6), bl.BayesLinear(6, 6), bl.BayesLinear(6, 5)
        self.register_buffer("table", torch.randn(4, 6))

    def forward(self, x):  # (n, 4, 6)
        x = self.on_tokens(x) + self.on_table(self.table)
        x = self.folded(x.flatten(0, 1)).view_as(x).tanh().mean(1)
        return self.last(self.twice(self.twice(x).tanh()))


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_layers_with_several_rows_for_an_example_sample_weights(rows):
    net, x = Positions().double(), inputs(rows, 4, 6)
    assert chosen(net, x) == {net.last}  # a batch of 4 has as many rows as the table
    expected = bl.predict(net, x, SAMPLES, generator=generator(), method="sample")
    assert_equal_distributions(bl.predict(net, x, SAMPLES, method="auto", generator=generator(1)), expected)


def test_tied_read_and_correlated_layers_sample_weights():
    net, x = network(), inputs(2, 8)
    net[2].is_read = True
    net[4].set_roots(*(0.1 * torch.eye(n, dtype=torch.float64) for n in (16, 3)))
    assert chosen(net, x) == {net[0]}
    tied = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    tied[2].weight = tied[0].weight
    tied = bl.to_bayesian(tied)[0].double()
    assert chosen(tied, x) == set()


class Halting(nn.Module):
    """Runs its layer again where a sample's output is large, so not at the means."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = bl.BayesLinear(8, 4, init_precision=2.0).double(), 0
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        output = self.layer(x)
        return self.layer(x + 1) if float(output.abs().max()) > 1e-3 else output


def test_a_layer_that_only_some_samples_use_twice_falls_back_to_weights():
    net, x = Halting(), inputs(3, 8)
    assert chosen(net, x) == {net.layer}
    expected = bl.predict(net, x, 500, generator=generator(), method="sample")
    found = bl.predict(net, x, 500, method="auto", generator=generator(1))
    error = (found.standard_error.square() + expected.standard_error.square()).sqrt()
    assert ((found.mean - expected.mean) / error).abs().max() < 5
    with pytest.raises(NotOncePerExampleError), torch.no_grad():
        [list(run(x)) for run in automatic_draws(net, Plan(4), x)]


class OfWholeBatches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = bl.BayesLinear(8, 3).double()

    def forward(self, x):
        assert len(x) == 5
        return self.layer(x)


def test_a_network_without_such_layers_is_not_inspected(monkeypatch):
    monkeypatch.setattr(automatic, "_CALL", 1e9)
    net, calls = network().eval(), []
    net.register_forward_hook(lambda *_: calls.append(1))
    bl.predict(net, inputs(2, 8), 3, sample_chunk=1)
    assert len(calls) == 3


def test_a_network_that_takes_no_single_example_samples_weights():
    net, x = OfWholeBatches(), inputs(5, 8)
    assert chosen(net, x) == set()
    expected = bl.predict(net, x, 6, generator=generator(), method="sample")
    assert_close(bl.predict(net, x, 6, method="auto", generator=generator()).mean, expected.mean)


def test_the_same_arguments_give_the_same_numbers():
    net, x = network(), inputs(3, 8)
    first, second = (bl.predict(net, x, 9, method="auto", generator=generator()) for _ in range(2))
    assert torch.equal(first.mean, second.mean) and torch.equal(first.total, second.total)
    assert not torch.equal(first.mean, bl.predict(net, x, 9, generator=generator(), method="sample").mean)


def test_whole_networks_where_samples_are_shared_or_come_in_pairs():
    net, x = network(), inputs(4, 8)
    for options in ({"batch_size": 2}, {"antithetic": True}, {"tolerance": 10.0}):
        found = bl.predict(net, x, 32, method="auto", generator=generator(), **options)
        expected = bl.predict(net, x, 32, generator=generator(), method="sample", **options)
        assert torch.equal(found.mean, expected.mean)
    streamed = bl.predict(net, [x[:2], x[2:]], 32, method="auto", generator=generator())
    assert_close(streamed.mean, bl.predict(net, x, 32, generator=generator(), method="sample").mean)


def test_evaluations_keep_the_samples_of_whole_networks():
    net, x = network(), inputs(4, 8)
    y = torch.tensor([0, 1, 2, 0])
    found = bl.evaluate(net, (x, y), num_samples=32, generator=generator())
    expected = bl.evaluate(net, (x, y), num_samples=32, generator=generator(), method="sample")
    automatic_ = bl.evaluate(net, (x, y), num_samples=32, generator=generator(), method="auto")
    assert found.metrics["nll"] == expected.metrics["nll"] != automatic_.metrics["nll"]


def test_the_inspection_takes_the_place_of_a_lone_first_sample():
    net, x = network().eval(), inputs(2, 8)
    with torch.no_grad():
        pieces = [len(piece) for run in automatic_draws(net, Plan(40), x) for piece in run(x)]
        others = [len(piece) for run in weight_draws(net, Plan(40)) for piece in run(x)]
    assert pieces == [20, 20] and others == [1, 20, 19]


@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_of_several_samples_are_those_of_each(rows, bias):
    torch.manual_seed(0)
    net = [bl.BayesConv2d(2, 4, 3, bias=bias), nn.ReLU(), bl.BayesConv2d(4, 4, 3, groups=2, bias=bias), nn.ReLU()]
    net = nn.Sequential(*net, bl.BayesConvTranspose2d(4, 3, 2, stride=2, bias=bias)).double()
    x = inputs(rows, 2, 7, 7)
    one, several = (bl.predict(net, x, 6, method="auto", generator=generator(), sample_chunk=chunk) for chunk in (1, 3))
    assert_close(one.mean, several.mean)
    assert_close(one.epistemic, several.epistemic)
    net[2].weight_precision = None  # its weight is then the same for all samples
    del net[2]._buffers["weight_precision"]
    one, several = (bl.predict(net, x, 6, method="auto", generator=generator(), sample_chunk=chunk) for chunk in (1, 3))
    assert_close(one.mean, several.mean)


def test_a_generator_asks_for_the_numbers_of_whole_networks():
    net, x = network(), inputs(4, 8)
    found = bl.predict(net, x, 9, generator=generator())
    assert torch.equal(found.mean, bl.predict(net, x, 9, generator=generator(), method="sample").mean)
    assert not torch.equal(found.mean, bl.predict(net, x, 9, generator=generator(), method="auto").mean)
