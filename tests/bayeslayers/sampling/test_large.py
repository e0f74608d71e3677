from __future__ import annotations

import weakref

import pytest
import torch
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.curvature.kernels import draw
from bayeslayers.sampling import Sampler, posterior

SAME = {"rtol": 0, "atol": 0}


def _layer() -> bl.BayesLinear:
    """A layer whose weight is large."""
    torch.manual_seed(0)
    layer = bl.BayesLinear(300, 300)
    layer.weight_precision.uniform_(0.5, 4)
    return layer


def _source() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("keeps_noise", [False, True])
def test_a_sample_in_one_pass_is_that_of_torch_ops(monkeypatch, frozen, keeps_noise):
    layer = _layer()
    sites = {site.name: site for site in posterior(layer)}
    sampler = Sampler(list(sites.values()), _source(), frozen=frozen, keeps_noise=keeps_noise)
    with sampler.draw():
        found = sites["weight"].value
        assert found.grad_fn is not None and "Sample" in type(found.grad_fn).__name__
    assert ("weight" in sampler.noise) is keeps_noise
    monkeypatch.setattr("bayeslayers.sampling.sampler.fits", lambda *_: False)
    whole = Sampler(list(sites.values()), _source(), frozen=frozen)
    with whole.draw():
        expected = sites["weight"].value
    assert_close(found, expected, rtol=1e-6, atol=1e-7)
    values = whole.noise["weight"]
    assert_close(expected, layer.weight + values / layer.weight_precision.sqrt(), rtol=1e-5, atol=1e-6)
    if keeps_noise:
        assert_close(sampler.noise["weight"], values, **SAME)


def test_gradients_reach_the_mean_and_samples_do_not_share_memory():
    layer, x = _layer(), torch.randn(4, 300)
    sampler = Sampler(list(posterior(layer)), _source(), keeps_noise=False)
    outputs = []
    for _ in range(2):
        with sampler.draw():
            outputs.append(layer(x))
    assert not torch.equal(*outputs)
    (outputs[0].square().sum() / 2).backward()
    assert_close(layer.weight.grad, outputs[0].detach().t() @ x, rtol=1e-4, atol=1e-4)


def test_vmap_and_half_precision_sample_the_whole_tensor():
    layer = _layer()
    assert draw.fits(layer.weight, layer.weight_precision)
    assert not draw.fits(layer.weight.half(), layer.weight_precision)
    assert not draw.fits(layer.weight.t(), layer.weight_precision)
    seen = torch.vmap(lambda x: x + draw.fits(layer.weight, layer.weight_precision))(torch.zeros(2))
    assert seen.tolist() == [0, 0]


def test_ivon_leaves_given_noise_alone_and_takes_the_step_of_its_own():
    x, nets, noise = torch.randn(4, 300), [_layer(), _layer()], {}
    for net in nets:
        optimizer = bl.IVON(net, 20, lr=1e-3, generator=_source())
        with optimizer.sampled(noise or None):
            if not noise:
                noise = {name: values.clone() for name, values in optimizer._sampler.noise.items()}
                before = {name: values.clone() for name, values in noise.items()}
            net(x).square().sum().backward()
        optimizer.step()
    assert_close(noise, before, **SAME)
    assert_close(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=1e-4, atol=1e-5)
    assert not torch.equal(nets[0].weight, _layer().weight)


@pytest.mark.parametrize("kind", [bl.VOGN, bl.IVON])
def test_gradients_that_a_step_has_used_take_no_memory_in_the_next_scope(kind):
    net, x, seen = _layer(), torch.randn(4, 300), []
    optimizer = kind(net, 20, lr=1e-3)

    def closure():
        seen.append(net.weight.grad is None and (not used or used[0]() is None))
        loss = net(x).square().mean()
        loss.backward()
        return loss

    used = []
    for _ in range(2):
        optimizer.step(closure)
        used = [weakref.ref(net.weight.grad)]
    assert seen == [True, True]
