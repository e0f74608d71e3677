"""Layers that run several times in one call, and examples that are folded with others: exact, or refused."""

from __future__ import annotations

import pytest
import torch
from support.layers import BayesCell
from support.per_example import EXACT, F64, bayesian, potential, squares_by_autograd, tracked_squares
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bayeslayers as bl
from bayeslayers.curvature import accumulate, uses

pytestmark = pytest.mark.usefixtures("one_thread")
N = 4


class Recurrent(nn.Module):
    """An Elman network of a linear layer, with a norm and an embedding that run at every step."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps
        self.embed, self.norm, self.cell = nn.Embedding(5, 3), nn.LayerNorm(4), nn.Linear(7, 4)
        self.batch_norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, ids):
        h = torch.zeros(len(ids), 4, **F64)
        for t in range(self.steps):
            h = self.norm(self.cell(torch.cat([h, self.embed(ids[:, t])], 1))).tanh()
        return self.head(self.batch_norm(h))


class SharedHeads(nn.Module):
    """One head of convolutions for maps of several sizes, with a group norm, and a bilinear layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.mix = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Bilinear(4, 4, 2)

    def forward(self, x):
        sizes = [x, x[:, :, ::2, ::2], x[:, :, :3, 1:3]]
        a, b, c = (self.norm(self.conv(each)).tanh().mean((2, 3)) for each in sizes)
        return self.mix(a, b) + self.mix(b, c)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = BayesCell(3, 4)

    def forward(self, x):
        h = None
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return h


def loss(net, x):
    return potential(net(x))


def ids(steps):
    return torch.randint(5, (N, steps), generator=torch.Generator().manual_seed(1))


def images():
    return torch.randn(N, 2, 4, 4, generator=torch.Generator().manual_seed(1), **F64)


def sequences():
    return torch.randn(N, 5, 3, generator=torch.Generator().manual_seed(1), **F64)


NETS = [
    *[pytest.param(lambda k=k: (Recurrent(k), ids(k)), id=f"recurrent_{k}") for k in (2, 3, 7)],
    pytest.param(lambda: (SharedHeads(), images()), id="heads"),
    pytest.param(lambda: (nn.Sequential(Cell(), nn.Linear(4, 2)), sequences()), id="cell"),
]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("make", NETS)
def test_uses_add_up_before_they_are_squared(make, parts):
    plain, x = make()
    net = bayesian(plain).eval()  # an example alone has no batch statistics
    assert_close(tracked_squares(net, loss, x, parts=parts), squares_by_autograd(net, loss, x), **EXACT)


@pytest.mark.parametrize("budget", [1, 2**21])
@pytest.mark.parametrize("make", NETS)
def test_memory_is_bounded_by_per_example_gradients(make, budget, monkeypatch):
    plain, x = make()
    net = bayesian(plain).eval()
    folds, fold = [], uses.Uses._fold
    monkeypatch.setattr(uses.Uses, "_numel", lambda self: 0)  # what is kept is always more
    monkeypatch.setattr(uses.Uses, "_fold", lambda self: folds.append(self.name) or fold(self))
    monkeypatch.setitem(accumulate.CHUNK_BYTES, "cpu", budget)
    assert_close(tracked_squares(net, loss, x), squares_by_autograd(net, loss, x), **EXACT)
    assert folds


@pytest.mark.parametrize("fraction", [0.5, 0.3])
@pytest.mark.parametrize("make", [NETS[1], NETS[3]])
def test_a_part_of_the_batch_stands_for_all(make, fraction, monkeypatch):
    plain, x = make()
    net = bayesian(plain).eval()
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.tensor(0.5))
    tracker = bl.sampling.Tracker(bl.sampling.tracker.layers_of(net), model=net)
    with tracker.track(fraction):
        loss(net, x).backward()
    size = round(fraction * N)
    expected = squares_by_autograd(net, loss, x, examples=slice(N // 2, N // 2 + size))
    for name in ("cell.weight", "conv.weight"):
        if name in expected:
            assert_close(tracker.leaves[name].grad, expected[name] * N / size, **EXACT)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant):
    net, x = bayesian(Recurrent(3)).eval(), ids(3)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.dummy = net, torch.ones((), requires_grad=True)

        def forward(self, x):
            h = torch.zeros(len(x), 4, **F64, requires_grad=True)
            for t in range(3):
                step = lambda h, e: net.norm(net.cell(torch.cat([h, net.embed(e)], 1))).tanh()  # noqa: E731
                h = checkpoint(step, h, x[:, t], use_reentrant=reentrant) if t != 1 else step(h, x[:, t])
            return net.head(net.batch_norm(h))

    expected = {f"net.{name}": value for name, value in squares_by_autograd(net, loss, x).items()}
    assert_close(tracked_squares(Checkpointed(), loss, x, parts=2), expected, **EXACT)


def test_several_samples_add_up():
    net, x = bayesian(Recurrent(3)).eval(), ids(3)
    names = [site.name for site in bl.posterior(net)]
    optimizer = bl.VOGN(net, dataset_size=50, num_samples=2, precision_lr=1.0, init_precision=30.0)
    before, drawn = {s.name: s.precision.clone() for s in bl.posterior(net)}, []
    originals = {name: net.get_parameter(name).detach().clone() for name in names}

    def closure():
        optimizer.zero_grad()
        drawn.append({s.name: s.value.detach().clone() for s in bl.posterior(net)})
        value = potential(net(x)) / N
        value.backward()
        return value

    optimizer.step(closure)
    expected = dict.fromkeys(names, 0.0)
    for values in drawn:
        with torch.no_grad():
            for name in names:
                net.get_parameter(name).copy_(values[name])
        squares = squares_by_autograd(net, loss, x)
        expected = {name: expected[name] + squares[name] / N / 2 for name in names}
    for site in bl.posterior(net):
        assert_close(site.precision, 50 * expected[site.name] + site.prior_precision, **EXACT)
        assert not torch.equal(site.precision, before[site.name])
        assert not torch.equal(originals[site.name], site.mean)


class Folded(nn.Module):
    """Layers on examples folded with windows, in both orders, and in the middle of two dimensions."""

    def __init__(self, order: str):
        super().__init__()
        self.order = order
        self.stem, self.norm, self.linear = nn.Conv2d(2, 4, 3, padding=1), nn.LayerNorm(4), nn.Linear(4, 3)
        self.conv, self.batch_norm, self.head = nn.Conv1d(3, 3, 2), nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x):
        n = len(x)
        x = self.stem(x).tanh().unflatten(3, (2, 2)).unflatten(2, (2, 2))  # (n, c, row, h, column, w)
        letters = {"examples first": "ncahbw->nabhwc", "windows first": "ncahbw->abnhwc", "middle": "ncahbw->anbhwc"}
        x = torch.einsum(letters[self.order], x).reshape(4 * n, 4, 4)  # (windows, positions, c)
        x = self.linear(self.norm(x)).tanh()
        x = self.batch_norm(self.conv(x.mT)).tanh().mean(2)
        shape, dim = {"examples first": ((n, 4, 3), 1), "windows first": ((4, n, 3), 0), "middle": ((2, n, 2, 3), 0)}[
            self.order
        ]
        x = x.reshape(shape)
        return self.head(x).mean((0, 2) if self.order == "middle" else dim)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("order", ["examples first", "windows first", "middle"])
def test_folded_examples_are_unfolded(order, parts):
    net, x = bayesian(Folded(order)).eval(), images()
    assert_close(tracked_squares(net, loss, x, parts=parts), squares_by_autograd(net, loss, x), **EXACT)


def test_a_sequence_in_front_of_the_batch_is_found():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.one, self.norm, self.two = (
                nn.Embedding(5, 3),
                nn.Linear(3, 4),
                nn.LayerNorm(4),
                nn.Linear(4, 2),
            )

        def forward(self, x):
            return self.two(self.norm(self.one(self.embed(x.T)).tanh())).mean(0)

    for steps in (N, 5):
        net, x = bayesian(Sequence()), ids(steps)
        assert_close(tracked_squares(net, loss, x), squares_by_autograd(net, loss, x), **EXACT)


def test_a_smaller_last_batch_and_longer_sequences_follow_the_first_look():
    net, losses = bayesian(Folded("windows first")).eval(), []
    tracker = bl.sampling.Tracker(bl.sampling.tracker.layers_of(net), model=net)
    for size in (N, 3, 1):
        x = images()[:size]
        with tracker.track():
            losses.append(loss(net, x).backward())
        expected = squares_by_autograd(net, loss, x)
        assert_close({name: leaf.grad for name, leaf in tracker.leaves.items()}, expected, **EXACT)


@pytest.mark.parametrize("method", ["KFAC", "NoisyKFAC"])
@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_kronecker_factors_of_several_uses_are_those_of_further_positions(method, fisher):
    class Together(nn.Module):
        def __init__(self, linear, loops):
            super().__init__()
            self.linear, self.loops = linear, loops

        def forward(self, x):
            y = torch.stack([self.linear(x[:, t]) for t in range(3)], 1) if self.loops else self.linear(x)
            return y.tanh().mean(1)

    states = []
    for loops in (True, False):
        net, x = bayesian(Together(nn.Linear(3, 2), loops)), sequences()[:, :3]
        optimizer = getattr(bl, method)(
            net, 20, fisher=fisher, generator=torch.Generator().manual_seed(0), inverse_every=1
        )  # fmt: skip
        for _ in range(2):
            with optimizer.sampled():
                nn.functional.cross_entropy(net(x), torch.arange(N) % 2).backward()
            optimizer.step()
        states.append(net.state_dict())
    assert_close(*states, **EXACT)


def test_factors_of_a_convolution_that_runs_twice_are_refused():
    net = bayesian(SharedHeads())
    optimizer = bl.KFAC(net, 20, fisher="empirical")
    with pytest.raises(RuntimeError, match=r"layer 'conv' must run once .* under K-FAC"), optimizer.sampled():
        potential(net(images())).backward()


def call_twice(net, x):
    return net(x) + net(x.flip(0))


def two_parts(net, x):
    return net.head(net.head.weight.new_ones(N, 4)) + net.head(net.head.weight.new_ones(N, 4) * 2)


@pytest.mark.parametrize("run", [call_twice, two_parts])
def test_uses_of_several_calls_are_refused_by_name(run):
    net = bayesian(Recurrent(1)).eval()
    with bl.tracked(net), pytest.raises(RuntimeError, match=r"layer '.*' must run in one call of the model"):
        potential(run(net, ids(1))).backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_reuse_is_refused():
    torch._dynamo.reset()
    net = bayesian(Recurrent(3)).eval()
    compiled = torch.compile(net, backend="aot_eager")
    with bl.tracked(net), pytest.raises(RuntimeError, match=r"must run in one call .* not compiled"):
        potential(compiled(ids(3))).backward()
