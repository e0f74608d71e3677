"""How often a step waits for the device, and what decides it in place of separate checks: bounds that are read once."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.steps import state_of
from support.sync import reads_of_device
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.distributions.gaussian import retracted_precision
from bayeslayers.optim.bounds import magnitudes, retracted_bound, smallest
from bayeslayers.readings import Readings

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ["VOGN", "OGN", "IVON", "BBB"]
LOSSES = {
    "labels": lambda output: F.cross_entropy(output, torch.arange(len(output)) % 2),
    "weighted labels": lambda output: F.cross_entropy(output, torch.arange(len(output)) % 2, torch.tensor([1.0, 2.0])),
    "values": lambda output: F.mse_loss(output, torch.ones_like(output)),
    "a mean": lambda output: (output - 1).square().mean(),
    "a sum over a count": lambda output: (output - 1).square().sum() / torch.tensor(len(output)),
}


def network(depth=2, exclude=()):
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(3, 3), nn.Tanh())]
    return bl.to_bayesian(nn.Sequential(nn.Linear(3, 3), *layers, nn.Linear(3, 2)), exclude=list(exclude))[0]


def closure_for(optimizer, net, loss=LOSSES["labels"], n=6):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))

    def closure():
        optimizer.zero_grad()
        value = loss(net(x))
        value.backward()
        return value

    return closure


def reads_of_step(optimizer, closure):
    optimizer.step(closure)  # finds where the examples are
    optimizer.step(closure)
    with reads_of_device() as reads:
        optimizer.step(closure)
    return reads


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_reads_the_device_once_however_many_layers_there_are(name, loss):
    for depth in (1, 6):
        net = network(depth)
        optimizer = getattr(bl, name)(net, 100, generator=torch.Generator().manual_seed(0))
        assert len(reads_of_step(optimizer, closure_for(optimizer, net, LOSSES[loss]))) == 1


@pytest.mark.parametrize("name", METHODS)
def test_deterministic_layers_groups_and_large_tensors_add_no_reads(name):
    net = network(exclude=["0"])
    net[1] = bl.to_bayesian(nn.Sequential(nn.Linear(3, 6000), nn.Linear(6000, 3)))[0]
    groups = [{"params": net[5].parameters(), "lr": 1e-4}]
    optimizer = getattr(bl, name)(net, 100, 1e-3, groups=groups)
    assert len(optimizer.param_groups) > 1
    assert len(reads_of_step(optimizer, closure_for(optimizer, net))) == 1


@pytest.mark.parametrize(("options", "most"), [({"num_samples": 3}, 7), ({"num_samples": 3, "vectorise": True}, 2)])
def test_further_samples_read_for_their_own_losses(options, most):
    net = network()
    optimizer = bl.VOGN(net, 100, **options)
    closure = closure_for(optimizer, net)

    def no_backward():
        return LOSSES["labels"](net(torch.ones(6, 3)))

    reads = reads_of_step(optimizer, no_backward if "vectorise" in options else closure)
    assert sum("readings.py" in read for read in reads) <= most  # vmap's tallies are always on the CPU


@pytest.mark.parametrize("name", METHODS)
def test_scopes_are_read_with_their_step(name):
    net = network()
    optimizer = getattr(bl, name)(net, 100)
    for expected in (None, 1):
        with reads_of_device() as reads:
            with optimizer.sampled():
                LOSSES["labels"](net(torch.randn(6, 3))).backward()
            in_scope = len(reads)
            optimizer.step()
        assert expected is None or (in_scope, len(reads)) == (0, expected)


def test_a_gradient_scaler_adds_one_read():
    net = network()
    optimizer, scaler = bl.VOGN(net, 100), torch.amp.GradScaler("cpu", init_scale=4.0)
    for _ in range(3):
        with optimizer.sampled():
            scaler.scale(LOSSES["labels"](net(torch.randn(6, 3)))).backward()
        with reads_of_device() as reads:
            scaler.step(optimizer)
        scaler.update()
    assert len(reads) == 2


def stepped(name, careful, monkeypatch, **options):
    net = network(exclude=["0"] if name in ("VOGN", "BBB") else [])
    optimizer = getattr(bl, name)(net, 100, generator=torch.Generator().manual_seed(0), **options)
    with monkeypatch.context() as patch:
        if careful:
            patch.setattr(type(optimizer), "_is_foreseen_harmless", lambda self: False)
        losses = [optimizer.step(closure_for(optimizer, net)) for _ in range(4)]
    return losses, state_of(net, optimizer)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("VOGN", {}),
        ("VOGN", {"num_samples": 2, "init_precision": "curvature"}),
        ("OGN", {"lr": 1e-2}),
        ("IVON", {}),
        ("IVON", {"estimator": "gradsq", "num_samples": 2}),
        ("BBB", {"estimator": "local"}),
    ],
)
def test_a_step_by_bounds_is_the_step_with_all_checks(name, options, monkeypatch):
    quick, careful = (stepped(name, careful, monkeypatch, **options) for careful in (False, True))
    assert_close(quick, careful, rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_gradients_and_draws_as_they_were(name, bad):
    net = network()
    optimizer = getattr(bl, name)(net, 100)
    closure = closure_for(optimizer, net)
    for _ in range(2):
        optimizer.step(closure)
    with optimizer.sampled():
        LOSSES["labels"](net(torch.randn(6, 3))).backward()
    grads = [p.grad for p in net.parameters()]
    copies, before = copy.deepcopy(grads), state_of(net, optimizer)
    with pytest.raises(FloatingPointError, match=rf"the loss must be finite, got {bad}\. The step is rejected"):
        optimizer.step(closure_for(optimizer, net, lambda output: F.cross_entropy(output, torch.ones(6).long()) * bad))
    assert all(p.grad is grad for p, grad in zip(net.parameters(), grads, strict=True))
    assert_close((state_of(net, optimizer), grads), (before, copies), rtol=0, atol=0)
    optimizer.step()  # by the draw before


@pytest.mark.parametrize("name", METHODS)
def test_the_first_bad_loss_of_several_draws_ends_the_step(name):
    net, calls = network(), []
    optimizer = getattr(bl, name)(net, 100, **({} if name == "OGN" else {"num_samples": 3}))

    def closure():
        calls.append(1)
        (loss := net(torch.ones(4, 3)).mean() * math.nan).backward()
        return loss

    with pytest.raises(FloatingPointError, match="the loss must be finite, got nan"):
        optimizer.step(closure)
    assert len(calls) == 1


def test_a_bad_loss_is_named_before_what_it_leads_to():
    net = network()
    optimizer = bl.VOGN(net, 100)

    def closure():
        optimizer.zero_grad()
        loss = (net(torch.ones(4, 3)).mean() + net[0].weight.sum()) * math.nan  # the weight past its layer
        loss.backward()
        return loss

    with pytest.raises(FloatingPointError, match="the loss must be finite"):
        optimizer.step(closure)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_a_gradient_that_is_not_finite_in_its_unit_is_named(name, bad):
    net = network()
    optimizer = getattr(bl, name)(net, 100)
    optimizer.step(closure_for(optimizer, net))
    before = state_of(net, optimizer)
    with optimizer.sampled():
        LOSSES["labels"](net(torch.randn(6, 3))).backward()
    net[0].weight.grad[1, 2] = bad
    with pytest.raises(FloatingPointError, match=r"the gradient of '0\.weight' must be finite, got 1 of 9 entries"):
        optimizer.step()
    assert_close(state_of(net, optimizer), before, rtol=0, atol=0)


def test_magnitudes_bound_the_values_of_each_list():
    lists = [torch.randn(5), torch.randn(20000)], [], [torch.tensor(3.0), torch.tensor(4.0, dtype=torch.float64)]
    found = magnitudes(Readings(), *lists)()
    assert found[1] == 0
    for bound, tensors in zip(found, lists, strict=True):
        assert all(bound >= float(x.abs().max()) for x in tensors)
    for bad in (math.nan, math.inf):
        assert magnitudes(Readings(), [torch.ones(20000), torch.tensor([1.0, bad]), torch.ones(20000)])() == [math.inf]


def test_the_smallest_value_is_0_where_one_is_not_finite():
    assert smallest(Readings(), [torch.tensor([2.0, 3.0]), torch.full((20000,), 1.5)])() == 1.5
    assert smallest(Readings(), [torch.ones(20000), torch.tensor([2.0, math.nan])])() == 0
    assert smallest(Readings(), [torch.ones(0)])() == math.inf


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e8])
def test_the_bound_of_a_retracted_precision_holds(size):
    generator = torch.Generator().manual_seed(0)
    precision = torch.rand(1000, generator=generator, dtype=torch.float64) * 10 + 0.1
    target = torch.randn(1000, generator=generator, dtype=torch.float64) * size
    least, largest = float(precision.min()), float(precision.max())
    for weight in (1e-3, 1.0):
        bound = retracted_bound(largest, least, float(target.abs().max()), weight)
        new = retracted_precision(precision, target.clone(), weight)
        assert float(new.max()) <= bound
        assert float(new.min()) >= least / 2
    assert retracted_bound(1.0, 0.0, 1.0, 0.5) == math.inf
    assert not retracted_bound(1.0, math.nan, 1.0, 0.5) < math.inf


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_refused_while_a_cuda_graph_is_captured(name, monkeypatch):
    net = network()
    optimizer = getattr(bl, name)(net, 100)
    closure = closure_for(optimizer, net)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    optimizer.step(closure)  # parameters on the CPU
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    before = state_of(net, optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) must run outside of a CUDA graph.*Capture forward and backward"):
        optimizer.step(closure)
    assert_close(state_of(net, optimizer), before, rtol=0, atol=0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    optimizer.step(closure)


@pytest.mark.parametrize("options", [{}, {"dense": "0"}], ids=["factors", "dense"])
@pytest.mark.parametrize("name", ["KFAC", "NoisyKFAC"])
def test_a_step_of_kfac_between_inverses_reads_the_device_once(name, options):
    net = nn.Sequential(*network(), bl.BayesLayerNorm(2))
    optimizer = getattr(bl, name)(net, 100, 1e-3, inverse_every=4, update_every=4, **options)
    closure = closure_for(optimizer, net)
    for _ in range(43):
        optimizer.step(closure)
    counts = []
    for _ in range(8):
        with reads_of_device() as reads:
            optimizer.step(closure)
        counts.append(len(reads))
    assert sorted(counts)[:4] == [1] * 4
    assert sorted(counts)[-1] > 1  # a step with an inverse


@pytest.mark.parametrize("name", ["KFAC", "NoisyKFAC"])
def test_quick_steps_of_kfac_are_the_careful_ones(name, monkeypatch):
    states = []
    for quick in (True, False):
        net = nn.Sequential(*network(), bl.BayesLayerNorm(2))
        generator = torch.Generator().manual_seed(0)
        optimizer = getattr(bl, name)(net, 100, 1e-2, inverse_every=4, update_every=4, generator=generator)
        if not quick:
            monkeypatch.setattr(type(optimizer), "_reads_once", False)
        for _ in range(60):
            optimizer.step(closure_for(optimizer, net))
        states.append(state_of(net, optimizer))
    assert_close(states[0], states[1], rtol=0, atol=0)


def test_a_refused_step_of_kfac_leaves_nothing_for_the_next():
    net = network()
    optimizer = bl.KFAC(net, 100, 1e-2, inverse_every=40, update_every=2, fisher="empirical")
    good = closure_for(optimizer, net)
    for _ in range(42):
        optimizer.step(good)
    before = state_of(net, optimizer)

    def bad():
        loss = good()
        net[0].weight.grad[0, 0] = math.inf
        return loss

    with pytest.raises(FloatingPointError):
        optimizer.step(bad)
    assert_close(state_of(net, optimizer), before, rtol=0, atol=0)
    assert not optimizer._curvatures
