"""Steps that are refused: arguments of another kind, and means that would leave the range of their numbers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import bayeslayers as bl

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = ["VOGN", "OGN", "IVON", "BBB", "KFAC", "NoisyKFAC"]


def batch(n=6):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, generator=g), torch.randint(2, (n,), generator=g)


def network(exclude=()):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))
    return bl.to_bayesian(net, exclude=list(exclude))[0]


def step(optimizer, net):
    x, y = batch()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return optimizer.step(closure)


def state(net, optimizer):
    return copy.deepcopy((net.state_dict(), {k: optimizer.state_dict()[k] for k in ("state",)}))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("trained", [False, True])
def test_a_mean_that_would_not_be_finite_refuses_the_step(name, trained):
    net = network()
    optimizer = getattr(bl, name)(
        net, 100, 1e-2, **({"hess_init": 1e-3, "rescale_lr": False} if name == "IVON" else {})
    )
    if trained:
        step(optimizer, net)
    before = state(net, optimizer)
    lr = optimizer.param_groups[0]["lr"]
    for group in optimizer.param_groups:
        group["lr"] = 1e38 if name not in ("BBB", "IVON") else 3e38
    with pytest.raises(FloatingPointError, match=r"of '\d\.\w+' would not be finite .*posterior is unchanged"):
        for _ in range(3):  # a bounded step may need several to get there
            step(optimizer, net)
            before = state(net, optimizer)
    assert_close(state(net, optimizer), before, rtol=0, atol=0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if not trained and name in ("KFAC", "NoisyKFAC"):  # refused at once: it goes on as if nothing had been
        step(optimizer, net)
        assert not torch.equal(net[0].weight, before[0]["0.weight"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_size_beyond_the_range_changes_nothing(name):
    net = network()
    optimizer = getattr(bl, name)(net, 100)
    step(optimizer, net)
    before = state(net, optimizer)
    optimizer.param_groups[0]["lr"] = 1e39
    with pytest.raises((FloatingPointError, RuntimeError), match=r"would not be finite|without overflow"):
        step(optimizer, net)
    assert_close(state(net, optimizer), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["VOGN", "NoisyKFAC"])
def test_a_deterministic_parameter_that_would_not_be_finite_refuses_the_step_of_all(name):
    net = network(exclude=["3"])
    optimizer = getattr(bl, name)(net, 100, deterministic_lr=3e38, **({"fisher": "empirical"} if "K" in name else {}))
    x, _ = batch()
    with pytest.raises(FloatingPointError, match=r"the value of '3\.weight' would not be finite in 8 entries"):
        for _ in range(2):
            before = state(net, optimizer)
            with optimizer.sampled():
                (net[:3](x).square().mean() - 1e-3 * net[3].weight.sum()).backward()
            optimizer.step()
    assert "3.weight" in before[0] and float(before[0]["3.weight"].min()) > 1e38  # the first step was within the range
    assert_close(state(net, optimizer), before, rtol=0, atol=0)


def test_an_ordinary_step_takes_no_snapshot(monkeypatch):
    monkeypatch.setattr(bl.optim.base, "Snapshot", None)
    for name in ("VOGN", "OGN", "IVON", "BBB"):
        net = network(exclude=["3"])
        step(getattr(bl, name)(net, 100), net)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_in_the_place_of_the_model_are_one_sentence(name):
    net = network()
    groups = [{"params": list(net.parameters())}]
    for params in (net.parameters(), list(net.parameters()), groups, net.state_dict(), net[0].weight):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got \w+\. Pass the model, not its"):
            getattr(bl, name)(params, 100)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn.Module, got generator"):
        bl.laplace(net.parameters(), batch())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_data_in_the_place_of_its_size_is_one_sentence(name):
    net, (x, y) = network(), batch()
    data = TensorDataset(x, y)
    for given in (data, DataLoader(data), [x, y], x):
        with pytest.raises(TypeError, match=r"dataset_size must be the number of training examples, got \w+\. Pass"):
            getattr(bl, name)(net, given)
    with pytest.raises(TypeError, match="dataset_size must be a number, got '6'"):
        getattr(bl, name)(net, "6")
    assert getattr(bl, name)(net, torch.tensor(6)).dataset_size == 6


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        lambda output, y: F.cross_entropy(output, y, reduction="sum"),
        lambda output, y: output.square().sum(),
        lambda output, y: output.square().mean(),
        bl.Categorical().loss,
    ],
)
@pytest.mark.parametrize("closure", [False, True])
def test_an_empty_batch_is_named(name, loss, closure):
    net = network()
    optimizer = getattr(bl, name)(net, 100, **({"fisher": "empirical"} if "KFAC" in name else {}))
    before, (x, y) = state(net, optimizer), batch(0)

    def run():
        optimizer.zero_grad()
        value = loss(net(x), y)
        value.backward()
        return value

    with pytest.raises(ValueError, match="the batch must hold at least one example, got an empty batch"):
        if closure:
            optimizer.step(run)
        else:
            with optimizer.sampled():
                run()
            optimizer.step()
    assert_close(state(net, optimizer), before, rtol=0, atol=0)
    step(optimizer, net)
