"""Subclasses of layers: their own forward with the draw, and with the exact curvature or none."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from support.subclasses import REFUSED, SUBCLASSES, ChannelNorm, NormAct, Plain, make_input, name_of
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close

import bayeslayers as bl

SAME = {"rtol": 0, "atol": 0}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.mark.parametrize(("layer", "shape"), SUBCLASSES, ids=name_of)
def test_subclass_has_the_curvature_of_its_own_forward(layer, shape):
    layer = copy.deepcopy(layer).double().eval()  # in eval mode examples do not mix
    net, _ = bl.to_bayesian(layer)
    x = make_input(layer, shape, torch.float64)
    noise = {site.name: torch.randn_like(site.mean) for site in bl.posterior(net)}
    draw = {site.name: (site.mean + noise[site.name] / site.precision.sqrt()).detach() for site in bl.posterior(net)}

    def loss(weights, example):
        return functional_call(layer, weights, (example[None],)).square().sum()

    with bl.sampled(net, noise=noise), bl.tracked(net) as tracker:
        net(x).square().sum().backward()
    per_example = vmap(grad(loss), (None, 0))(draw, x)
    for name, gradients in per_example.items():
        assert_close(tracker.leaves[name].grad, gradients.square().sum(0), rtol=1e-10, atol=1e-10)
        assert_close(net.get_parameter(name).grad, gradients.sum(0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("layer", "reason"), REFUSED, ids=name_of)
def test_what_has_no_exact_curvature_stays_with_a_reason(layer, reason):
    net, report = bl.to_bayesian(nn.Sequential(nn.Linear(3, 3), layer))
    own = [entry for entry in report.entries[2:] if "other" not in entry.name]  # of a layer inside, which may
    assert own and all(entry.status == "deterministic" and re.search(reason, entry.reason) for entry in own)
    assert type(net[1]) is type(layer)


def test_misuse_that_only_training_shows_is_refused_there():
    class Decayed(nn.Linear):
        def forward(self, x):
            return super().forward(x) - (self.weight.sum() if self.training else 0)

    net, _ = bl.to_bayesian(Decayed(3, 3))
    with (
        bl.sampled(net),
        bl.tracked(net),
        pytest.raises(RuntimeError, match="forward of Decayed uses its weight in 'sum'"),
    ):
        net(torch.randn(2, 3))


def test_bias_that_plays_no_part_gets_no_curvature():
    class Unbiased(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight)

    net, _ = bl.to_bayesian(Unbiased(3, 2))
    with bl.sampled(net), bl.tracked(net) as tracker:
        net(torch.randn(5, 3)).sum().backward()
    assert (net.bias.grad, tracker.leaves["bias"].grad) == (None, None)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_converted_subclass_can_be_copied_and_pickled(copied):
    net, _ = bl.to_bayesian(nn.Sequential(ChannelNorm(4), NormAct(4), Plain()))
    counterpart = copied(net)
    assert [type(m) for m in counterpart] == [type(m) for m in net]
    assert_close(dict(counterpart.state_dict()), dict(net.state_dict()), **SAME)
