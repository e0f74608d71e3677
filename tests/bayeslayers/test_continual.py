"""The posterior as the prior of the next task: diagonal, matrix-variate, strengthened, and kept by optimisers."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.distributions.matrix_gaussian import as_matrix, marginal_precision, strengthened
from bayeslayers.layers import PRIOR_ROOTS
from bayeslayers.optim.matrix_prior import MatrixPrior

EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(bl.BayesLinear(3, 4), nn.Tanh(), bl.BayesLinear(4, 2)).to(dtype)


def batch(seed=0, n=16):
    x = torch.randn(n, 3, generator=seeded(seed), dtype=torch.float64)
    return x, (x[:, 0] > x[:, 1]).long()


def train(optimizer, net, steps=5, seed=0):
    x, y = batch(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        with optimizer.sampled():
            F.cross_entropy(net(x), y).backward()
        optimizer.step()


def factored(steps=5):
    net = network()
    train(bl.NoisyKFAC(net, 16, lr=0.05, generator=seeded(), inverse_every=1), net, steps)
    return net


def root(size, seed):
    return torch.eye(size, dtype=torch.float64) + 0.3 * torch.randn(size, size, generator=seeded(seed)).double()


def covariance(roots):
    return torch.kron(roots[1] @ roots[1].mT, roots[0] @ roots[0].mT)  # of W flattened by rows: (o, i)


# What becomes of the tensors.


@pytest.mark.parametrize(("strength", "grown", "shrunk"), [(1.0, 3.0, 0.5), (4.0, 9.0, 0.5), (0.5, 2.0, 0.75)])
def test_evidence_counts_by_its_strength_and_a_loss_of_precision_once_at_most(strength, grown, shrunk):
    layer = bl.BayesLinear(2, 1, prior_precision=1.0, init_precision=3.0)
    layer.weight_precision[0, 0] = 0.5  # less than the prior's, as IVON's may become
    bl.posterior_to_prior(layer, strength)
    assert_close(layer.weight_prior_precision, torch.tensor([[shrunk, grown]]), **EXACT)
    assert_close(layer.weight_prior_mean, layer.weight.detach(), **EXACT)
    bl.posterior_to_prior(layer, strength)  # what a task did not change, it does not strengthen beyond the posterior
    assert (layer.weight_prior_precision > 0).all()


@pytest.mark.parametrize("strength", [0.0, -1.0, math.nan])
def test_a_strength_that_is_not_positive_is_rejected_before_anything_changes(strength):
    layer = bl.BayesLinear(2, 1)
    with pytest.raises(ValueError, match="strength must be a finite number > 0"):
        bl.posterior_to_prior(layer, strength)
    assert layer.weight_prior_precision.dim() == 0


def test_deterministic_parameters_are_named_in_one_warning():
    net = nn.Sequential(bl.BayesLinear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    net[2].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"2 parameters have no posterior .*\('1.weight', '1.bias'\)"):
        bl.posterior_to_prior(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bl.posterior_to_prior(network())


def test_a_mixture_of_past_posteriors_is_a_prior():
    first, second = network(), network()
    second[0].weight.data += 0.1
    merged = bl.merge([first, second], "average")
    bl.posterior_to_prior(merged)
    means = torch.stack([net[0].weight.detach() for net in (first, second)])
    assert_close(merged[0].weight_prior_mean, means.mean(0), **CLOSE)
    expected = 1 / (1 / first[0].weight_precision + means.var(0, correction=0))
    assert_close(merged[0].weight_prior_precision, expected, rtol=1e-6, atol=0)


# A matrix-variate posterior becomes a matrix-variate prior.


def test_a_matrix_posterior_becomes_a_matrix_prior_with_no_divergence():
    net = factored()
    bl.posterior_to_prior(net)
    for layer in (net[0], net[2]):
        assert_close(layer.prior_roots, layer.roots, **EXACT)
        assert layer.prior_roots[0] is not layer.roots[0]
    assert float(bl.kl_divergence(net)) == pytest.approx(0.0, abs=1e-9)
    net[0].weight.data += 0.1
    assert float(bl.kl_divergence(net)) > 0.01


def test_divergence_from_a_matrix_prior_is_that_of_the_whole_gaussian():
    layer = bl.BayesLinear(2, 3).double()
    layer.set_roots(root(3, 1), root(3, 2))
    layer.set_prior_roots(root(3, 3), root(3, 4))
    layer.weight_prior_mean, layer.bias_prior_mean = torch.ones(3, 2).double(), torch.zeros(3).double()
    mean = as_matrix(layer.weight.detach(), layer.bias.detach())
    prior_mean = as_matrix(layer.weight_prior_mean, layer.bias_prior_mean)
    q = MultivariateNormal(mean.flatten(), covariance(layer.roots))
    p = MultivariateNormal(prior_mean.flatten(), covariance(layer.prior_roots))
    assert_close(bl.kl_divergence(layer), kl_divergence(q, p), **CLOSE)


def test_strength_one_gives_the_posterior_and_another_one_keeps_the_determinant():
    prior, posterior = (root(3, 1), root(2, 2)), (0.3 * root(3, 3), 0.4 * root(2, 4))
    assert_close(covariance(strengthened(posterior, prior, 1.0)), covariance(posterior), **CLOSE)
    whitened = torch.linalg.solve(torch.kron(prior[1], prior[0]), torch.kron(posterior[1], posterior[0]))
    ratio = 1 / torch.linalg.eigvalsh(whitened @ whitened.mT)
    assert (ratio > 1).all()
    for strength in (0.5, 4.0):
        found = covariance(strengthened(posterior, prior, strength))
        expected = -(1 + strength * (ratio - 1)).log().sum() + torch.logdet(covariance(prior))
        assert_close(torch.logdet(found), expected, **CLOSE)


def test_a_strengthened_matrix_prior_has_the_precisions_of_its_entries():
    net = factored()
    before = net[0].weight_precision.clone()
    bl.posterior_to_prior(net, 4.0)
    precisions = marginal_precision(*net[0].prior_roots)
    assert_close(net[0].weight_prior_precision, precisions[:, :3], **CLOSE)
    assert_close(net[0].bias_prior_precision, precisions[:, 3], **CLOSE)
    assert (net[0].weight_prior_precision > before).all()


def test_a_diagonal_posterior_drops_the_matrix_prior():
    net = factored()
    bl.posterior_to_prior(net)
    train(bl.VOGN(net, 16, lr=0.01, generator=seeded()), net)
    bl.posterior_to_prior(net)
    assert net[0].prior_roots is None and not set(PRIOR_ROOTS) & set(dict(net[0].named_buffers()))


def test_a_matrix_prior_is_saved_and_loaded_with_the_posterior(tmp_path):
    net = factored()
    bl.posterior_to_prior(net, 2.0)
    train(bl.NoisyKFAC(net, 16, lr=0.05, generator=seeded(), inverse_every=1), net)
    bl.save_posterior(net, tmp_path / "mine")
    fresh = network(1)
    bl.load_posterior(tmp_path / "mine", fresh)
    assert_close(dict(fresh.state_dict()), dict(net.state_dict()), **EXACT)
    assert set(PRIOR_ROOTS) <= set(dict(fresh[0].named_buffers()))
    bl.save_posterior(network(), tmp_path / "other", method="mean")
    bl.load_posterior(tmp_path / "other", fresh)
    assert fresh[0].prior_roots is None
    ordinary = bl.to_deterministic(net)
    assert set(ordinary.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert bl.merge([net, net], "average")[0].prior_roots is None


# The step under a matrix-variate prior.


def test_the_pull_of_a_matrix_prior_is_its_precision_times_the_difference():
    layer = bl.BayesLinear(2, 3).double()
    layer.set_prior_roots(root(3, 3), root(3, 4))
    difference = torch.randn(3, 3, generator=seeded()).double()
    precision = torch.linalg.inv(covariance(layer.prior_roots))
    prior = MatrixPrior.of(layer, 3)
    assert_close(prior.pull(difference).flatten(), precision @ difference.flatten(), **CLOSE)
    assert MatrixPrior.of(layer, 3, prior) is prior
    without_bias = MatrixPrior.of(layer, 2)
    assert_close(covariance((without_bias.input_root, without_bias.output_root)),
                 covariance(layer.prior_roots).reshape(3, 3, 3, 3)[:, :2, :, :2].reshape(6, 6), **CLOSE)  # fmt: skip
    assert MatrixPrior.of(layer, 4) is None


def test_an_isotropic_matrix_prior_moves_a_network_as_a_number_does():
    plain, matrix = network(), network()
    for layer in (matrix[0], matrix[2]):
        roots = (torch.eye(n, dtype=torch.float64) for n in (layer.in_features + 1, layer.out_features))
        layer.set_prior_roots(*(r * 50.0**-0.25 for r in roots))
    for net in (plain, matrix):
        options = {"lr": 0.05, "damping": 1e-2, "init_precision": "curvature", "inverse_every": 1}
        train(bl.NoisyKFAC(net, 16, generator=seeded(), **options), net, steps=4)
    for found, expected in zip(matrix.parameters(), plain.parameters(), strict=True):
        assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert_close(covariance(matrix[0].roots), covariance(plain[0].roots), rtol=1e-8, atol=1e-12)


def test_a_matrix_prior_holds_the_weights_where_it_is_certain():
    """Along inputs that the first task has seen the weights stay; a number of equal size holds nothing apart."""
    net = bl.BayesLinear(2, 1, bias=False).double()
    roots = torch.tensor([[1.0, 0.0], [1.0, 1e-3]], dtype=torch.float64)  # certain about w_0 - w_1 alone
    net.set_prior_roots(roots, torch.eye(1, dtype=torch.float64))
    net.weight_prior_precision = marginal_precision(roots, torch.eye(1, dtype=torch.float64))
    net.weight_prior_mean = net.weight.detach().clone()
    start = net.weight.detach().clone()
    optimizer = bl.KFAC(net, 100, lr=0.3, damping=1e-6, likelihood=bl.Gaussian(1.0), inverse_every=1)
    x = torch.randn(100, 2, generator=seeded(), dtype=torch.float64)
    y = 3 * x[:, :1] + x[:, 1:]
    for _ in range(60):
        optimizer.zero_grad()
        with optimizer.sampled():
            (0.5 * (net(x) - y).square()).mean().backward()
        optimizer.step()
    moved = (net.weight.detach() - start)[0]
    assert abs(float(moved[0] - moved[1])) < 0.02 and float(moved.abs().min()) > 0.5


# What an optimiser of the next task does.

METHODS = {
    "vogn": lambda net: bl.VOGN(net, 16, lr=0.01, prior_precision=7.0, generator=seeded()),
    "vogn, no lr": lambda net: bl.VOGN(net, 1000, generator=seeded()),
    "vogn, a group": lambda net: bl.VOGN(
        net, 16, lr=0.01, groups=[{"params": list(net.parameters()), "prior_precision": 7.0}], generator=seeded()
    ),
    "ivon": lambda net: bl.IVON(net, 16, lr=0.1, generator=seeded()),
    "bbb": lambda net: bl.BBB(net, 16, prior_precision=7.0, generator=seeded()),
    "noisykfac": lambda net: bl.NoisyKFAC(net, 16, lr=0.05, prior_precision=7.0, generator=seeded(), inverse_every=1),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_new_optimiser_keeps_a_prior_that_is_an_earlier_posterior(method):
    net = network()
    train(METHODS[method](net), net)
    bl.posterior_to_prior(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = METHODS[method](net)
    assert_close(dict(net.state_dict()), before, **EXACT)
    train(optimizer, net)
    priors = {name: value for name, value in net.state_dict().items() if "_prior_" in name}
    assert_close(priors, {name: before[name] for name in priors}, **EXACT)
    assert not torch.equal(net[0].weight, before["0.weight"])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "vogn, no lr"])  # whose lr is a new one's own
def test_an_optimiser_that_goes_on_has_no_momentum_of_the_task_before(method):
    def second_task(again):
        net = network()
        optimizer = METHODS[method](net)
        train(optimizer, net, steps=4)
        bl.posterior_to_prior(net)
        if again:
            hessians = [group.get("hess_init") for group in optimizer.param_groups]
            optimizer = METHODS[method](net)
            for group, hessian in zip(optimizer.param_groups, hessians, strict=True):
                group |= {} if hessian is None else {"hess_init": hessian}
        train_with_noise(optimizer, net)
        return dict(net.state_dict())

    assert_close(second_task(again=False), second_task(again=True), **EXACT)


def train_with_noise(optimizer, net):
    """Take steps whose draws do not depend on what the optimiser's generator has given before."""
    optimizer._generator.manual_seed(5)
    train(optimizer, net, steps=3, seed=1)


def test_the_scale_of_ivons_step_follows_the_precision_of_its_prior():
    net = network()
    bl.IVON(net, 16, lr=0.1, generator=seeded())
    for site in bl.posterior(net):
        site.precision.fill_(16 * 5.0)
    bl.posterior_to_prior(net)
    optimizer = bl.IVON(net, 16, lr=0.1, hess_init=1.0, weight_decay=1e-4, generator=seeded())
    assert optimizer.param_groups[0]["hess_init"] == pytest.approx(5.0 - 1e-4)
    assert {float(p) for site in bl.posterior(net) for p in site.precision.unique()} == {80.0}
