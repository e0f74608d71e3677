"""Laplace with the posterior of the tasks before as the prior, and with the Fisher information at drawn labels."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl


def data(seed=0, n=30, classes=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(bl.BayesLinear(4, 5), nn.Tanh(), bl.BayesLinear(5, 3)).double()


def test_the_posterior_of_the_task_before_is_the_prior():
    first = bl.laplace(net(), [data(0)], prior_precision=2.0)
    trained = net(1)
    second = bl.laplace(trained, [data(1)], prior=first)
    alone = bl.laplace(trained, [data(1)], prior_precision=2.0)
    for new, old, own in zip(*map(bl.posterior, (second, first, alone)), strict=True):
        assert_close(new.precision, own.precision - 2.0 + old.precision)
        assert_close(new.prior_mean, old.mean.detach(), rtol=0, atol=0)
        assert_close(new.prior_precision, old.precision, rtol=0, atol=0)
        assert old.prior_precision.dim() == 0  # left as it was
    assert second.laplace.prior_precision == {}


def test_it_is_that_of_posterior_to_prior():
    first = bl.laplace(net(), [data(0)], prior_precision=2.0)
    second = bl.laplace(first, [data(1)], prior=first)
    bl.posterior_to_prior(first)
    expected = bl.laplace(first, [data(1)], prior_precision=None)
    assert_close(dict(second.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    assert second.laplace.log_marginal_likelihood == expected.laplace.log_marginal_likelihood


def test_an_ordinary_network_takes_the_prior_of_layers_of_the_same_names():
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    second = bl.laplace(plain, [data(1)], prior=bl.laplace(net(), [data(0)]))
    assert second[0].weight_prior_precision.shape == (5, 4)
    with pytest.raises(ValueError, match=r"prior must have a posterior for '0.weight' of shape \(5, 4\), got none"):
        bl.laplace(plain, [data(1)], prior=plain)


def test_drawn_labels_give_the_fisher_information_in_the_mean():
    """For a linear classifier the diagonal of the Fisher is sum_n x_i^2 p_c (1 - p_c)."""
    torch.manual_seed(0)
    layer = bl.BayesLinear(4, 3, bias=False).double()
    x, y = data(n=20)
    probs = layer(x).softmax(1).detach()
    expected = torch.einsum("ni,nc->ci", x.square(), probs * (1 - probs))
    draws = torch.stack([
        bl.laplace(layer, [(x, y)], prior_precision=1.0, fisher="sampled",
                   generator=torch.Generator().manual_seed(seed)).weight_precision - 1.0
        for seed in range(200)
    ])  # fmt: skip
    z = (draws.mean(0) - expected) / (draws.std(0) / 200**0.5)
    assert float(z.abs().max()) < 5
    empirical = bl.laplace(layer, [(x, y)], prior_precision=1.0).weight_precision - 1.0
    assert float((empirical - expected).abs().max()) > 0.1  # another matrix


def test_the_evidence_is_that_of_the_data_and_ignored_labels_stay_ignored():
    x, y = data()
    ignored = torch.where(torch.arange(30) < 10, -100, y)
    seeded = torch.Generator().manual_seed
    sampled = bl.laplace(net(), [(x, ignored)], prior_precision=2.0, fisher="sampled", generator=seeded(0))
    assert sampled.laplace.dataset_size == 20
    assert sampled.laplace.log_likelihood == bl.laplace(net(), [(x, ignored)]).laplace.log_likelihood
    with pytest.raises(ValueError, match="fisher must be 'empirical', 'sampled' or 'exact', got 'true'"):
        bl.laplace(net(), [(x, y)], fisher="true")


def test_labels_of_real_targets_and_of_yes_or_no_are_drawn_too():
    x, _ = data()
    for likelihood, y in (
        (bl.Gaussian(0.5), torch.randn(30, 3).double()),
        (bl.Bernoulli(), torch.ones(30, 3).double()),
    ):
        found = bl.laplace(net(), [(x, y)], likelihood, 2.0, fisher="sampled")
        assert (found[2].weight_precision > 2.0).all()
