"""Networks of several inputs and outputs: predicted, evaluated, fitted and exported as they are."""

from __future__ import annotations

import math
from collections import UserDict
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

import bayeslayers as bl
from bayeslayers.inputs import Inputs, as_batch, on_tensors, split
from bayeslayers.outputs import tensor_output

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = {"rtol": 1e-6, "atol": 1e-7}
N = 6


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class TwoInputs(nn.Module):
    """Two linear layers on two inputs, of which one is masked; several outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.dropout, self.second = bl.BayesLinear(3, 4), nn.Dropout(0.5), bl.BayesLinear(4, 3)

    def forward(self, x, pair=None, mask=None, scale=1.0):
        hidden = self.first(x)
        if pair is not None:
            hidden = hidden + pair["one"] * pair["two"][0]
        if mask is not None:
            hidden = hidden.masked_fill(mask == 0, 0.0)
        out = scale * self.second(self.dropout(hidden.tanh()))
        return {"aux": hidden, "logits": out, "heads": (out, 2 * out)}


class OneInput(nn.Module):
    """The same network of one tensor, which holds the inputs side by side."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        x, one, two, mask = x.split([3, 4, 4, 4], 1)
        return self.network(x, {"one": one, "two": [two]}, mask=mask)["logits"]


def arguments(n=N):
    parts = [torch.randn(n, size, generator=seeded(size)) for size in (3, 4, 4)]
    return *parts, (torch.rand(n, 4, generator=seeded(9)) > 0.3).float()


def inputs(n=N):
    x, one, two, mask = arguments(n)
    return bl.Inputs(x, {"one": one, "two": [two]}, mask=mask)


TARGETS = torch.arange(N) % 3


@pytest.mark.parametrize("method", ["sample", "mean", "local", "linearised", "dropout"])
def test_several_inputs_predict_as_one_tensor_that_holds_them(method):
    net, joined = TwoInputs(), torch.cat(arguments(), 1)
    found = bl.predict(net, inputs(), 7, method=method, generator=seeded())
    expected = bl.predict(OneInput(net), joined, 7, method=method, generator=seeded())
    assert_close(found.probs, expected.probs, **EXACT)
    assert_close(found.epistemic, expected.epistemic, **EXACT)
    assert method == "mean" or found.epistemic.max() > 1e-4


def test_a_mapping_holds_keyword_arguments_and_its_labels_are_left_out():
    net = TwoInputs()
    x, one, two, mask = arguments()
    mapping = UserDict(x=x, pair={"one": one, "two": (two,)}, mask=mask, labels=TARGETS)  # as tokenizers return
    found = bl.predict(net, mapping, 4, generator=seeded())
    assert_close(found.probs, bl.predict(net, inputs(), 4, generator=seeded()).probs, rtol=0, atol=0)


@pytest.mark.parametrize("output", ["logits", lambda returned: returned["heads"][0]])
def test_pieces_of_a_batch_are_those_of_the_whole(output):
    net = TwoInputs()
    whole = bl.predict(net, inputs(), 3, output=output, generator=seeded())
    pieces = bl.predict(net, inputs(), 3, output=output, batch_size=4, generator=seeded())
    assert_close(pieces.probs, whole.probs, **EXACT)


def test_inputs_without_examples_pass_whole_and_other_sizes_are_refused():
    batch = bl.Inputs(torch.zeros(5, 2), torch.tensor(3.0), mask=None, table=torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"must have the examples in dimension 0, got sizes \[4, 5\]. Give batch_size"):
        split(batch, 2)
    del batch.kwargs["table"]
    first, _, last = split(batch, 2)
    assert (len(first), len(last)) == (2, 1)
    assert first.args[1] is batch.args[1] and first.kwargs == {"mask": None}
    assert split(batch, 5) == [batch]


@pytest.mark.parametrize(
    ("output", "expected"),
    [(0, "first"), (-1, "last"), ("a", "first"), (lambda pair: pair.b, "last")],
)
def test_an_output_is_an_index_an_attribute_or_a_function(output, expected):
    class Pair(NamedTuple):
        a: torch.Tensor
        b: torch.Tensor

    pair = Pair(torch.zeros(2, 3), torch.ones(2, 3))
    assert tensor_output(pair, output) is (pair.a if expected == "first" else pair.b)


@pytest.mark.parametrize("method", ["sample", "mean", "local", "moments", "linearised", "dropout"])
def test_an_output_is_chosen_by_every_method(method):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.5))
            self.one, self.two = bl.BayesLinear(4, 3), bl.BayesLinear(4, 2)

        def forward(self, x):
            x = self.body(x)
            return self.one(x), self.two(x)

    net, x = Heads(), torch.randn(5, 3, generator=seeded())
    shapes = [tuple(bl.predict(net, x, 4, method=method, output=index).probs.shape) for index in (0, 1)]
    assert shapes == [(5, 3), (5, 2)]
    with pytest.raises(TypeError, match=r"got tuple of Tensor, Tensor. Say which part it is, as output=0\."):
        bl.predict(nn.Sequential(net), x, 4, method="mean")


@pytest.mark.parametrize("output", ["scores", 7])
def test_an_output_that_is_not_there_is_named(output):
    with pytest.raises(ValueError, match=rf"must name a part of what the model returns, got {output!r} for dict"):
        bl.predict(TwoInputs(), inputs(), 2, output=output)


@pytest.mark.parametrize("output", [True, 1.5, ["logits"]])
def test_an_output_of_another_kind_is_refused(output):
    for call in (bl.predict, bl.laplace):
        with pytest.raises(TypeError, match="output must be a key, an index, a function or None, got"):
            call(TwoInputs(), inputs(), output=output)


def loaders():
    x, one, two, mask = arguments()
    rows = [{"x": x[i], "pair": {"one": one[i], "two": [two[i]]}, "mask": mask[i]} for i in range(N)]
    yield DataLoader([row | {"labels": TARGETS[i]} for i, row in enumerate(rows)], batch_size=4)
    yield DataLoader([(row, TARGETS[i]) for i, row in enumerate(rows)], batch_size=4)
    yield [((x, {"one": one, "two": [two]}, mask), TARGETS)]
    yield (inputs(), TARGETS)


@pytest.mark.parametrize("number", range(4))
def test_batches_are_evaluated_as_they_come(number):
    net = TwoInputs()
    data = list(loaders())[number]
    joined = torch.cat(arguments(), 1)
    found = bl.evaluate(net, data, ood={"same": inputs()}, method="mean")
    expected = bl.evaluate(OneInput(net), (joined, TARGETS), ood={"same": joined}, method="mean")
    assert found.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        assert math.isclose(found.metrics[name], value, rel_tol=1e-4) or (math.isnan(value)), name
    temperature = bl.recalibrate(net, data, method="mean").temperature
    assert_close(temperature, bl.recalibrate(OneInput(net), (joined, TARGETS), method="mean").temperature, **EXACT)


@pytest.mark.parametrize("number", range(4))
def test_a_laplace_posterior_is_fitted_to_batches_as_they_come(number):
    joined = torch.cat(arguments(), 1)
    found = bl.laplace(TwoInputs(), list(loaders())[number], prior_precision=1.0)
    expected = bl.laplace(OneInput(TwoInputs()), (joined, TARGETS), prior_precision=1.0)
    assert_close(found.second.weight_precision, expected.network.second.weight_precision, **EXACT)
    assert_close(found.laplace.log_marginal_likelihood, expected.laplace.log_marginal_likelihood, **EXACT)


def test_a_program_of_several_inputs_is_exported():
    net, batch = TwoInputs(), inputs()
    program = bl.to_exported(net, batch, 3, generator=seeded()).module()
    more = inputs(9)
    mean, *_ = program(*more.args, more.kwargs["mask"])
    assert_close(mean, bl.predict(net, more, 3, generator=seeded()).mean, rtol=1e-5, atol=1e-6)


def test_a_batch_is_refused_where_it_is_none_or_empty():
    net = TwoInputs()
    for empty in (bl.Inputs(torch.zeros(0, 3)), bl.Inputs(torch.tensor(1.0))):
        with pytest.raises(ValueError, match=r"x must hold at least one example in dimension 0, got Inputs\("):
            bl.predict(net, empty)
    with pytest.raises(ValueError, match="x must be numbers, got 1 of 3 values that are NaN"):
        bl.predict(net, {"x": torch.tensor([[1.0, math.nan, 0.0]])})
    with pytest.raises(TypeError, match="x must be one tensor for method 'moments', got Inputs"):
        bl.predict(net, inputs(), method="moments")
    with pytest.raises(TypeError, match=r"data must yield batches .* or mappings with the key 'labels', got dict"):
        bl.evaluate(net, [{"x": torch.zeros(2, 3)}])
    with pytest.raises(TypeError, match=r"x must be a tensor, bl\.Inputs or a mapping of inputs, got int"):
        bl.linearised_moments(net, 3)


def test_nesting_is_kept_and_what_is_no_tensor_too():
    batch = as_batch({"a": (torch.zeros(2), [torch.ones(2), "text"]), "b": None})
    assert isinstance(batch, Inputs)
    moved = on_tensors(lambda x: x + 1, batch)
    assert moved.kwargs["b"] is None and moved.kwargs["a"][1][1] == "text"
    assert_close(moved.kwargs["a"][1][0], torch.full((2,), 2.0))
    assert as_batch({"labels": torch.zeros(2)}) is None and as_batch(3) is None


def test_a_transformer_predicts_on_a_padded_batch():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    torch.manual_seed(0)
    net, _ = bl.to_bayesian(transformers.BertForSequenceClassification(config).eval())
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    batch = transformers.BatchEncoding(
        {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([0, 2])}
    )
    prediction = bl.predict(net, batch, 5, generator=seeded())
    assert prediction.probs.shape == (2, 3) and prediction.epistemic.min() > 0
    alone = {"input_ids": ids[1:, :2]}  # without its padding
    assert_close(
        bl.predict(net, batch, method="mean").probs[1:],
        bl.predict(net, alone, method="mean").probs,
        rtol=1e-4,
        atol=1e-5,
    )
    assert bl.evaluate(net, [batch, batch], num_samples=2).num_examples == 4
