"""Draws: their noise, their scope, their gradient; and the KL divergence."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl
from torch.func import functional_call
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.curvature.kernels.draw import StandardNormal
from bayeslayers.sampling import Sampler, flat, posterior

SAME = {"rtol": 0, "atol": 0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_z(estimate: torch.Tensor | float, expected: float, deviation: float) -> None:
    """Assert that an estimate lies within 5 of its standard deviations of what is expected."""
    assert_close(float(estimate), float(expected), rtol=0, atol=5 * deviation)


def assert_standard_normal(z: torch.Tensor) -> None:
    """Assert the first four moments and the tails of independent standard normal values."""
    z, n = z.double().flatten(), z.numel()
    assert_z(z.mean(), 0, n**-0.5)
    assert_z(z.square().mean(), 1, (2 / n) ** 0.5)
    assert_z(z.pow(3).mean(), 0, (15 / n) ** 0.5)
    assert_z(z.pow(4).mean(), 3, (96 / n) ** 0.5)
    for bound in (0.01, 1.0, 3.0, 4.0):
        for side in (z, -z):
            prob = math.erfc(bound / 2**0.5) / 2
            assert_z((side > bound).double().mean(), prob, max((prob * (1 - prob) / n) ** 0.5, 1 / n))


@pytest.mark.parametrize("n", [2**22, 10**6 + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_standard_normal(dtype, n):
    z = StandardNormal(seeded()).fill_(torch.empty(n, dtype=dtype))
    assert_standard_normal(z)
    assert_z((z[1:] * z[:-1]).double().mean(), 0, n**-0.5)  # neighbours are independent
    assert_close(z.isfinite().all(), torch.tensor(True))
    assert_z(z.double().max(), math.sqrt(2 * math.log(n)), 0.2)  # the farthest value is about where it should be


def test_the_two_values_of_a_pair_are_independent():
    n = 2**21
    first, second = StandardNormal(seeded()).fill_(torch.empty(2 * n)).view(-1, 2, 2**15).double().unbind(1)
    assert_z((first * second).mean(), 0, n**-0.5)
    assert_z(((first.square() - 1) * (second.square() - 1)).mean(), 0, 2 * n**-0.5)


@pytest.mark.parametrize("n", [0, 1, 2**16 - 1, 2**16, 2**16 + 1, 2**20 + 1, 3 * 2**20 - 1])
def test_noise_fills_every_size(n):
    z = StandardNormal(seeded()).fill_(torch.full((n,), math.nan))
    assert_close(z.isfinite().all(), torch.tensor(True))
    assert len(z.unique()) >= 0.9 * n  # no part repeats another; 24 bits allow some chance repeats


def test_the_angles_of_a_pair_have_the_moments_of_all_angles():
    words = torch.arange(512, dtype=torch.int64) << 23 | 12345  # one radius, at all of its angles
    angle = words.to(torch.int32).to(torch.float32).double() * math.pi / 2**31
    for order in (1, 2, 3, 4, 100, 500, 511):
        assert_close(
            torch.polar(torch.ones(512).double(), order * angle).mean().abs(),
            torch.tensor(0.0).double(),
            rtol=0,
            atol=1e-4,
        )


@pytest.mark.parametrize("n", [100, 10**5])
def test_generator_fixes_the_noise(n):
    generator = seeded(1)
    first, second = (StandardNormal(generator).fill_(torch.empty(n)) for _ in range(2))
    assert_close(StandardNormal(seeded(1)).fill_(torch.empty(n)), first, **SAME)
    for other in (second, StandardNormal(seeded(2)).fill_(torch.empty(n))):
        assert_z((first * other).double().mean(), 0, n**-0.5)
    torch.manual_seed(3)
    from_default = StandardNormal().fill_(torch.empty(n))
    torch.manual_seed(3)
    assert_close(StandardNormal().fill_(torch.empty(n)), from_default, **SAME)


def make_net(features: int = 3) -> nn.Sequential:
    """Return a net whose means, precisions and priors all differ from their defaults."""
    torch.manual_seed(0)
    net = nn.Sequential(bl.BayesLinear(features, features), nn.Tanh(), bl.BayesLinear(features, features)).double()
    for site in bl.posterior(net):
        site.precision.uniform_(0.5, 20)
        site.prior_mean.fill_(0.3)
        site.prior_precision.fill_(2.5)
    return net


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that a call of the net would use."""
    return {site.name: site.module.value(site.key).detach().clone() for site in bl.posterior(net)}


def test_posterior_yields_every_tensor_under_its_name():
    net = make_net()
    sites = list(bl.posterior(net))
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    assert [site.name for site in sites] == list(parameters)
    for site in sites:
        tensors = (site.mean, site.precision, site.prior_mean, site.prior_precision)
        suffixes = ("_precision", "_prior_mean", "_prior_precision")
        assert all(
            tensor is expected
            for tensor, expected in zip(
                tensors, (parameters[site.name], *(buffers[site.name + suffix] for suffix in suffixes)), strict=True
            )
        )


def test_draw_has_the_posteriors_moments():
    net = make_net(300)
    noise = []
    for seed in range(2):
        with bl.sampled(net, seeded(seed)):
            drawn = weights(net)
        noise.append([(drawn[s.name] - s.mean).detach() * s.precision.sqrt() for s in bl.posterior(net)])
    for z in (z for draw in noise for z in draw if z.dim() == 2):
        assert_standard_normal(z)
    first, other_site, other_draw = noise[0][0], noise[0][2], noise[1][0]
    for other in (other_site, other_draw):  # nothing is shared across sites or draws
        assert_z((first * other).mean(), 0, first.numel() ** -0.5)


def test_generator_fixes_the_draw():
    net, generator, draws = make_net(), seeded(), []
    for source in (generator, generator, seeded()):
        with bl.sampled(net, source):
            draws.append(weights(net))
    assert_close(draws[2], draws[0], **SAME)
    assert not any(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])


def test_draw_of_every_memory_format_and_dtype():
    net = bl.BayesConv2d(32, 64, 3).to(memory_format=torch.channels_last)
    with bl.sampled(net, seeded()):
        drawn = weights(net)["weight"]
    assert_standard_normal((drawn - net.weight.detach()) * net.weight_precision.sqrt())
    net.to(torch.float64)
    noise = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    with bl.sampled(net, noise=noise):
        expected = net.weight.detach() + noise["weight"] / net.weight_precision.sqrt()
        assert_close(weights(net)["weight"], expected)


def test_weights_are_the_means_again_after_the_scope():
    net, x = make_net(), torch.randn(4, 3, dtype=torch.float64)
    before, output = weights(net), net(x)
    with bl.sampled(net, seeded()):
        assert not torch.equal(net(x), output)
    assert_close(net(x), output, **SAME)
    with pytest.raises(KeyError, match="boom"), bl.sampled(net, seeded()):
        raise KeyError("boom")
    assert_close(weights(net), before, **SAME)
    with pytest.raises((KeyError, ValueError), match=r"2\.bias"):  # the last site has no noise
        with bl.sampled(net, noise={site.name: site.mean for site in list(bl.posterior(net))[:-1]}):
            pass
    assert_close(weights(net), before, **SAME)


def test_scopes_nest_and_the_inner_draw_holds():
    net = make_net()
    with bl.sampled(net, seeded(1)):
        outer = weights(net)
        with bl.sampled(net[2], seeded(2)):
            inner = weights(net)
            assert_close(inner["0.weight"], outer["0.weight"], **SAME)
            assert not torch.equal(inner["2.weight"], outer["2.weight"])
        assert_close(weights(net), outer, **SAME)
    with bl.tracked(net) as outer_tracker:
        net(torch.randn(4, 3, dtype=torch.float64)).sum().backward()
        sums = {name: leaf.grad.clone() for name, leaf in outer_tracker.leaves.items()}
        with bl.tracked(net) as inner_tracker:
            net(torch.randn(4, 3, dtype=torch.float64)).sum().backward()
        assert_close({name: leaf.grad for name, leaf in outer_tracker.leaves.items()}, sums, **SAME)
        assert_close(inner_tracker.examples, 4)


def test_tracked_starts_from_zero_and_ends_with_its_scope():
    net, x = make_net(), torch.randn(4, 3, dtype=torch.float64)
    with bl.tracked(net) as tracker:
        net(x).sum().backward()
        sums = {name: leaf.grad.clone() for name, leaf in tracker.leaves.items()}
    net(x).sum().backward()
    assert_close({name: leaf.grad for name, leaf in tracker.leaves.items()}, sums, **SAME)
    with bl.tracked(net) as second:
        net(x).sum().backward()
    assert_close({name: leaf.grad for name, leaf in second.leaves.items()}, sums, **SAME)


@pytest.mark.parametrize("tracking", [False, True])
def test_gradient_at_the_draw_arrives_in_the_mean(tracking):
    net, x = make_net(), torch.randn(4, 3, dtype=torch.float64)
    counterpart = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    noise = {site.name: torch.randn_like(site.mean) for site in bl.posterior(net)}
    drawn = {s.name: (s.mean + noise[s.name] / s.precision.sqrt()).detach() for s in bl.posterior(net)}
    with bl.sampled(net, noise=noise):
        assert_close(weights(net), drawn)
        if tracking:
            with bl.tracked(net):
                output = net(x)
        else:
            output = net(x)
        output.square().sum().backward()
    leaves = {name: w.requires_grad_() for name, w in drawn.items()}
    expected = functional_call(counterpart, leaves, (x,))
    assert_close(output, expected)
    grads = torch.autograd.grad(expected.square().sum(), list(leaves.values()))
    assert_close([p.grad for p in net.parameters()], list(grads))


def test_frozen_mean_is_drawn_without_a_gradient():
    net, x = make_net(), torch.randn(4, 3, dtype=torch.float64)
    net[0].weight.requires_grad_(False)
    before = weights(net)
    with bl.sampled(net, seeded()):
        assert not torch.equal(weights(net)["0.weight"], before["0.weight"])
        net(x).sum().backward()
    assert net[0].weight.grad is None


@pytest.mark.parametrize("tensor_prior", [False, True])
def test_kl_divergence_is_that_of_torch_distributions(tensor_prior):
    net = make_net()
    expected = torch.zeros((), dtype=torch.float64)
    for site in bl.posterior(net):
        if tensor_prior:
            for suffix in ("_prior_mean", "_prior_precision"):
                site.module.register_buffer(site.key + suffix, torch.rand_like(site.mean.detach()) + 0.5)
        q, p = Normal(site.mean, site.precision**-0.5), Normal(site.prior_mean, site.prior_precision**-0.5)
        expected = expected + torch_kl(q, p).sum()
    assert_close(bl.kl_divergence(net), expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(kl, list(net.parameters())) for kl in (bl.kl_divergence(net), expected)]
    assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_kl_divergence_of_the_prior_to_itself_is_zero():
    net = make_net()
    for site in bl.posterior(net):
        nn.init.constant_(site.mean, float(site.prior_mean))
        site.precision.fill_(float(site.prior_precision))
    assert_close(bl.kl_divergence(net), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="must have Bayesian layers, got none"):
        bl.kl_divergence(nn.Linear(2, 2))


def test_tied_parameter_is_refused_by_both_names():
    first, second = (bl.BayesLinear(3, 3, bias=False) for _ in range(2))
    second.weight = first.weight
    with pytest.raises(ValueError, match=r"'1.weight' must belong to one Bayesian layer, got that of '0.weight'"):
        list(bl.posterior(nn.Sequential(first, second)))


@pytest.mark.parametrize("noise", [{}, {"weight": torch.zeros(3), "bias": torch.zeros(2)}])
def test_noise_of_another_shape_is_refused(noise):
    with (
        pytest.raises(ValueError, match=r"noise must hold 'weight' of shape \(2, 3\), got"),
        bl.sampled(bl.BayesLinear(3, 2), noise=noise),
    ):
        pass


@pytest.mark.parametrize("tracked", [False, True])
def test_padding_row_of_an_embedding_is_not_drawn(tracked):
    layer = bl.BayesEmbedding(4, 3, padding_idx=1, init_precision=1.0)
    with bl.sampled(layer), bl.tracked(layer) if tracked else contextlib.nullcontext():
        rows = layer(torch.tensor([[0, 1, 2, 1]]))[0]
    assert_close(rows[1::2], layer.weight[[1, 1]], **SAME)
    assert bool((rows[::2] != layer.weight[[0, 2]]).all())


def _many(layers: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[bl.BayesLinear(3, 3) for _ in range(layers)])


@pytest.mark.parametrize("run", [1, 10**6])
def test_small_tensors_are_drawn_together_with_noise_and_gradients_of_their_own(monkeypatch, run):
    monkeypatch.setattr(flat, "_FEW", run)
    net, x = _many(), torch.randn(5, 3)
    sampler = Sampler(list(posterior(net)), torch.Generator().manual_seed(1))
    with sampler.draw():
        net(x).square().sum().backward()
        values = {site.name: site.value for site in sampler.sites}
    grads = {name: p.grad for name, p in net.named_parameters()}
    noise = {name: values.clone() for name, values in sampler.noise.items()}
    together = torch.empty(12 * 12).normal_(generator=torch.Generator().manual_seed(1))
    assert_close(torch.cat([part.flatten() for part in noise.values()]), together, rtol=0, atol=0)
    net.zero_grad()
    with bl.sampled(net, noise=noise):
        net(x).square().sum().backward()
        for site in sampler.sites:
            assert_close(values[site.name], site.value)
    assert {*noise} == {name for name, _ in net.named_parameters()}
    for name, parameter in net.named_parameters():
        assert_close(grads[name], parameter.grad)
    with sampler.draw():
        assert not torch.equal(sampler.noise["0.weight"], noise["0.weight"])


def test_neighbours_share_a_node_of_the_graph_and_others_have_their_own():
    tensors = [torch.zeros(2, requires_grad=True) for _ in range(21)]
    places = [*range(10), *range(12, 14), *range(20, 29)]
    found = flat.moved(tensors, [*torch.arange(42.0).split(2)], places)
    assert_close(torch.cat(found), torch.arange(42.0))
    nodes = [x.grad_fn for x in found]
    assert len({*nodes[:10]}) == len({*nodes[12:]}) == 1
    assert len({*nodes}) == 4
    found[0].sum().backward()
    assert tensors[0].grad is not None
    assert [x.grad for x in tensors[1:]] == [None] * 20


def test_samples_of_small_tensors_stay_when_the_next_is_drawn_and_follow_the_model():
    net = nn.Sequential(bl.BayesLinear(100, 90), bl.BayesLinear(90, 2))  # 9,282 values, whose noise comes from a kernel
    sampler = Sampler(list(posterior(net)), seeded())
    for move in (net.float, net.double, net.half, net.float):
        move()
        with sampler.draw():
            first = [site.value for site in sampler.sites]
        before = [value.clone() for value in first]
        with sampler.draw():
            for site, own, copy in zip(sampler.sites, first, before, strict=True):
                noise = sampler.noise[site.name]
                assert site.value.dtype == site.mean.dtype
                assert_close(own, copy, **SAME)
                assert not torch.equal(own, site.value)
                assert_close(site.value, site.mean + noise * site.deviation)


def test_a_layer_that_is_called_by_itself_counts_in_its_own_scope_alone():
    net = nn.Sequential(bl.BayesLinear(3, 2), bl.BayesLinear(2, 1))
    with bl.tracked(net) as tracker:
        net[0](torch.ones(5, 3)).sum().backward()
        assert tracker.examples == 5
        tracker.clear()
        assert tracker.examples == 0
        net[1](torch.ones(4, 2)).sum().backward()
    assert tracker.examples == 4
