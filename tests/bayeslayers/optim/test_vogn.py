"""VOGN against a slow reference, closed-form posteriors, and what it promises about bad steps."""

from __future__ import annotations

import copy
import io
import math

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from support.reference import reference_vogn
from support.steps import (
    F64,
    SAME,
    assert_same_state,
    closure_for,
    make_batch,
    make_mixed_net,
    make_net,
    make_noise,
    make_optimizer,
    run_scope,
    scaled_step,
    seeded,
    squared_error,
    state_of,
)
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.distributions.gaussian import natural_gradient_step_

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("beta1", [0.0, 0.8])
def test_tracks_the_slow_reference_for_100_steps(beta1):
    torch.manual_seed(0)
    baseline = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    net = nn.Sequential(bl.BayesConv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), bl.BayesLinear(8, 3)).double()
    net.load_state_dict(baseline.state_dict())
    for site in bl.posterior(net):
        site.prior_mean.fill_(0.3)
    settings = {
        "dataset_size": 60, "lr": 0.05, "beta1": beta1, "precision_lr": 0.1, "prior_precision": 2.0,
        "init_precision": 40.0, "temperature": 0.5, "damping": 0.01,
    }  # fmt: skip
    batches = [(torch.randn(3, 1, 3, 3, **F64), torch.randint(3, (3,))) for _ in range(100)]
    noises = [
        [{name: torch.randn_like(p) for name, p in baseline.named_parameters()} for _ in range(2)] for _ in batches
    ]
    reference = reference_vogn(baseline, F.cross_entropy, batches, noises, prior_mean=0.3, **settings)
    optimizer = bl.VOGN(net, **settings)
    for (x, y), draws, (mean, precision) in zip(batches, noises, reference, strict=True):
        for noise in draws:
            with optimizer.sampled(noise=noise):
                F.cross_entropy(net(x), y).backward()
        optimizer.step()
        for site in bl.posterior(net):
            assert_close(site.mean.detach(), mean[site.name], rtol=1e-10, atol=1e-10)
            assert_close(site.precision, precision[site.name], rtol=1e-10, atol=1e-10)


def regression(orthogonal: bool) -> tuple[torch.Tensor, torch.Tensor, bl.BayesLinear]:
    """Return x (n, 3), y (n, 1) and a linear model with a prior of its own."""
    torch.manual_seed(0)
    x = torch.randn(20, 3, **F64) * torch.tensor([1.0, 2.0, 0.5], **F64)
    if orthogonal:
        x = torch.linalg.qr(x).Q * torch.tensor([3.0, 5.0, 7.0], **F64)
    truth = torch.tensor([[1.0, -2.0, 0.5]], **F64)
    y = x @ truth.T + torch.randn(20, 1, **F64)
    model = bl.BayesLinear(3, 1, bias=False, prior_precision=4.0).double()
    model.load_state_dict({**model.state_dict(), "weight": truth, "weight_prior_mean": torch.tensor(0.3, **F64)})
    return x, y, model


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_one_exact_step_is_the_conjugate_posterior(temperature):
    x, y, model = regression(orthogonal=True)
    n, mean, precision = len(x), model.weight.detach().clone(), torch.full((1, 3), 77.0, **F64)
    natural_gradient_step_(
        mean, precision, grad=(x @ mean.T - y).T @ x / n, curvature=x.square().mean(0, keepdim=True),
        prior_mean=model.weight_prior_mean, prior_precision=model.weight_prior_precision,
        ess=n / temperature, lr=1.0, precision_lr=1.0,
    )  # fmt: skip
    expected_precision = x.T @ x / temperature + 4 * torch.eye(3, **F64)
    expected_mean = torch.linalg.solve(expected_precision, x.T @ y / temperature + 4 * 0.3)
    assert_close(precision[0], expected_precision.diagonal(), rtol=1e-12, atol=0)
    assert_close(mean.T, expected_mean, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_antithetic_pairs_reach_ridge_regression(temperature):
    x, y, model = regression(orthogonal=False)
    optimizer = bl.VOGN(
        model, len(x), lr=0.5, beta1=0.0, precision_lr=0.05, init_precision=1e4, temperature=temperature
    )
    for step in range(300):
        noise = torch.randn(1, 3, generator=seeded(step), **F64)
        for sign in (1, -1):
            run_scope(optimizer, model, x, y, noise={"weight": sign * noise})
        optimizer.step()
    ridge = torch.linalg.solve(x.T @ x / temperature + 4 * torch.eye(3, **F64), x.T @ y / temperature + 4 * 0.3)
    assert_close(model.weight.detach().T, ridge, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_precision_reaches_its_fixed_point(temperature):
    """With w = m + e the residual is r_i + x_i e, so ess E[g^2] = ess mean_i x_i^2 (r_i^2 + x_i^2 . 1/p).

    Noise of +-sqrt(3) along each axis has the covariance of N(0, I): the expectation is exact.
    """
    x, y, model = regression(orthogonal=False)
    optimizer = bl.VOGN(model, len(x), lr=0.7, beta1=0.0, precision_lr=0.5, init_precision=1e4, temperature=temperature)
    for _ in range(100):
        for axis in 3**0.5 * torch.cat([torch.eye(3, **F64), -torch.eye(3, **F64)]):
            run_scope(optimizer, model, x, y, noise={"weight": axis[None]})
        optimizer.step()
    residual, precision = x @ model.weight.detach().T - y, model.weight_precision
    expected = (x**2 * (residual**2 + x**2 @ (1 / precision).T)).sum(0) / temperature + 4
    assert_close(precision[0], expected, rtol=1e-10, atol=0)


@hypothesis.settings(deadline=None, max_examples=40, derandomize=True)
@hypothesis.given(
    rows=st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=2),
                  min_size=1, max_size=4),
    precision_lr=st.floats(1e-6, 1.0),
    init_precision=st.floats(1e-6, 1e10),
)  # fmt: skip
@hypothesis.example(rows=[[1e18, 0.0]], precision_lr=0.1, init_precision=1.0)  # finite, but not times ess
@hypothesis.example(rows=[[1e30, 0.0]], precision_lr=0.1, init_precision=1.0)  # its square is not finite
def test_precision_stays_positive_for_any_gradient(rows, precision_lr, init_precision):
    model = bl.BayesLinear(2, 1, bias=False)
    optimizer = bl.VOGN(model, 10**6, precision_lr=precision_lr, init_precision=init_precision, generator=seeded())
    for _ in range(2):
        with optimizer.sampled():
            model(torch.tensor(rows)).mean().backward()  # each row is its example's gradient
        before = state_of(model)
        try:
            optimizer.step()
        except FloatingPointError:
            assert_same_state(state_of(model), before)
        assert_close(model.weight_precision > 0, torch.ones(1, 2, dtype=torch.bool))
        assert_close([t.isfinite().all().item() for t in model.state_dict().values()], [True] * 4)


@hypothesis.settings(deadline=None, max_examples=10, derandomize=True)
@hypothesis.given(order=st.permutations(range(6)))
def test_order_of_examples_does_not_matter(order):
    (x, y), states = make_batch(), []
    for indices in (list(range(6)), order):
        net = make_net()
        optimizer = make_optimizer(net)
        optimizer.step(closure_for(optimizer, net, x[indices], y[indices]))
        states.append(state_of(net, optimizer))
    assert_close(*states, rtol=1e-10, atol=1e-12)


def step_with(net: nn.Module, losses, scopes: int = 1, **kwargs) -> dict[str, torch.Tensor]:
    """Return the state after a step whose scope back-propagates each of the losses in turn."""
    optimizer = make_optimizer(net, **kwargs)
    for scope in range(scopes):
        with optimizer.sampled(noise=make_noise(net, scope)):
            for loss in losses:
                loss(net).backward()
    optimizer.step()
    return state_of(net, optimizer)


@pytest.mark.parametrize("scopes", [1, 2])
def test_sums_and_parts_of_a_batch_give_the_same_step(scopes):
    x, y = make_batch(6)
    whole = step_with(make_net(), [lambda net: squared_error(net, x, y)], scopes)
    total = step_with(make_net(), [lambda net: squared_error(net, x, y) * 6], scopes, loss_reduction="sum")
    halves = [lambda net, s=s: squared_error(net, x[s], y[s]) / 2 for s in (slice(0, 3), slice(3, 6))]
    uneven = [lambda net, s=s: squared_error(net, x[s], y[s]) * len(x[s]) for s in (slice(0, 1), slice(1, 6))]
    for other in (
        total,
        step_with(make_net(), halves, scopes),
        step_with(make_net(), uneven, scopes, loss_reduction="sum"),
    ):
        assert_close(other, whole, rtol=1e-10, atol=1e-12)


def test_scopes_average_the_gradient():
    (x, y), net, grads = make_batch(), make_mixed_net(), []
    for seed in range(3):
        run_scope(make_optimizer(net), net, x, y, make_noise(net, seed))
        grads.append([p.grad.clone() for p in net.parameters()])
    optimizer = make_optimizer(net)
    for seed in range(3):
        run_scope(optimizer, net, x, y, make_noise(net, seed))
    assert_close([p.grad for p in net.parameters()], [torch.stack(g).mean(0) for g in zip(*grads, strict=True)])


@pytest.mark.parametrize("with_output", [False, True])
@pytest.mark.parametrize("with_zero_grad", [False, True])
def test_closure_is_run_per_draw_and_averaged(with_output, with_zero_grad):
    (x, y), net, seen = make_batch(), make_net(), []
    optimizer = make_optimizer(net, num_samples=3)

    def closure():
        if with_zero_grad:
            optimizer.zero_grad()
        output = net(x)
        loss = (output - y).square().sum() / (2 * len(x))
        loss.backward()
        seen.append((loss.detach(), output.detach()))
        return (loss, output) if with_output else loss

    result = optimizer.step(closure)
    losses, outputs = (torch.stack(values) for values in zip(*seen, strict=True))
    assert_close(result, (losses.mean(), outputs.mean(0)) if with_output else losses.mean())
    assert not torch.equal(losses[0], losses[1])
    baseline = make_net()
    scoped = make_optimizer(baseline)
    for _ in range(3):
        run_scope(scoped, baseline, x, y)
    scoped.step()
    assert_same_state(state_of(net, optimizer), state_of(baseline, scoped))


def test_gradient_clipping_between_scope_and_step():
    (x, y), net = make_batch(), make_net()
    optimizer = make_optimizer(net, beta1=0.0)
    for seed in range(2):
        run_scope(optimizer, net, x, y, make_noise(net, seed))
    norm = torch.stack([p.grad.square().sum() for p in net.parameters()]).sum().sqrt()
    assert_close(nn.utils.clip_grad_norm_(net.parameters(), 1e-3), norm)
    expected = {s.name: (50 * s.mean.grad.clone() + s.prior_precision * s.mean).detach() for s in bl.posterior(net)}
    before = {s.name: s.mean.detach().clone() for s in bl.posterior(net)}
    optimizer.step()
    for s in bl.posterior(net):
        assert_close(s.mean.detach(), before[s.name] - 0.1 * expected[s.name] / s.precision)


def test_learning_rate_schedulers_work():
    (x, y), net = make_batch(), make_net()
    optimizer = make_optimizer(net, lr=0.4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: [1.0, 0.5, 0.0][epoch])
    for lr in (0.4, 0.2, 0.0):
        before = state_of(net)["0.weight"]
        assert_close([group["lr"] for group in optimizer.param_groups], [lr])
        optimizer.step(closure_for(optimizer, net, x, y))
        assert torch.equal(net[0].weight, before) == (lr == 0)
        if lr:
            scheduler.step()


def test_deterministic_parameters_are_trained_by_adam():
    net = make_mixed_net()
    baseline = copy.deepcopy(net[0])
    optimizer, adam = make_optimizer(net, lr=0.01), torch.optim.Adam(baseline.parameters(), lr=0.01)
    for step in range(30):
        run_scope(optimizer, net, *make_batch(seed=step))
        for parameter, own in zip(baseline.parameters(), net[0].parameters(), strict=True):
            parameter.grad = own.grad.clone()
        optimizer.step()
        adam.step()
        assert_close(dict(net[0].named_parameters()), dict(baseline.named_parameters()), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", [None, 0], ids=["default_generator", "own_generator"])
def test_resume_is_exact(seed):
    def run(net, optimizer, steps):
        for step in steps:
            optimizer.step(closure_for(optimizer, net, *make_batch(seed=step)))

    def start(seed):
        net = make_mixed_net()
        return net, make_optimizer(net, num_samples=2, generator=None if seed is None else seeded(seed))

    net, optimizer = start(seed)
    torch.manual_seed(5)
    run(net, optimizer, range(3))
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict(), torch.get_rng_state()), file)
    run(net, optimizer, range(3, 6))
    resumed, second = start(None if seed is None else seed + 1)
    file.seek(0)
    posterior, state, rng_state = torch.load(file, weights_only=True)
    resumed.load_state_dict(posterior), second.load_state_dict(state), torch.set_rng_state(rng_state)
    run(resumed, second, range(3, 6))
    assert_same_state(state_of(resumed, second), state_of(net, optimizer))


def spoil_loss(net, loss):
    loss.backward()
    return loss * math.inf


def spoil_gradient(net, loss):
    loss.backward()
    net[2].weight.grad[0, 1] = math.nan
    return loss


def spoil_curvature(net, loss):
    (loss * 1e200).backward()  # finite, but not its square
    return loss


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_loss, "the loss must be finite, got inf"),
        (spoil_gradient, r"the gradient of '2\.weight' must be finite, got 1 of 8"),
        (spoil_curvature, r"the curvature of '0\.weight' must be finite, got 12 of 12"),
    ],
    ids=["loss", "gradient", "curvature"],
)
def test_bad_step_is_refused_and_the_next_good_one_works(spoil, message):
    (x, y), net, baseline, generators = make_batch(), make_net(), make_net(), (seeded(), seeded())
    optimizers = [make_optimizer(model, generator=g) for model, g in zip((net, baseline), generators, strict=True)]
    closures = [
        closure_for(optimizer, model, x, y) for optimizer, model in zip(optimizers, (net, baseline), strict=True)
    ]
    for optimizer, closure in zip(optimizers, closures, strict=True):
        optimizer.step(closure)
    before = state_of(net, optimizers[0])
    with pytest.raises(FloatingPointError, match=message):
        optimizers[0].step(lambda: spoil(net, squared_error(net, x, y)))
    assert_same_state(state_of(net, optimizers[0]), before)
    with pytest.raises(RuntimeError, match="step\\(\\) must follow a backward pass"):
        optimizers[0].step()
    generators[1].set_state(generators[0].get_state())
    for optimizer, closure in zip(optimizers, closures, strict=True):
        optimizer.step(closure)
    assert_same_state(state_of(net, optimizers[0]), state_of(baseline, optimizers[1]))


@pytest.mark.parametrize("bad_draw", [0, 1])
def test_exception_in_the_closure_leaves_gradients_and_weights(bad_draw):
    (x, y), net, draws = make_batch(), make_mixed_net(), iter(range(2))
    optimizer = make_optimizer(net, num_samples=2)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before, output = state_of(net, optimizer), net(x)

    def closure():
        squared_error(net, x, y).backward()
        if next(draws) == bad_draw:
            raise KeyError("boom")
        return torch.zeros(())

    with pytest.raises(KeyError, match="boom"):
        optimizer.step(closure)
    assert_same_state(state_of(net, optimizer), before)
    assert_close(net(x), output, **SAME)
    assert_close([p.grad for p in net.parameters()], [torch.full_like(p, 7.0) for p in net.parameters()], **SAME)
    with pytest.raises(RuntimeError, match="got none since the last step"):
        optimizer.step()


def test_a_step_inside_of_its_scope_is_refused():
    (x, y), net = make_batch(), make_net()
    optimizer = make_optimizer(net)
    before = state_of(net, optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) must follow the scope .* got it inside"), optimizer.sampled():
        squared_error(net, x, y).backward()
        optimizer.step()
    assert_same_state(state_of(net, optimizer), before)


def test_draws_on_batches_of_other_sizes_count_alike():
    """A precision is affine in the curvature: two draws give the mean of what either gives alone."""
    net = make_net()
    batches, noises = [make_batch(4), make_batch(7, seed=5)], [make_noise(net, seed) for seed in (1, 2)]

    def precisions(chosen: list[int]) -> list[torch.Tensor]:
        baseline = copy.deepcopy(net)
        optimizer = make_optimizer(baseline)
        for number in chosen:
            with optimizer.sampled(noises[number]):
                squared_error(baseline, *batches[number]).backward()
        optimizer.step()
        return [site.precision for site in bl.posterior(baseline)]

    for both, first, second in zip(precisions([0, 1]), precisions([0]), precisions([1]), strict=True):
        assert_close(both, (first + second) / 2)


def test_step_needs_a_draw():
    (x, y), net = make_batch(), make_net()
    optimizer = make_optimizer(net)

    def step_without_backward():
        squared_error(net, x, y).backward()  # outside any scope
        optimizer.step()

    def step_after_zero_grad():
        run_scope(optimizer, net, x, y)
        optimizer.zero_grad()
        optimizer.step()

    def step_twice():
        run_scope(optimizer, net, x, y)
        optimizer.step()
        optimizer.step()

    def step_with_idle_closure():
        optimizer.step(lambda: squared_error(net, x, y).detach())

    for step in (step_without_backward, step_after_zero_grad, step_twice, step_with_idle_closure):
        with pytest.raises(RuntimeError, match="must follow a backward pass under drawn weights, got none"):
            step()


def test_scopes_of_one_optimizer_do_not_nest():
    net = make_net()
    optimizer = make_optimizer(net)
    with pytest.raises(RuntimeError, match="must not be nested"), optimizer.sampled(), optimizer.sampled():
        pass
    run_scope(optimizer, net, *make_batch())
    optimizer.step()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in ("dataset_size", "temperature", "prior_precision", "init_precision")
          for value in (0, -1.5, math.nan, math.inf)],
        *[(name, value) for name in ("lr", "damping") for value in (-0.1, math.nan, math.inf)],
        *[("beta1", value) for value in (-0.1, 1.0, math.nan)],
        *[("precision_lr", value) for value in (0.0, 1.1, math.nan)],
        *[("num_samples", value) for value in (0, -1, 1.5, True)],
        ("loss_reduction", "none"),
    ],
)  # fmt: skip
def test_bad_argument_is_refused_by_name_and_value(name, value):
    net = make_net()
    before = state_of(net)
    with pytest.raises(ValueError, match=f"{name} must be .* got '?{value}"):
        bl.VOGN(net, **{"dataset_size": 10, "prior_precision": 5.0, "init_precision": 3.0, name: value})
    assert_same_state(state_of(net), before)


class OwnForward(nn.GRU):
    """A layer without a curvature rule."""

    def forward(self, x):
        return super().forward(2 * x)


def test_model_without_a_layer_that_can_become_bayesian_is_refused():
    with pytest.raises(ValueError, match="must have a layer that can become Bayesian, got none"):
        bl.VOGN(nn.Sequential(OwnForward(2, 2)), dataset_size=10)


def test_weight_used_past_its_layer_is_refused_by_name():
    (x, y), net = make_batch(), make_net()
    optimizer = make_optimizer(net)
    before = state_of(net, optimizer)
    with pytest.raises(RuntimeError, match=r"'0\.weight' must get its gradient through its own layer"):
        with optimizer.sampled():
            hidden = F.linear(x, net[0].weight, net[0].bias)
            (net[1:](hidden) - y).square().mean().backward()
    assert_same_state(state_of(net, optimizer), before)


def test_frozen_bayesian_tensor_stays_as_it_is():
    (x, y), net = make_batch(), make_net()
    net[0].weight.requires_grad_(False)
    optimizer = make_optimizer(net)
    before = state_of(net)
    optimizer.step(closure_for(optimizer, net, x, y))
    after = state_of(net)
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == {f"{name}{suffix}" for name in ("0.bias", "2.weight", "2.bias") for suffix in ("", "_precision")}


def test_grad_scaler_leaves_the_step_as_it_is():
    nets = [make_net(), make_net()]
    for net, enabled in zip(nets, (False, True), strict=True):
        scaled_step(net, make_optimizer(net), torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled))
    assert_close(nets[1].state_dict(), nets[0].state_dict(), rtol=1e-10, atol=0)


def test_grad_scaler_leaves_out_a_step_that_overflows():
    net = make_net()
    optimizer, scaler = make_optimizer(net), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = state_of(net, optimizer)
    scaled_step(net, optimizer, scaler, factor=math.inf)
    assert_same_state(state_of(net, optimizer), before)
    assert scaler.get_scale() == 512.0


def test_unscaled_gradients_of_a_grad_scaler_are_refused():
    net = make_net()
    optimizer, scaler = make_optimizer(net), torch.amp.GradScaler("cpu", init_scale=1024.0)
    with optimizer.sampled():
        scaler.scale(squared_error(net, *make_batch())).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"must be unscaled by optimizer\.unscale_"):
        scaler.step(optimizer)
