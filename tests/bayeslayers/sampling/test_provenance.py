"""Rows that are not examples: found by where they come from, when there are as many of both."""

from __future__ import annotations

import copy

import pytest
import torch
from support.per_example import EXACT, bayesian, potential, squares_by_autograd, tracked_squares
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl

pytestmark = pytest.mark.usefixtures("one_thread")

N = 6


class Transposing(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.two(self.one(x).transpose(0, 1).tanh()).transpose(0, 1).mean(1)


class Windows(nn.Module):
    """Pools the batch into as many windows as there are examples."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        windows = self.one(x).flatten(0, 1).unflatten(0, (2, -1)).transpose(0, 1)  # (3 n, 2, 5)
        return self.two(windows[: len(x)]).mean(1)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places, self.out = nn.Embedding(9, 4), nn.Embedding(N, 4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.out((self.tokens(ids) + self.places(torch.arange(ids.shape[1]))).mean(1))


class Keeps(nn.Module):
    """What a network may do without harm: batch statistics, dropout, random numbers, several inputs, counters."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.plain = nn.BatchNorm1d(5, track_running_stats=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, mask, scale=None):
        self.calls.add_(1)
        x = self.plain(self.norm((self.one(x) * mask[:, :, None]).mean(1)))
        return self.two(nn.functional.dropout(x, 0.5, training=self.training) + (0 if scale is None else scale))


METHODS = ["VOGN", "OGN", "NoisyKFAC", "laplace", "tracked"]


def use(method, net, *inputs):
    y = torch.arange(N) % 3
    if method == "laplace":
        return bl.laplace(net, (inputs[0], y))
    net = bl.to_bayesian(net)[0]
    if method == "tracked":
        with bl.sampling.tracked(net):
            nn.functional.cross_entropy(net(*inputs), y).backward()
        return net
    optimizer = getattr(bl, method)(net, 100)
    with optimizer.sampled():
        nn.functional.cross_entropy(net(*inputs), y).backward()
    optimizer.step()
    return net


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("make", "layer"),
    [(Windows, "two")],
    ids=["windows"],
)
def test_as_many_rows_as_examples_that_are_others_are_refused(method, make, layer):
    torch.manual_seed(0)
    x = torch.randint(9, (N, N)) if make is Positions else torch.randn(N, N, 4)
    with pytest.raises(RuntimeError, match=f"input of layer '{layer}' must run over the examples, .*exclude the layer"):
        use(method, make(), x)


@pytest.mark.parametrize("tokens", [N, N + 1])
def test_examples_in_another_dimension_are_found_there(tokens):
    net, x = bayesian(Transposing()), torch.randn(N, tokens, 4, dtype=torch.float64)
    assert_close(
        tracked_squares(net, lambda net, x: potential(net(x)), x),
        squares_by_autograd(net, lambda net, x: potential(net(x)), x),
        **EXACT,
    )


@pytest.mark.parametrize("method", ["VOGN", "NoisyKFAC", "tracked"])
def test_a_network_that_keeps_its_examples_passes_undisturbed(method):
    torch.manual_seed(0)
    net, x, mask = Keeps(), torch.randn(N, N, 4), torch.rand(N, N)
    for inputs in ((x, mask), (x, mask, torch.randn(N, 1))):
        torch.manual_seed(1)
        got = use(method, copy.deepcopy(net), *inputs)
        assert float(got.calls) == 1  # the looks are not counted
        assert int(got.norm.num_batches_tracked) == 1
        assert got.training and got.norm.training


def test_an_argument_without_examples_that_has_as_many_rows_is_left_where_it_is():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x, weights):
            return self.two(weights @ self.one(x)).mean(1)

    torch.manual_seed(0)
    use("VOGN", Attention(), torch.randn(N, N, 4), torch.rand(N, N))


def test_the_look_takes_no_random_numbers_and_happens_once(monkeypatch):
    torch.manual_seed(0)
    net, x, y = bl.to_bayesian(nn.Linear(4, 3))[0], torch.randn(N, 4), torch.arange(N) % 3
    calls, states = [], []
    for look in (True, False):
        own = nn.Sequential(copy.deepcopy(net), nn.Dropout(0.5))
        own[0].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        optimizer = bl.VOGN(own, 100)
        if not look:
            monkeypatch.setattr("bayeslayers.sampling.tracker.find_layouts", lambda *_: True)
        torch.manual_seed(2)
        for _ in range(3):
            with optimizer.sampled():
                nn.functional.cross_entropy(own(x), y).backward()
            optimizer.step()
        states.append(own.state_dict())
    assert calls == [False, False, *[True] * 6]
    assert_close(*states, rtol=0, atol=0)


def test_a_model_that_is_random_in_eval_mode_or_fails_there_is_left_to_the_sizes():
    class Random(nn.Sequential):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5, training=True))

    class Fails(nn.Sequential):
        def forward(self, x):
            assert self.training
            return super().forward(x)

    for kind in (Random, Fails):
        use("VOGN", kind(nn.Linear(4, 3)), torch.randn(N, 4))


class Proposals(nn.Module):
    """Like a detector: a head on rows, of which the three examples have other numbers in training."""

    def __init__(self, in_training, otherwise):
        super().__init__()
        self.in_training, self.otherwise = in_training, otherwise
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        features = self.body(x)
        numbers = self.in_training if self.training else self.otherwise
        rows = torch.cat([own.expand(number, -1) for own, number in zip(features, numbers, strict=True)])
        return features.square().mean() + self.head(rows).square().mean()


@pytest.mark.parametrize("numbers", [[2, 3, 2], [1, 4, 4]])  # seven rows, and nine that may be three of each
def test_rows_that_are_not_as_many_from_each_example_are_refused(numbers):
    net = bayesian(Proposals(numbers, otherwise=[2, 2, 2]))
    with bl.tracked(net), pytest.raises(RuntimeError, match=r"layer 'head' must get as many rows .* detector"):
        net(torch.randn(3, 3, dtype=torch.float64)).backward()


def test_of_two_numbers_of_rows_the_one_that_is_not_that_of_the_examples_is_named():
    net = bayesian(Proposals([1, 3, 3], otherwise=[1, 3, 3]))
    with (
        bl.tracked(net),
        pytest.raises(RuntimeError, match=r"layer 'head' must run over .*, got 7 there and 3 in .*'body'"),
    ):
        net(torch.randn(3, 3, dtype=torch.float64)).backward()
