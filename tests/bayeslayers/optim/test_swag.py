"""SWAG against moments kept slowly, and the life that it shows: nothing is written before `finalize`."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.distributions.gaussian import POINT_PRECISION
from bayeslayers.optim.swag import add_to_moments_

pytestmark = pytest.mark.usefixtures("one_thread")
SAME = {"rtol": 0.0, "atol": 0.0}
N = 40


def make_net(exclude=(), dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))
    return bl.to_bayesian(net.to(dtype), exclude=list(exclude), prior_precision=2.0)[0]


def make_swag(net, **own):
    return bl.SWAG(net, N, **{"lr": 0.3, "beta1": 0.8, "start_step": 3, "average_every": 2} | own)


def batch(step, dtype=torch.float64):
    g = torch.Generator().manual_seed(step)
    return torch.randn(5, 3, generator=g, dtype=dtype), torch.randint(2, (5,), generator=g)


def train(net, optimizer, steps, dtype=torch.float64):
    for step in steps:
        x, y = batch(step, dtype)
        optimizer.zero_grad()
        with optimizer.sampled():
            F.cross_entropy(net(x), y).backward()
        optimizer.step()


def state_of(net, optimizer):
    return copy.deepcopy((net.state_dict(), optimizer.state_dict()["state"]))


def reference(net, steps, *, lr, beta1, ess, first, every, prior_precision=2.0):
    """Return the weights that torch's SGD passes through, by name, those to be averaged alone."""
    net = copy.deepcopy(net)
    means = {name: 1.0 if name == "1.weight" else 0.0 for name, _ in net.named_parameters()}
    momenta = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    path = {name: [] for name in means}
    for t, step in enumerate(steps, start=1):
        x, y = batch(step)
        grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
        with torch.no_grad():
            for (name, p), grad in zip(net.named_parameters(), grads, strict=True):
                pull = 0.0 if f"{name}_precision" not in net.state_dict() else prior_precision / ess
                momenta[name] = beta1 * momenta[name] + (1 - beta1) * (grad + pull * (p - means[name]))
                p -= lr * momenta[name] / (1 - beta1**t)
                if t >= first and (t - first) % every == 0:
                    path[name].append(p.clone())
    return {name: torch.stack(values) for name, values in path.items()}


@pytest.mark.parametrize("exclude", [(), ("1", "3")])
@pytest.mark.parametrize("variance_scale", [1.0, 0.5])
def test_it_leaves_the_moments_of_the_path_of_sgd(exclude, variance_scale):
    net = make_net(exclude)
    optimizer = make_swag(net, temperature=0.5, variance_scale=variance_scale)
    path = reference(net, range(30), lr=0.3, beta1=0.8, ess=N / 0.5, first=3, every=2)
    train(net, optimizer, range(30))
    optimizer.finalize()
    state = net.state_dict()
    assert {len(values) for values in path.values()} == {14}
    for name, values in path.items():
        assert_close(state[name], values.mean(0), rtol=1e-10, atol=1e-12)
        assert (f"{name}_precision" in state) == (name[0] not in exclude)
        if f"{name}_precision" in state:
            variance = values.square().mean(0) - values.mean(0).square()
            assert_close(1 / state[f"{name}_precision"] - 2.0**-46, variance_scale * variance, rtol=1e-6, atol=1e-12)


def test_a_small_deviation_around_a_large_weight_keeps_its_digits():
    values = 5 + 1e-3 * torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    mean, variance = torch.zeros(50), torch.zeros(50)
    for count, value in enumerate(values, start=1):
        add_to_moments_(mean, variance, value, count)
        assert float(variance.min()) >= 0
    assert_close(variance.double(), values.double().var(0, correction=0), rtol=1e-2, atol=0)
    cancelled = values.square().mean(0) - values.mean(0).square()  # what the paper's line leaves in float32
    assert not torch.allclose(cancelled.double(), values.double().var(0, correction=0), rtol=0.5)


def test_a_weight_that_does_not_move_has_a_finite_precision():
    net = make_net()
    optimizer = make_swag(net, groups=[{"params": net[0].parameters(), "lr": 0.0}])
    before = net[0].weight.clone()
    train(net, optimizer, range(10))
    optimizer.finalize()
    assert torch.equal(net[0].weight, before)
    assert_close(net[0].weight_precision, torch.full_like(before, POINT_PRECISION), **SAME)
    assert 0 < float(net[3].weight_precision.max()) < 1e9


def test_training_goes_on_from_where_finalize_found_it():
    net, other = make_net(("3",)), make_net(("3",))
    optimizer, whole = make_swag(net), make_swag(other)
    train(net, optimizer, range(8))
    optimizer.finalize()
    written = copy.deepcopy(net.state_dict())
    optimizer.finalize()  # changes nothing
    assert_close(net.state_dict(), written, **SAME)
    train(net, optimizer, range(8, 13))
    train(other, whole, range(13))
    assert_close(state_of(net, optimizer), state_of(other, whole), **SAME)
    optimizer.finalize(), whole.finalize()
    assert_close(state_of(net, optimizer), state_of(other, whole), **SAME)
    assert not torch.equal(net[0].weight_precision, written["0.weight_precision"])


@pytest.mark.parametrize("finalized", [False, True])
def test_resume_is_exact(finalized):
    net = make_net(("3",), torch.float32)
    optimizer = make_swag(net)
    train(net, optimizer, range(8), torch.float32)
    if finalized:
        optimizer.finalize()
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    other = make_net(("3",), torch.float32)
    resumed = make_swag(other)
    other.load_state_dict(saved[0]), resumed.load_state_dict(saved[1])
    for model, its in ((net, optimizer), (other, resumed)):
        train(model, its, range(8, 12), torch.float32)
        its.finalize()
    assert_close(state_of(net, optimizer), state_of(other, resumed), **SAME)


def test_until_then_it_predicts_as_the_point_estimate_and_cannot_be_saved(tmp_path):
    net, (x, _) = make_net(dtype=torch.float32), batch(99, torch.float32)
    before = copy.deepcopy(net.state_dict())
    optimizer = make_swag(net)
    assert_close(net.state_dict(), before, **SAME)
    message = r"posterior must be written before it is saved, got precisions of a point estimate. Call optimizer.final"
    train(net, optimizer, range(6), torch.float32)
    assert_close(bl.predict(net, x, 4).probs, net(x).softmax(1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=message):
        bl.save_posterior(net, tmp_path / "posterior", name="net")
    bl.save_posterior(net, tmp_path / "means", name="net", method="mean")
    optimizer.finalize()
    assert float(bl.predict(net, x, 4).epistemic.max()) > 1e-4
    bl.save_posterior(net, tmp_path / "posterior", name="net")
    train(net, optimizer, range(6, 8), torch.float32)
    with pytest.raises(ValueError, match=message):
        bl.save_posterior(net, tmp_path / "later", name="net")
    assert not (tmp_path / "later").exists()


@pytest.mark.parametrize("steps", [0, 4])
def test_finalize_needs_two_averages(steps):
    net = make_net()
    optimizer = make_swag(net)
    assert optimizer.steps_to_posterior == 5
    train(net, optimizer, range(steps))
    before = state_of(net, optimizer)
    with pytest.raises(RuntimeError, match=rf"finalize\(\) must follow 5 steps, .*, got {steps}\. Train on, or lower"):
        optimizer.finalize()
    assert_close(state_of(net, optimizer), before, **SAME)
    train(net, optimizer, range(steps, 5))
    optimizer.finalize()


def test_a_frozen_tensor_keeps_its_posterior():
    net = make_net()
    net[0].requires_grad_(False)
    before = {name: value.clone() for name, value in net[0].state_dict().items()}
    optimizer = make_swag(net)
    train(net, optimizer, range(6))
    optimizer.finalize()
    assert_close(dict(net[0].state_dict()), before, **SAME)


def test_a_step_beyond_the_range_changes_nothing():
    net = make_net(("3",), torch.float32)
    optimizer = make_swag(net)
    train(net, optimizer, range(2), torch.float32)
    for kind in ("bayesian", "deterministic"):
        before = state_of(net, optimizer)
        group = next(group for group in optimizer.param_groups if group["kind"] == kind)
        lr, group["lr"] = group["lr"], 1e38
        with pytest.raises(FloatingPointError, match=r"of '\d\.\w+' would not be finite .*posterior is unchanged"):
            x, y = batch(5, torch.float32)
            with optimizer.sampled():
                (1e4 * F.cross_entropy(net(x), y)).backward()
            optimizer.step()
        assert_close(state_of(net, optimizer), before, **SAME)
        group["lr"] = lr
    train(net, optimizer, range(2, 6), torch.float32)


def test_an_ordinary_model_becomes_bayesian_in_place():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    weight = net[0].weight
    optimizer = make_swag(net)
    train(net, optimizer, range(6))
    optimizer.finalize()
    assert net[0].weight is weight
    assert {site.name for site in bl.posterior(net)} == set(dict(net.named_parameters()))
    assert all(bool((0 < site.precision).all() and (site.precision < 1e12).all()) for site in bl.posterior(net))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_step": 0}, "start_step must be an integer >= 1, got 0"),
        ({"average_every": 1.5}, "average_every must be an integer >= 1, got 1.5"),
        ({"variance_scale": 0.0}, "variance_scale must be a finite number > 0, got 0.0"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_arguments_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        make_swag(make_net(), **options)


@pytest.mark.parametrize("name", ["VOGN", "OGN", "IVON", "BBB", "KFAC", "NoisyKFAC"])
def test_finalize_changes_nothing_where_each_step_writes_the_posterior(name):
    net = make_net()
    optimizer = getattr(bl, name)(net, N)
    train(net, optimizer, range(2))
    before = state_of(net, optimizer)
    optimizer.finalize()
    assert optimizer.steps_to_posterior == 0
    assert_close(state_of(net, optimizer), before, **SAME)
