"""Tensors that several layers share: their per-example gradients add up before they are squared."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support.per_example import EXACT, F64, bayesian, potential, squares_by_autograd, tracked_squares
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl

pytestmark = pytest.mark.usefixtures("one_thread")
N, WORDS = 4, 7


class Language(nn.Module):
    """An embedding whose table is the weight of the output layer, as in GPT-2."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(WORDS, 3), nn.Linear(3, 3), nn.Linear(3, WORDS, bias=bias)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mix(self.embed(ids)).tanh())


def loss(net, ids):
    return potential(net(ids))


def make_ids(steps=5):
    return torch.randint(WORDS, (N, steps), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_embedding_and_head_add_up(parts):
    net = bayesian(Language())
    assert next(site.names for site in bl.posterior(net)) == ("embed.weight", "head.weight")
    found = tracked_squares(net, loss, make_ids(), parts=parts)
    assert_close(found, squares_by_autograd(net, loss, make_ids()), **EXACT)


def test_two_linear_layers_in_turn_add_up():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight, net[4].bias = net[0].weight, net[2].bias
    net, x = bayesian(net), torch.randn(N, 5, 3, **F64)
    assert_close(tracked_squares(net, loss, x), squares_by_autograd(net, loss, x), **EXACT)


def test_a_step_of_two_samples_is_exact():
    net, ids = bayesian(Language()), make_ids()
    optimizer = bl.VOGN(net, dataset_size=50, num_samples=2, precision_lr=1.0, init_precision=30.0)
    drawn = []

    def closure():
        optimizer.zero_grad()
        drawn.append({s.name: s.value.detach().clone() for s in bl.posterior(net)})
        value = potential(net(ids)) / N
        value.backward()
        return value

    optimizer.step(closure)
    found = {site.name: site.precision for site in bl.posterior(net)}
    expected = {site.name: site.prior_precision.clone() for site in bl.posterior(net)}
    for values in drawn:
        with torch.no_grad():
            for name, value in values.items():
                net.get_parameter(name).copy_(value)
        expected = {k: expected[k] + 50 * v / N / 2 for k, v in squares_by_autograd(net, loss, ids).items()}
    assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("method", ["VOGN", "IVON", "KFAC"])
def test_the_posterior_is_saved_once_and_loaded(method, tmp_path):
    torch.manual_seed(0)
    net, ids = bl.to_bayesian(Language())[0], make_ids()
    options = {"fisher": "empirical"} if method == "KFAC" else {}
    optimizer = getattr(bl, method)(net, dataset_size=20, **options)
    before = net.embed.weight.detach().clone()
    with optimizer.sampled():
        assert net.embed.weight is net.head.weight
        nn.functional.cross_entropy(net(ids).flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
    assert not torch.equal(net.embed.weight, before)
    bl.save_posterior(net, tmp_path / "posterior")
    tensors = load_file(tmp_path / "posterior" / "model.safetensors")
    assert [name for name in tensors if name.endswith("weight_precision")] == [
        "embed.weight_precision",
        "mix.weight_precision",
    ]
    other = bl.to_bayesian(Language())[0]
    bl.load_posterior(tmp_path / "posterior", other)
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    found = [
        bl.predict(m, ids, 4, generator=g, likelihood=bl.Gaussian(1.0)).mean
        for m, g in zip((net, other), seeds, strict=True)
    ]
    assert_close(*found, rtol=0, atol=0)


def test_both_uses_compute_with_one_sample():
    net = bayesian(Language())
    seen = []
    with bl.sampled(net):
        seen = [module.value("weight") for module in (net.embed, net.head)]
    assert seen[0] is seen[1]
    assert not torch.equal(seen[0], net.embed.weight)


def test_a_layer_that_is_called_apart_from_its_partner_is_refused():
    net = bayesian(Language())
    with bl.tracked(net), pytest.raises(RuntimeError, match=r"layer '(head|embed)' must run in one call of the model"):
        potential(net.head(net.mix(net.embed(make_ids())))).backward()
