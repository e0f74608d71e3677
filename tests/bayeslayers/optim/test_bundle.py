from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.optim import bundle
from bayeslayers.sampling import flat, posterior


def _net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(bl.BayesLinear(4, 3), nn.Tanh(), bl.BayesLinear(3, 3), nn.Tanh(), bl.BayesLinear(3, 2))
    net[2].weight_prior_precision.fill_(7.0)
    net[2].bias_prior_mean = torch.randn(3)
    return net


def _trained(kind, **options) -> tuple[nn.Module, dict]:
    net = _net()
    optimizer = kind(net, 20, lr=1e-3, **options)
    x, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)), torch.arange(6) % 2

    source = torch.Generator().manual_seed(3)
    for _ in range(3):
        for _ in range(2):
            noise = {name: torch.randn(p.shape, generator=source) for name, p in net.named_parameters()}
            with optimizer.sampled(noise):
                nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer.state_dict()


CASES = [
    (bl.VOGN, {}),
    (bl.VOGN, {"init_precision": "curvature", "damping": 0.1}),
    (bl.IVON, {"estimator": "gradsq"}),
    (bl.IVON, {"clip_radius": 0.1, "beta1": 0.0}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("together", [10, 2**18])
def test_small_tensors_move_together_as_they_do_alone(monkeypatch, kind, options, together):
    monkeypatch.setattr(flat, "_TOGETHER", together)
    found, state = _trained(kind, **options)
    monkeypatch.setattr(flat, "SMALL", 0)
    alone, own = _trained(kind, **options)
    for (name, one), (_, other) in zip(found.state_dict().items(), alone.state_dict().items(), strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-7, msg=name)
    assert state["state"].keys() == own["state"].keys()
    for key, values in own["state"].items():
        assert_close(state["state"][key], values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_pieces_of_a_large_tensor_move_as_the_whole_does(monkeypatch, kind, options):
    monkeypatch.setattr(flat, "SMALL", 0)
    whole, own = _trained(kind, **options)
    monkeypatch.setattr(bundle, "_PIECE", 5)
    found, state = _trained(kind, **options)
    for (name, one), (_, other) in zip(found.state_dict().items(), whole.state_dict().items(), strict=True):
        assert_close(one, other, rtol=1e-6, atol=1e-7, msg=name)
    for key, values in own["state"].items():
        assert_close(state["state"][key], values, rtol=1e-6, atol=1e-7)


def test_only_what_lies_in_one_order_is_moved_in_pieces(monkeypatch):
    monkeypatch.setattr(bundle, "_PIECE", 5)
    net = bl.BayesLinear(4, 3)
    (weight, *_), statistics = posterior(net), {net.weight: torch.zeros(3, 4)}

    def pieces(state):
        return bundle.Bundle(
            [net.weight], {net.weight: weight}, statistics, {net.weight: state}, flat.Scratch()
        ).pieces()

    net.weight.grad = torch.zeros(3, 4)
    state = {"step": 3, "momentum": torch.zeros(3, 4)}
    assert [p.piece for p in pieces(state)] == [slice(0, 5), slice(5, 10), slice(10, 15)]
    assert [len(p.mean) for p in pieces(state)] == [5, 5, 2]
    assert [p.piece for p in pieces({"momentum": torch.zeros(4, 3).t()})] == [None]
    net.weight.grad = torch.zeros(4, 3).t()
    assert [p.piece for p in pieces(state)] == [None]


def test_a_step_of_many_small_tensors_takes_few_operations():
    net = nn.Sequential(*[bl.BayesLinear(3, 3) for _ in range(20)])
    optimizer = bl.VOGN(net, 20, lr=1e-3)
    with optimizer.sampled():
        net(torch.randn(4, 3)).square().mean().backward()
    with torch.profiler.profile() as profile:
        optimizer.step()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::addcdiv_"] == 1
    assert counts["aten::lerp_"] == 2  # of momentum and precision


def test_tensors_of_other_types_and_shapes_are_gathered_apart():
    tensors = [torch.ones(2, 3), torch.ones(2, dtype=torch.float64), torch.ones(()), torch.ones(flat.SMALL + 1)]
    found = flat.joined(tensors)
    assert [(len(x), x.dtype) for x in found[1:]] == [(7, torch.float32), (2, torch.float64)]
    assert found[0] is tensors[3]
    assert flat.filled([torch.tensor(1.0), torch.tensor(5.0)], [torch.ones(2), torch.ones(1, 1)]).tolist() == [1, 1, 5]


def test_scratch_follows_what_is_gathered():
    scratch, some = flat.Scratch(), [torch.ones(2, 3), torch.ones(())]
    for step in (1, 2):
        whole = scratch.gather("mean", some)
        whole.mul_(2)
        scratch.scatter("mean", some)
        assert some[0].unique().tolist() == [2.0**step] and some[1].item() == 2.0**step
    assert scratch.gather("mean", some) is whole
    assert scratch.gather("precision", some) is not whole
    others = [x.double() for x in some]
    assert scratch.gather("mean", others).dtype == torch.float64
    assert scratch.gather("mean", [torch.ones(3), torch.zeros(2)]).tolist() == [1, 1, 1, 0, 0]
    assert scratch.gather("mean", some[:1]) is some[0]
