"""VOGN in full: OGN, parts of the batch, draws at once, groups, warm-ups, the start from the first batches."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.reference import reference_vogn
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.curvature.accumulate import Part
from bayeslayers.layers.scope import Scope, opened
from bayeslayers.optim import TemperatureSchedule, TemperatureWarmup, lr_warmup

F64 = {"dtype": torch.float64}
pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(bl.BayesConv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), bl.BayesLinear(8, 3)).double()


def make_batch(n=6, seed=1):
    generator = seeded(seed)
    x = torch.randn(n, 1, 3, 3, generator=generator, **F64)
    return x, torch.randint(3, (n,), generator=generator)


def run_scope(optimizer, net, x, y):
    with optimizer.sampled():
        F.cross_entropy(net(x), y).backward()


def test_ogn_tracks_a_slow_reference_for_100_steps():
    torch.manual_seed(0)
    baseline = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    net = make_net()
    net.load_state_dict(baseline.state_dict())
    settings = {
        "dataset_size": 60, "lr": 0.05, "beta1": 0.9, "precision_lr": 0.1, "prior_precision": 2.0,
        "init_precision": 40.0, "temperature": 0.5, "damping": 0.01,
    }  # fmt: skip
    batches = [make_batch(4, seed) for seed in range(100)]
    no_noise = [[{name: torch.zeros_like(p) for name, p in baseline.named_parameters()}]] * 100
    reference = reference_vogn(baseline, F.cross_entropy, batches, no_noise, prior_mean=0.0, **settings)
    optimizer = bl.OGN(net, **settings)
    for (x, y), (mean, precision) in zip(batches, reference, strict=True):
        run_scope(optimizer, net, x, y)
        optimizer.step()
        for site in bl.posterior(net):
            assert_close(site.mean.detach(), mean[site.name], rtol=1e-10, atol=1e-10)
            assert_close(site.precision, precision[site.name], rtol=1e-10, atol=1e-10)


def test_ogn_leaves_a_posterior_to_draw_from():
    net, (x, y) = make_net(), make_batch()
    optimizer = bl.OGN(net, dataset_size=6)
    run_scope(optimizer, net, x, y)
    optimizer.step()
    assert bl.predict(net, x, 8, generator=seeded()).epistemic.min() > 0


@pytest.mark.parametrize(("fraction", "size"), [(0.5, 3), (0.3, 2), (0.01, 1), (0.99, 6)])
def test_a_part_of_the_batch_is_unbiased(fraction, size):
    """Over all places where it can start, the mean of the estimates is the sum over the whole batch."""
    (x, y), net = make_batch(6), make_net()
    with bl.tracked(net) as whole:
        F.cross_entropy(net(x), y).backward()
    expected = {name: leaf.grad.clone() for name, leaf in whole.leaves.items()}
    gradient = [p.grad.clone() for p in net.parameters()]
    sums = {name: torch.zeros_like(value) for name, value in expected.items()}
    for start in range(6):
        net.zero_grad()
        tracker = bl.VOGN(net, 6, curvature_fraction=fraction, generator=seeded())._tracker
        with tracker.track(fraction, seeded()):
            part = Part(fraction, (start + 0.5) / 6)
            leaves = {layer: layer.leaves._replace(part=part) for layer in tracker.layers.values()}
            with opened(Scope(leaves=leaves)):
                F.cross_entropy(net(x), y).backward()
        assert_close([p.grad for p in net.parameters()], gradient)
        for name, leaf in tracker.leaves.items():
            sums[name] += leaf.grad / 6
            if name.endswith("weight") and size < 6:
                assert not torch.allclose(leaf.grad, expected[name], rtol=0.01)
    assert_close(sums, expected)
    factor, (rows,) = Part(fraction, 0.9).select(torch.arange(6))
    assert (factor, rows.tolist()) == (6 / size, [5, 0, 1, 2, 3, 4][:size])


def test_the_part_is_drawn_again_each_time_by_the_generator():
    net = make_net()

    def starts(seed):
        optimizer = bl.VOGN(net, 6, curvature_fraction=0.5, generator=seeded(seed))
        for _ in range(50):
            with optimizer.sampled():
                yield net[0].leaves.part.start

    first = list(starts(0))
    assert first == list(starts(0)) and len(set(first)) == 50
    assert abs(sum(first) / 50 - 0.5) * math.sqrt(12 * 50) < 4


def test_a_part_of_the_batch_learns_as_the_whole_does():
    """The mean follows the same gradients; the precision is that of the whole within the noise of the estimate."""
    nets = [make_net(), make_net()]
    for net, fraction in zip(nets, (1.0, 0.5), strict=True):
        optimizer = bl.VOGN(
            net, 60, lr=1e-3, precision_lr=0.02, init_precision=1e3, curvature_fraction=fraction, generator=seeded()
        )
        for seed in range(300):
            run_scope(optimizer, net, *make_batch(8, seed))
            optimizer.step()
    whole, part = (torch.cat([s.precision.flatten() for s in bl.posterior(net)]).log() for net in nets)
    assert (whole - part).abs().mean() < 0.1
    assert (whole - math.log(1e3)).abs().mean() > 1  # the precision has moved


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("with_output", [True, False])
def test_draws_at_once_are_the_draws_one_after_the_other(reduction, with_output):
    results = []
    for vectorise in (False, True):
        net, (x, y) = make_net(), make_batch()
        options = {"num_samples": 4, "lr": 0.1, "vectorise": vectorise, "loss_reduction": reduction}
        optimizer = bl.VOGN(net, 60, generator=seeded(), **options)

        def closure(net=net, x=x, y=y, optimizer=optimizer, vectorise=vectorise):
            optimizer.zero_grad()
            output = net(x)
            loss = F.cross_entropy(output, y, reduction=reduction)
            if not vectorise:
                loss.backward()
            return (loss, output) if with_output else loss

        results.append([[optimizer.step(closure) for _ in range(3)], net.state_dict()])
    assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


def test_draws_at_once_leave_nothing_behind_when_they_fail():
    net, (x, y) = make_net(), make_batch()
    optimizer = bl.VOGN(net, 60, num_samples=3, vectorise=True, generator=seeded())
    before, output = copy.deepcopy(net.state_dict()), net(x)
    with pytest.raises(FloatingPointError, match="the loss must be finite"):
        optimizer.step(lambda: F.cross_entropy(net(x), y) * math.inf)
    with pytest.raises(KeyError):
        optimizer.step(lambda: {}[0])
    with pytest.raises(RuntimeError, match="backward"):
        optimizer.step(lambda: F.cross_entropy(net(x), y).backward())
    assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert_close(net(x), output, rtol=0, atol=0)
    assert [p.grad for p in net.parameters()] == [None] * 4
    optimizer.step(lambda: F.cross_entropy(net(x), y))


def test_draws_at_once_refuse_running_statistics():
    net = nn.Sequential(bl.BayesLinear(2, 3), bl.BayesBatchNorm1d(3))
    optimizer = bl.VOGN(net, 60, num_samples=3, vectorise=True)
    with pytest.raises(RuntimeError, match="vectorise must be off for a network whose BatchNorm"):
        optimizer.step(lambda: net(torch.randn(4, 2)).square().mean())
    net.eval()
    optimizer.step(lambda: net(torch.randn(4, 2)).square().mean())


def test_the_first_batches_give_the_precision():
    """With weight w / (1 - (1 - w)^t) the average is that of the batches seen: nothing is left of the start."""
    net = make_net()
    optimizer = bl.OGN(net, 60, lr=0.0, precision_lr=0.3, init_precision="curvature", prior_precision=2.0)
    seen, weights = [], []
    for seed in range(4):
        x, y = make_batch(5, seed)
        net.zero_grad()
        with bl.tracked(net) as tracker:
            F.cross_entropy(net(x), y).backward()
        seen.append({name: 60 * 5 * leaf.grad.clone() + 2.0 for name, leaf in tracker.leaves.items()})
        net.zero_grad()
        run_scope(optimizer, net, x, y)
        optimizer.step()
        weights = [w * 0.7 for w in weights] + [0.3]
        for site in bl.posterior(net):
            total = sum(w * values[site.name] for w, values in zip(weights, seen, strict=True))
            assert_close(site.precision, total / sum(weights))


def test_groups_have_hyperparameters_and_priors_of_their_own():
    net, (x, y) = make_net(), make_batch()
    head, body = list(net[3].parameters()), list(net[0].parameters())
    own = {"params": head, "lr": 0.0, "prior_precision": 7.0, "temperature": 0.5, "precision_lr": 0.5}
    optimizer = bl.OGN(net, 60, lr=0.1, precision_lr=0.25, prior_precision=3.0, beta1=0.0, groups=[own])
    assert [(g["kind"], g["lr"]) for g in optimizer.param_groups] == [("bayesian", 0.0), ("bayesian", 0.1)]
    assert {s.name: float(s.prior_precision) for s in bl.posterior(net)} == {
        "0.weight": 3.0, "0.bias": 3.0, "3.weight": 7.0, "3.bias": 7.0,
    }  # fmt: skip
    before = {s.name: (s.mean.detach().clone(), s.precision.clone()) for s in bl.posterior(net)}
    with bl.tracked(net) as tracker:
        F.cross_entropy(net(x), y).backward()
    curvature = {name: 6 * leaf.grad.clone() for name, leaf in tracker.leaves.items()}
    net.zero_grad()
    run_scope(optimizer, net, x, y)
    optimizer.step()
    for site in bl.posterior(net):
        ess, weight, prior = (120, 0.5, 7.0) if site.module is net[3] else (60, 0.25, 3.0)
        mean, precision = before[site.name]
        assert_close(site.precision, (1 - weight) * precision + weight * (ess * curvature[site.name] + prior))
        assert torch.equal(site.mean, mean) == (site.module is net[3])
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {id(p) for p in body}


def test_a_group_can_be_added_to_a_network_that_has_grown():
    net, (x, y) = make_net(), make_batch()
    optimizer = bl.VOGN(net, 60, lr=0.1, generator=seeded(), deterministic_lr=0.01)
    run_scope(optimizer, net, x, y)
    optimizer.step()
    net.append(nn.Sequential(bl.BayesLinear(3, 3), nn.Linear(3, 3)).double())
    optimizer.add_param_group({"params": net[4].parameters(), "prior_precision": 9.0, "lr": 0.2})
    kinds = [(g["kind"], g["lr"], len(g["params"])) for g in optimizer.param_groups]
    assert kinds == [("bayesian", 0.1, 4), ("bayesian", 0.2, 2), ("deterministic", 0.2, 2)]
    assert float(net[4][0].weight_prior_precision) == 9.0
    before = copy.deepcopy(net.state_dict())
    run_scope(optimizer, net, x, y)
    optimizer.step()
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "prior" not in name and not name.startswith("4.1.weight_")}


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number >= 0, got -1.0"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"prior_precision": 0.0}, "prior_precision must be a finite number > 0, got 0.0"),
        ({"precison_lr": 0.5}, "keys among params, .*, got 'precison_lr'. Did you mean 'precision_lr'"),
        ({"params": [nn.Parameter(torch.ones(2))]}, r"params must be parameters of the model, got one of shape \(2,\)"),
    ],
)
def test_bad_groups_are_refused(group, message):
    net = make_net()
    group = {"params": list(net[3].parameters()), **group}
    with pytest.raises(ValueError, match=message):
        bl.VOGN(net, 60, groups=[group])
    optimizer = bl.VOGN(net, 60, groups=[{"params": net[0].parameters()}])
    with pytest.raises(ValueError, match=message if "params" in message else "must"):
        optimizer.add_param_group(group)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature_fraction": 0.0}, r"curvature_fraction must be in \(0, 1\], got 0.0"),
        ({"curvature_fraction": 1.5}, r"curvature_fraction must be in \(0, 1\], got 1.5"),
        ({"init_precision": "first"}, "init_precision must be a number > 0, None or 'curvature', got 'first'"),
        ({"deterministic_lr": -1.0}, "deterministic_lr must be a finite number >= 0, got -1.0"),
        ({"loss_reduction": "max"}, "loss_reduction must be 'mean' or 'sum', got 'max'"),
    ],
)
@pytest.mark.parametrize("kind", [bl.VOGN, bl.OGN])
def test_bad_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(make_net(), 60, **options)


def test_temperature_is_warmed_up_for_every_group():
    net = make_net()
    groups = [{"params": net[3].parameters(), "temperature": 0.5}]
    optimizer = bl.VOGN(net, 60, temperature=2.0, groups=groups, generator=seeded())
    schedule = TemperatureWarmup(optimizer, steps=4, start=0.2)
    seen = []
    for seed in range(6):
        seen.append([g["temperature"] for g in optimizer.param_groups])
        run_scope(optimizer, net, *make_batch(seed=seed))
        optimizer.step(), schedule.step()
    factors = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert_close(torch.tensor(seen), factors[:, None] * torch.tensor([0.5, 2.0]))


def test_temperature_schedule_resumes():
    def start():
        optimizer = bl.VOGN(make_net(), 60, temperature=2.0)
        return optimizer, TemperatureSchedule(optimizer, lambda step: 1 / (1 + step))

    optimizer, schedule = start()
    for _ in range(3):
        schedule.step()
    resumed, other = start()
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(schedule.state_dict())
    for each in (schedule, other):
        each.step()
    assert resumed.param_groups[0]["temperature"] == optimizer.param_groups[0]["temperature"] == 2.0 / 5


def test_bad_schedules_are_refused():
    optimizer = bl.VOGN(make_net(), 60)
    with pytest.raises(ValueError, match="optimizer must have a temperature, got SGD"):
        TemperatureWarmup(torch.optim.SGD(make_net().parameters()), 3)
    with pytest.raises(ValueError, match="factor must be a finite number > 0, got 0"):
        TemperatureSchedule(optimizer, lambda step: 0)
    for kind in (TemperatureWarmup, lr_warmup):
        with pytest.raises(ValueError, match="steps must be an integer >= 1, got 0"):
            kind(optimizer, 0)
        with pytest.raises(ValueError, match=r"start must be in \(0, 1\], got 0"):
            kind(optimizer, 3, 0)


def test_learning_rate_is_warmed_up_before_another_schedule():
    net = make_net()
    optimizer = bl.VOGN(net, 60, lr=0.4, generator=seeded())
    schedule = lr_warmup(optimizer, 2, 0.5, lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.1))
    seen = []
    for seed in range(5):
        seen.append(optimizer.param_groups[0]["lr"])
        run_scope(optimizer, net, *make_batch(seed=seed))
        optimizer.step(), schedule.step()
    assert_close(seen, [0.2, 0.3, 0.4, 0.04, 0.004])
    constant = lr_warmup(bl.VOGN(make_net(), 60, lr=0.4), 1, 0.5)
    assert constant.get_last_lr() == [0.2]


def test_gradients_are_clipped_under_a_grad_scaler():
    """`optimizer.unscale_(scaler)` takes the scale out of gradient and curvature, so the step is the unscaled one."""
    states = []
    for enabled in (False, True):
        net, (x, y) = make_net(), make_batch()
        optimizer = bl.VOGN(net, 60, lr=0.1, precision_lr=0.1, generator=seeded())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for _ in range(3):
            with optimizer.sampled():
                scaler.scale(F.cross_entropy(net(x), y)).backward()
            optimizer.unscale_(scaler)
            nn.utils.clip_grad_norm_(net.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
        states.append(net.state_dict())
    assert_close(states[1], states[0], rtol=1e-9, atol=0)


def test_a_parameter_can_be_frozen_and_freed_midway():
    net, (x, y) = make_net(), make_batch()
    optimizer = bl.VOGN(net, 60, lr=0.1, generator=seeded())
    for frozen in (False, True, False):
        net[3].weight.requires_grad_(not frozen)
        before = copy.deepcopy(net.state_dict())
        optimizer.zero_grad()
        run_scope(optimizer, net, x, y)
        optimizer.step()
        for name in ("3.weight", "3.weight_precision"):
            assert torch.equal(net.state_dict()[name], before[name]) == frozen
        assert not torch.equal(net[0].weight, before["0.weight"])


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_ogn_reaches_its_fixed_point(temperature):
    """The mean is ridge regression's, the precision 1/T sum of squared gradients at it, and the prior's."""
    generator = seeded()
    x = torch.randn(20, 3, generator=generator, **F64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], **F64) + torch.randn(20, 1, generator=generator, **F64)
    model = bl.BayesLinear(3, 1, bias=False, prior_precision=4.0).double()
    optimizer = bl.OGN(model, 20, lr=0.5, beta1=0.0, precision_lr=0.3, init_precision=100.0, temperature=temperature)
    for _ in range(300):
        optimizer.zero_grad()
        with optimizer.sampled():
            (0.5 * (model(x) - y).square()).mean().backward()
        optimizer.step()
    ridge = torch.linalg.solve(x.T @ x / temperature + 4 * torch.eye(3, **F64), x.T @ y / temperature)
    assert_close(model.weight.detach().T, ridge, rtol=1e-10, atol=1e-10)
    squares = (x * (x @ ridge - y)).square().sum(0, keepdim=True)
    assert_close(model.weight_precision, squares / temperature + 4, rtol=1e-10, atol=0)


def test_noise_for_an_optimiser_without_draws_is_refused():
    net = make_net()
    for optimizer in (bl.OGN(net, 60), bl.KFAC(net, 60)):
        with pytest.raises(ValueError, match="noise must be None without draws"), optimizer.sampled(noise={}):
            pass


def test_draws_at_once_leave_a_matrix_variate_posterior_its_diagonal():
    net, (x, y) = make_net(), make_batch()
    optimizer = bl.NoisyKFAC(net, 60, generator=seeded())
    run_scope(optimizer, net, x, y)
    optimizer.step()
    assert net[3].roots is not None
    bl.VOGN(net, 60, num_samples=2, vectorise=True).step(lambda: F.cross_entropy(net(x), y))
    assert net[3].roots is None


@pytest.mark.parametrize("vectorise", [False, True])
def test_draws_before_a_closure_that_raises_are_kept(vectorise):
    states = []
    for raises in (False, True):
        net, (x, y) = make_net(), make_batch()
        optimizer = bl.VOGN(net, 60, lr=0.1, num_samples=2, vectorise=vectorise, generator=seeded())
        run_scope(optimizer, net, x, y)
        if raises:
            with pytest.raises(ZeroDivisionError):
                optimizer.step(lambda: 1 / 0)
        optimizer.step()
        states.append(net.state_dict())
    assert_close(states[1], states[0], rtol=0, atol=0)


def test_sync_needs_a_process_group_and_no_scaler(tmp_path):
    with pytest.raises(RuntimeError, match="sync must be off without a process group"):
        bl.VOGN(make_net(), 60, sync=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        states = []
        for sync in (False, True):
            net, (x, y) = make_net(), make_batch()
            optimizer = bl.VOGN(net, 60, lr=0.1, sync=sync, generator=seeded())
            run_scope(optimizer, net, x, y)
            optimizer.step()
            states.append(net.state_dict())
        assert_close(states[1], states[0])
        with pytest.raises(FloatingPointError, match="the loss must be finite, got nan"):
            optimizer.step(lambda: (F.cross_entropy(net(x), y) * math.nan).backward() or math.nan)
        scaler = torch.amp.GradScaler("cpu")
        with optimizer.sampled():
            scaler.scale(F.cross_entropy(net(x), y)).backward()
        with pytest.raises(RuntimeError, match="sync must be off under a GradScaler"):
            scaler.step(optimizer)
    finally:
        torch.distributed.destroy_process_group()


def test_a_generator_of_another_device_goes_on_as_it_is():
    optimizer = bl.VOGN(make_net(), 60, lr=0.1, generator=seeded(3))
    state = bl.VOGN(make_net(), 60, lr=0.7, generator=seeded()).state_dict() | {
        "generator": torch.zeros(16, dtype=torch.uint8)
    }
    with pytest.warns(UserWarning, match="that of another kind of device"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.7
    assert torch.equal(optimizer.state_dict()["generator"], seeded(3).get_state())
