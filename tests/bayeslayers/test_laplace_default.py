"""A Laplace posterior predicts linearised unless told otherwise: its card says so, wherever the posterior goes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.method import method_of


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(n, seed=1):
    x = torch.randn(n, 2, generator=generator(seed))
    y = (x.norm(dim=1) > 1.1).long() + (x[:, 0] > 0)
    noisy = torch.rand(n, generator=generator(seed + 10)) < 0.15
    return x, torch.where(noisy, (y + 1) % 3, y)


def trained(likelihood=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    x, y = blobs(200)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    if likelihood is not None:
        net.likelihood = likelihood
    return net


@pytest.fixture(scope="module")
def nets():
    net = trained()
    return {
        "plain": net,
        "whole": bl.laplace(net, blobs(200)),
        "last": bl.laplace(net, blobs(200), layers=bl.last_layer),
    }


@pytest.mark.parametrize("kind", ["whole", "last"])
def test_the_default_is_linearised_and_an_explicit_method_wins(nets, kind):
    net, x = nets[kind], blobs(20, 2)[0]
    default, linearised, sampled = (
        bl.predict(net, x, 64, method=method, generator=generator()) for method in (None, "linearised", "sample")
    )
    assert torch.equal(default.mean, linearised.mean)
    assert not torch.allclose(default.mean, sampled.mean, atol=1e-4)


def test_it_predicts_better_than_drawn_weights_and_over_the_last_layer_than_its_network(nets):
    test = blobs(300, 3)
    of_network = bl.evaluate(nets["plain"], test, method="mean").metrics["nll"]
    nll = {kind: bl.evaluate(nets[kind], test, generator=generator()).metrics["nll"] for kind in ("whole", "last")}
    drawn = bl.evaluate(nets["whole"], test, method="sample", generator=generator()).metrics["nll"]
    assert nll["last"] < of_network < nll["whole"] < drawn - 0.05  # 0.50, 0.54, 0.60, 0.72


def test_the_method_survives_copies_files_and_wrappers(nets, tmp_path):
    net = nets["last"]
    assert net.card.method == method_of(net) == method_of(copy.deepcopy(net)) == "linearised"
    assert method_of(torch.compile(nn.DataParallel(AveragedModel(net)), backend="eager")) == "linearised"
    assert bl.save_posterior(net, tmp_path / "net").method == "linearised"
    again, _ = bl.to_bayesian(trained(), include=bl.last_layer)
    assert method_of(again) == "sample"
    bl.load_posterior(tmp_path / "net", again)
    x = blobs(20, 2)[0]
    expected = bl.predict(net, x, 64, generator=generator())
    assert_close(bl.predict(again, x, 64, generator=generator()).mean, expected.mean)
    assert method_of(bl.merge([net, again])) == "linearised"


def test_evaluate_and_recalibrate_follow_the_card(nets):
    data = blobs(100, 3)
    for call in (bl.evaluate, bl.recalibrate):
        found = [call(nets["whole"], data, method=method, generator=generator()) for method in (None, "linearised")]
        by_draws = call(nets["whole"], data, method="sample", generator=generator())
        first, second, third = (
            getattr(each, "metrics", None) or {"nll": each.nll_before} for each in (*found, by_draws)
        )
        assert first["nll"] == second["nll"] != third["nll"]


def test_the_likelihood_that_the_curvature_was_taken_with_stays():
    net = nn.Sequential(nn.Linear(2, 1))
    x, y = blobs(50)
    found = bl.laplace(net, (x, y[:, None].float()), bl.Gaussian(0.3))
    assert found.likelihood == bl.Gaussian(0.3) and not hasattr(net, "likelihood")
    assert bl.predict(found, x, 8).likelihood == bl.Gaussian(0.3)


def test_pairs_of_weights_need_the_method_of_drawn_weights(nets):
    with pytest.raises(ValueError, match=r"antithetic must be False for method 'linearised'.*Give method='sample'"):
        bl.predict(nets["last"], blobs(4)[0], 8, antithetic=True)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 1)

    def forward(self, x):
        return self.layer(x)


def test_a_covariance_that_no_memory_holds_is_refused():
    x = torch.randn(2, 1, 100, 100)
    net = bl.laplace(Dense(), (x, torch.randint(2, (2, 100, 100))), prior_precision=1.0)
    with pytest.raises(ValueError, match=r"got 1\.49 GiB for 20,000 outputs\. Use method='sample'"):
        bl.predict(net, x)
    assert bl.predict(net, x, 2, method="sample").mean.shape == (2, 2, 100, 100)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = bl.BayesLinear(2, 3), nn.Linear(3, 3)

    def forward(self, x):
        hidden = self.layer(x)
        return self.last(hidden if hidden.sum().item() > 0 else -hidden)


def test_a_network_that_cannot_be_linearised_names_another_method():
    with pytest.raises(
        ValueError, match=r"must be differentiable example by example .*Use method='sample', or .*last_layer"
    ) as caught:
        bl.predict(Branching(), torch.randn(3, 2), 4, method="linearised")
    assert "\n" not in str(caught.value)


def test_a_posterior_that_an_optimiser_has_moved_predicts_by_samples():
    net, x, y = nn.Linear(4, 3), torch.randn(20, 4), torch.arange(20) % 3
    net = bl.laplace(net, (x, y))
    optimizer = bl.VOGN(net, dataset_size=20)
    assert net.card.method == "linearised"
    with optimizer.sampled():
        F.cross_entropy(net(x), y).backward()
    optimizer.step()
    assert net.card.method == "sample"
