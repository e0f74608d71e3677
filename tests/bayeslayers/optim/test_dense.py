"""K-FAC with a dense curvature of chosen layers, against per-example autograd and Bayesian linear regression."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from support.steps import F64, seeded
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl

pytestmark = pytest.mark.usefixtures("one_thread")
NOISE_VARIANCE, N = 0.5, 40
METHODS = [bl.KFAC, bl.NoisyKFAC]


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(bl.BayesLinear(3, 4), nn.Tanh(), bl.BayesLinear(4, 2)).double()


def make_batch(examples: int = 8):
    torch.manual_seed(1)
    return torch.randn(examples, 3, **F64), torch.randn(examples, 2, **F64)


def make_optimizer(net: nn.Module, kind=bl.KFAC, **kwargs):
    arguments = {"dataset_size": N, "lr": 0.5, "prior_precision": 5.0, "likelihood": bl.Gaussian(NOISE_VARIANCE),
                 "generator": seeded(), "inverse_every": 1, "dense": "2", "fisher": "empirical"}  # fmt: skip
    return kind(net, **{**arguments, **kwargs})


def take_step(optimizer, net, x, y) -> None:
    optimizer.zero_grad()
    with optimizer.sampled():
        bl.Gaussian(NOISE_VARIANCE).loss(net(x), y).backward()
    optimizer.step()


def gradients_of(net: nn.Module, layer: nn.Module, x, y) -> torch.Tensor:
    """Return the gradients `(n, d)` of each example's loss in all entries of a layer."""
    rows = []
    for i in range(len(x)):
        loss = bl.Gaussian(NOISE_VARIANCE).loss(net(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(layer.parameters()))]))
    return torch.stack(rows)


def flat(layer: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in layer.parameters()])


@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_steps_are_those_of_a_dense_curvature(damping):
    net, (x, y) = make_net(), make_batch()
    optimizer = make_optimizer(net, beta1=0.0, factor_lr=0.3, damping=damping)
    average, weight = torch.zeros(10, 10, **F64), 0.0
    for _ in range(3):
        rows, mean = gradients_of(net, net[2], x, y), flat(net[2])
        average, weight = 0.7 * average + 0.3 * rows.mT @ rows / len(x), 0.7 * weight + 0.3
        take_step(optimizer, net, x, y)
        curvature = average / weight
        precision = N * curvature + 5.0 * torch.eye(10, **F64)
        step = torch.linalg.solve(precision + N * damping * torch.eye(10), N * rows.mean(0) + 5.0 * mean)
        assert_close(flat(net[2]), mean - 0.5 * step)
        root = net[2].dense_root
        assert_close(root @ root.mT, torch.linalg.inv(precision))
        own = [site.precision.flatten() for site in bl.posterior(net) if site.name.startswith("2.")]
        assert_close(torch.cat(own), 1 / (root @ root.mT).diagonal())
    assert net[0].roots is not None and net[0].dense_root is None


def test_bayesian_linear_regression_is_exact():
    net, (x, y) = nn.Sequential(bl.BayesLinear(3, 2).double()), make_batch(4096)
    optimizer = make_optimizer(net, dense=bl.last_layer, fisher="sampled", dataset_size=len(x), lr=1.0, damping=0.0,
                               factor_lr=0.1, beta1=0.0)  # fmt: skip
    for _ in range(20):
        take_step(optimizer, net, x, y)
    design = torch.cat([x, torch.ones(len(x), 1, **F64)], 1)
    precision = design.mT @ design / NOISE_VARIANCE + 5.0 * torch.eye(4, **F64)
    mean = torch.linalg.solve(precision, design.mT @ y / NOISE_VARIANCE)  # (4, 2)
    assert_close(net[0].weight.detach(), mean[:3].mT, rtol=1e-6, atol=1e-8)
    assert_close(net[0].bias.detach(), mean[3], rtol=1e-6, atol=1e-8)
    found, covariance = net[0].dense_root @ net[0].dense_root.mT, torch.linalg.inv(precision)
    expected = torch.zeros(8, 8, **F64)  # of the rows of the weight, then the bias
    for output in range(2):
        own = [3 * output, 3 * output + 1, 3 * output + 2, 6 + output]
        expected[torch.tensor(own)[:, None], torch.tensor(own)] = covariance
    assert float((found - expected).norm() / expected.norm()) < 0.05  # what drawn labels leave
    assert float((found.diagonal() / expected.diagonal() - 1).abs().max()) < 0.1


def test_the_precision_at_the_start_fades():
    net, (x, y) = make_net(), make_batch()
    optimizer = make_optimizer(net, bl.NoisyKFAC, init_precision=2e4, factor_lr=0.5, lr=0.0)
    traces = []
    for _ in range(8):
        take_step(optimizer, net, x, y)
        traces.append(float(net[2].dense_root.square().sum()))
    assert traces[0] < 10 / 9e3 and all(a < b for a, b in itertools.pairwise(traces))
    assert traces[-1] > 20 * traces[0]


def test_a_dense_prior_enters_the_step():
    net, (x, y) = make_net(), make_batch()
    take_step(make_optimizer(net), net, x, y)
    bl.posterior_to_prior(net)
    root, prior_mean = net[2].prior_dense_root, flat(net[2])
    optimizer = make_optimizer(net, beta1=0.0, damping=0.0, prior_precision=None)
    for _ in range(2):
        rows, mean = gradients_of(net, net[2], x, y), flat(net[2])
        take_step(optimizer, net, x, y)
    prior = torch.linalg.inv(root @ root.mT)
    average = optimizer.state[net[2].weight]["block"]
    precision = N * average + prior
    step = torch.linalg.solve(precision, N * rows.mean(0) + prior @ (mean - prior_mean))
    assert_close(flat(net[2]), mean - 0.5 * step, rtol=1e-5, atol=1e-7)
    assert_close(net[2].dense_root @ net[2].dense_root.mT, torch.linalg.inv(precision), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", METHODS)
def test_training_resumes_bit_for_bit(kind):
    x, y = make_batch()
    one = make_net()
    optimizer = make_optimizer(one, kind, inverse_every=2, update_every=2)
    for _ in range(3):
        take_step(optimizer, one, x, y)
    two = copy.deepcopy(one)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = make_optimizer(two, kind, inverse_every=2, update_every=2, prior_precision=None)
    again.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        take_step(optimizer, one, x, y)
        take_step(again, two, x, y)
    assert all(torch.equal(a, two.state_dict()[key]) for key, a in one.state_dict().items())


def test_a_dense_posterior_is_drawn_saved_and_loaded(tmp_path):
    net, (x, y) = make_net(), make_batch()
    optimizer = make_optimizer(net, bl.NoisyKFAC)
    for _ in range(3):
        take_step(optimizer, net, x, y)
    bl.save_posterior(net, tmp_path / "net")
    loaded = make_net()
    bl.load_posterior(tmp_path / "net", loaded)
    assert_close(loaded[2].dense_root, net[2].dense_root)
    draws = []
    for _ in range(600):
        with bl.sampled(net, generator=optimizer._generator):
            draws.append(torch.cat([s.value.flatten() for s in bl.posterior(net) if s.name.startswith("2.")]).detach())
    covariance = net[2].dense_root @ net[2].dense_root.mT
    found = torch.stack(draws).mT.cov()
    assert float((found - covariance).norm() / covariance.norm()) < 0.3


def test_a_frozen_bias_leaves_a_layer_diagonal():
    net, (x, y) = make_net(), make_batch()
    net[2].bias.requires_grad_(False)
    optimizer = make_optimizer(net)
    before = net[2].weight_precision.clone()
    take_step(optimizer, net, x, y)
    assert net[2].dense_root is None and not torch.equal(before, net[2].weight_precision)


@pytest.mark.parametrize(
    ("net", "dense", "message"),
    [
        (
            lambda: nn.Sequential(bl.BayesLinear(3, 4), bl.BayesLayerNorm(4)),
            "1",
            "linear layers and convolutions, got '1'",
        ),
        (lambda: nn.Sequential(bl.BayesLinear(3, 4)), "head", "dense"),
        (lambda: nn.Sequential(bl.BayesLinear(100, 61)), "0", "at most 6,000 weights, got '0' with 6,161"),
    ],
)
def test_layers_without_a_dense_curvature_are_refused(net, dense, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(net(), dense=dense)


def test_a_matrix_variate_prior_is_refused():
    net, (x, y) = make_net(), make_batch()
    take_step(make_optimizer(net, dense=None), net, x, y)
    bl.posterior_to_prior(net)
    with pytest.raises(ValueError, match="prior of layer '2' must be dense or of independent entries under dense="):
        take_step(make_optimizer(net, prior_precision=None), net, x, y)
