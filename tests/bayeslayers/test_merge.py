from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.distributions.gaussian import natural_gradient_step_
from zoo.registry import describe

D, N, NOISE = 5, 12, 0.3  # features, examples of a shard, variance of the target's noise


def shards(count, seed=0):
    """Data sets of one linear map, the design of each orthogonal, so that its posterior is diagonal."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(D, generator=g, dtype=torch.float64)
    for _ in range(count):
        x = torch.linalg.qr(torch.randn(N, D, generator=g, dtype=torch.float64))[0]
        x = x * (0.5 + torch.rand(D, generator=g, dtype=torch.float64))
        yield x, x @ weight + NOISE**0.5 * torch.randn(N, generator=g, dtype=torch.float64)


def conjugate(data, prior_mean, prior_precision):
    """Mean and precision of the weights' exact posterior, by the normal equations."""
    x, y = (torch.cat(column) for column in zip(*data, strict=True))
    precision = x.T @ x / NOISE + prior_precision * torch.eye(D, dtype=torch.float64)
    mean = torch.linalg.solve(precision, x.T @ y / NOISE + prior_precision * prior_mean)
    return mean, precision.diagonal()


def layer(mean, precision, prior_mean=0.0, prior_precision=2.0):
    net = bl.BayesLinear(D, 1, bias=False, dtype=torch.float64, prior_precision=prior_precision)
    net.weight.data.copy_(mean)
    net.weight_precision.copy_(precision)
    net.weight_prior_mean.fill_(prior_mean)
    return net


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("prior_mean", "prior_precision"), [(0.0, 2.0), (0.7, 0.1)])
def test_posteriors_of_shards_multiply_to_the_posterior_of_the_whole(count, prior_mean, prior_precision):
    data = list(shards(count))
    prior = (prior_mean, prior_precision)
    merged = bl.merge([layer(*conjugate([shard], *prior), *prior) for shard in data])
    mean, precision = conjugate(data, *prior)
    assert_close(merged.weight.detach(), mean[None], rtol=1e-12, atol=0)
    assert_close(merged.weight_precision, precision[None], rtol=1e-12, atol=0)
    assert (float(merged.weight_prior_mean), float(merged.weight_prior_precision)) == prior


def test_the_prior_of_one_task_on_the_next_gives_the_posterior_of_both():
    first, second = shards(2)
    net = layer(*conjugate([first], 0.0, 2.0))
    bl.posterior_to_prior(net)
    assert bl.kl_divergence(net).item() == 0.0
    x, y = second
    with torch.no_grad():
        natural_gradient_step_(
            net.weight,
            net.weight_precision,
            grad=((net.weight[0] @ x.T - y) @ x / NOISE / N)[None],
            curvature=(x.square().sum(0) / NOISE / N)[None],
            prior_mean=net.weight_prior_mean,
            prior_precision=net.weight_prior_precision,
            ess=N,
            lr=1.0,
            precision_lr=1.0,
        )
    mean, precision = conjugate([first, second], 0.0, 2.0)
    assert_close(net.weight.detach(), mean[None], rtol=1e-12, atol=0)
    assert_close(net.weight_precision, precision[None], rtol=1e-12, atol=0)


def test_an_average_has_the_moments_of_the_mixture():
    g = torch.Generator().manual_seed(0)
    means, deviations = torch.randn(3, D, generator=g).double(), 0.2 + torch.rand(3, D, generator=g).double()
    merged = bl.merge([layer(m, d**-2) for m, d in zip(means, deviations, strict=True)], "average")
    components = torch.distributions.Normal(means.T, deviations.T)
    weights = torch.distributions.Categorical(torch.ones(D, 3).double())
    mixture = torch.distributions.MixtureSameFamily(weights, components)
    assert_close(merged.weight.detach()[0], mixture.mean, rtol=1e-12, atol=0)
    assert_close(1 / merged.weight_precision[0], mixture.variance, rtol=1e-12, atol=0)


def test_a_prior_of_tensors_survives_a_file_and_a_merge(tmp_path):
    net = zoo.create("mlp", widths=[3], input_size=[4], num_classes=2)
    bl.posterior_to_prior(net)
    bl.save_posterior(net, tmp_path / "posterior")
    loaded = zoo.load(tmp_path / "posterior")
    assert bl.kl_divergence(loaded).item() == 0.0
    for site in bl.posterior(loaded):
        site.precision.mul_(3)
    merged = bl.merge([loaded, loaded])
    for site, before in zip(bl.posterior(merged), bl.posterior(net), strict=True):
        assert_close(site.precision, 5 * before.precision)  # 3 + 3 - 1
        assert_close(site.mean, before.mean)
        assert_close(site.prior_mean, before.mean)


def test_a_prior_is_a_copy_that_an_existing_optimiser_follows():
    net = bl.BayesLinear(3, 2)
    optimizer = bl.VOGN(net, dataset_size=10, lr=0.1)
    bl.posterior_to_prior(net)
    prior = net.weight_prior_mean.clone()

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(4, 3)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert_close(net.weight_prior_mean, prior, rtol=0, atol=0)
    assert net.weight_prior_precision.shape == net.weight.shape
    assert (net.weight != prior).any()


def test_statistics_of_batchnorm_are_those_of_the_shards_together():
    data = torch.randn(6, 40, 3).double() * torch.rand(6, 1, 3) + torch.randn(6, 1, 3)
    nets = [nn.Sequential(bl.BayesBatchNorm1d(3, momentum=None), nn.Linear(3, 2)).double() for _ in data]
    for net, batch in zip(nets, data, strict=True):
        net[0].running_mean.copy_(batch.mean(0))
        net[0].running_var.copy_(batch.var(0, correction=0))
        net[0].num_batches_tracked.fill_(2)
    merged = bl.merge(nets, "average")
    assert_close(merged[0].running_mean, data.flatten(0, 1).mean(0), rtol=1e-10, atol=1e-12)
    assert_close(merged[0].running_var, data.flatten(0, 1).var(0, correction=0), rtol=1e-10, atol=1e-12)
    assert int(merged[0].num_batches_tracked) == 12
    assert_close(merged[1].weight, torch.stack([net[1].weight for net in nets]).mean(0))


def test_merging_leaves_the_models_as_they_were_and_makes_no_claims():
    nets = [zoo.load("lenet5-mnist"), zoo.load("lenet5-mnist")]
    describe(nets[0], dataclasses.replace(nets[0].card, resize=32))
    before = {name: tensor.clone() for name, tensor in nets[0].state_dict().items()}
    merged = bl.merge(nets, "average")
    for name, tensor in nets[0].state_dict().items():
        assert_close(tensor, before[name], rtol=0, atol=0)
        assert tensor.data_ptr() != merged.state_dict()[name].data_ptr()
        assert_close(merged.state_dict()[name], tensor)  # of one and the same
    card = merged.card
    assert (card.builder, card.metrics, card.baseline, card.sha256) == ("lenet5", {}, {}, "")
    assert (card.dataset, card.resize) == (nets[0].card.dataset, 32)
    assert card.notes == "Merged from lenet5-mnist, lenet5-mnist by average."
    with bl.sampled(nets[0]):
        inside = bl.merge(nets, "average")
    x = torch.rand(2, 1, 28, 28)
    assert_close(inside(x), merged(x), rtol=0, atol=0)


def normed(size=2, std=0.5):
    return zoo.create("mlp", widths=[size], input_size=[3], num_classes=2, std=[std])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bl.merge([]), TypeError, "must be one model or more, got none"),
        (lambda: bl.merge(["lenet5-mnist"]), TypeError, "got str"),
        (lambda: bl.merge([normed()], "sum"), ValueError, "'product' or 'average', got 'sum'"),
        (lambda: bl.merge([nn.Linear(1, 1)]), ValueError, "must have Bayesian layers, got none"),
        (
            lambda: bl.merge([normed(), normed(3)]),
            ValueError,
            r"'hidden1.weight' of shape \(2, 3\) in posterior 0 and \(3,",
        ),
        (lambda: bl.merge([normed(), nn.ReLU()]), ValueError, "in only one of 0 and 1"),
        (lambda: bl.merge([normed(), normed(std=0.4)]), ValueError, "agree in buffer 'normalise.std'"),
        (
            lambda: bl.merge([layer(0.0, 3.0), layer(0.0, 3.0, prior_precision=1.0)]),
            ValueError,
            "another prior_precision of 'weight' in posterior 1",
        ),
        (
            lambda: bl.merge([layer(0.0, 3.0), layer(0.0, 3.0, prior_mean=1.0)], "average"),
            ValueError,
            "another prior_mean of 'weight' in posterior 1",
        ),
        (
            lambda: bl.merge([layer(0.0, 0.9), layer(0.0, 1.0)]),
            ValueError,
            r"must be > 0, got -0.1 in 'weight': .* Use method='average'",
        ),
        (lambda: bl.posterior_to_prior(nn.Linear(1, 1)), ValueError, "must have Bayesian layers, got none"),
    ],
)
def test_what_cannot_be_merged_is_one_sentence(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_kl_to_the_old_prior_is_the_price_of_what_was_learned():
    net = layer(torch.ones(D), torch.full((D,), 8.0))
    q = torch.distributions.Normal(torch.ones(D), 8**-0.5)
    p = torch.distributions.Normal(torch.zeros(D), 2**-0.5)
    assert math.isclose(
        bl.kl_divergence(net).item(), float(torch.distributions.kl_divergence(q, p).sum()), rel_tol=1e-6
    )
