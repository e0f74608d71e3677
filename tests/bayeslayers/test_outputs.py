"""What a network returns is checked wherever it is called: one tensor of real numbers, none NaN or infinite."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.export import FixedDraws
from bayeslayers.outputs import tensor_output

X, Y = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


class ModelOutput(OrderedDict):
    """Stands for the outputs of Hugging Face's models."""


@dataclass
class Wrapped:
    logits: torch.Tensor


KINDS = {
    "tuple": (lambda out: (out, out), "tuple of Tensor, Tensor"),
    "list": (lambda out: [out], "list of Tensor"),
    "dict": (lambda out: {"out": out, "aux": out}, "dict of 'out', 'aux'"),
    "mapping": (lambda out: ModelOutput(scores=out), "ModelOutput of 'scores'"),
    "object": (Wrapped, "Wrapped"),
    "none": (lambda out: None, "None"),
    "labels": (lambda out: out.argmax(1), "one of torch.int64"),
    "number": (lambda out: out.sum(), "a single number"),
    "empty": (lambda out: (), "tuple of nothing"),
}


class Network(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.dropout, self.layer, self.kind = nn.Dropout(0.5), bl.BayesLinear(2, 3), kind

    def forward(self, x):
        return KINDS[self.kind][0](self.layer(self.dropout(x)))


ENTRANCES = {
    **{
        f"predict {method}": lambda net, method=method: bl.predict(net, X, 4, method=method)
        for method in ("sample", "mean", "local", "moments", "dropout")
    },
    "several draws": lambda net: bl.predict(net, X, 4, sample_chunk=4),
    "predict linearised": lambda net: bl.predict(net, X, 4, method="linearised"),
    "linearised_moments": lambda net: bl.linearised_moments(net, X),
    "linearised_outputs": lambda net: bl.linearised_outputs(net, X, 2),
    "evaluate": lambda net: bl.evaluate(net, (X, Y), num_samples=2),
    "recalibrate": lambda net: bl.recalibrate(net, (X, Y), num_samples=2),
    "laplace": lambda net: bl.laplace(net, (X, Y)),
    "to_exported": lambda net: bl.to_exported(net, X, 2),
    "FixedDraws": lambda net: FixedDraws(net, 2)(X),
    "decision_boundary": lambda net: bl.plots.decision_boundary(net, X, Y, draws=1, grid=4),
    "decision_boundary of a baseline": lambda net: bl.plots.decision_boundary(
        bl.BayesLinear(2, 3), X, Y, draws=1, grid=4, baseline=net
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_output_is_one_sentence(kind):
    make, found = KINDS[kind]
    with pytest.raises(TypeError, match="the model's output must be a tensor of real numbers") as caught:
        tensor_output(make(torch.randn(4, 3)))
    assert f"got {found}. " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("entrance", ENTRANCES.values(), ids=ENTRANCES)
@pytest.mark.parametrize("kind", ["tuple", "mapping", "none"])
def test_it_is_the_same_sentence_at_every_entrance(kind, entrance):
    with pytest.raises(TypeError, match="the model's output must be a tensor of real numbers"):
        entrance(Network(kind))


def test_a_long_tuple_is_not_listed_whole():
    with pytest.raises(TypeError, match=r"got tuple of int, int, int, int, int, \.\.\.\. Say which part"):
        tensor_output(tuple(range(100)))


class Overflow(nn.Module):
    """Adds a value to the outputs of examples whose first input is large."""

    def __init__(self, value, outputs=3):
        super().__init__()
        self.dropout, self.layer = nn.Dropout(0.5), bl.BayesLinear(2, outputs)
        self.value = value

    def forward(self, x):
        return torch.where(x[:, :1] > 10, self.value, self.layer(self.dropout(x)))


@pytest.mark.parametrize("method", ["sample", "mean", "local", "linearised", "dropout"])
@pytest.mark.parametrize(
    ("value", "likelihood"),
    [
        (math.nan, bl.Categorical()),
        (math.inf, bl.Categorical()),
        (-math.inf, bl.Bernoulli()),
        (math.inf, bl.Gaussian(1.0)),
    ],
)
def test_outputs_that_are_not_finite_raise_by_every_method(method, value, likelihood):
    x = X.repeat(2, 1)
    x[9, 0] = 20
    for error in (FloatingPointError, ValueError):
        with pytest.raises(
            error, match=r"prediction must be finite, .* in 1 of 4 examples of batch 2, the first of them 1\."
        ):
            bl.predict(Overflow(value), x, 4, method=method, likelihood=likelihood, batch_size=4)
    with pytest.raises(FloatingPointError, match="of batch 1"):
        bl.predict(Overflow(value), [X, x], 4, method=method, likelihood=likelihood)


def test_moments_that_are_not_finite_raise():
    net = nn.Sequential(bl.BayesLinear(2, 3))
    with torch.no_grad():
        net[0].weight[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="prediction must be finite"):
        bl.predict(net, X, 4, method="moments")


def test_evaluate_and_recalibrate_raise_likewise():
    x = torch.cat([X, X[:1] + 50])
    y = torch.cat([Y, Y[:1]])
    for call in (bl.evaluate, bl.recalibrate):
        with pytest.raises(FloatingPointError, match="prediction must be finite, got 4 NaN"):
            call(Overflow(math.nan), (x, y), num_samples=2)


def test_a_class_may_be_left_out_by_minus_infinity():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = bl.BayesLinear(2, 3)

        def forward(self, x):
            return self.layer(x).index_fill(1, torch.tensor([1]), -math.inf)

    prediction = bl.predict(Masked(), X, 4)
    assert_close(prediction.probs[:, 1], torch.zeros(6))
    assert_close(prediction.probs.sum(1), torch.ones(6))
