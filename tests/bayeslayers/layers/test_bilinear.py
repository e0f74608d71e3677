"""The worked example of a layer in one file: exact per example, and whole from conversion to a loaded posterior."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.curvature import accumulate

SAME = {"rtol": 0, "atol": 0}
EXACT = {"rtol": 1e-10, "atol": 1e-12}
pytestmark = pytest.mark.usefixtures("one_thread")


class Pair(nn.Module):
    """Two inputs in one, as most loops have it."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Bilinear(3, 4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.mix(x[..., :3], x[..., 3:]).tanh())


def potential(y):
    return (y.square() + y.sin()).sum()


def make_inputs(shape):
    torch.manual_seed(1)
    return [torch.randn(*shape, size, dtype=torch.float64, requires_grad=True) for size in (3, 4)]


def oracle(layer, inputs):
    """Return the sums of squared per-example gradients, by vmap(grad) of the same sum written with einsum."""

    def loss(tensors, x1, x2):
        y = torch.einsum("...i,oij,...j->...o", x1, tensors["weight"], x2)
        return potential(y + tensors["bias"] if "bias" in tensors else y)

    tensors = {name: p.detach() for name, p in layer.named_parameters()}
    found = vmap(grad(loss), (None, 0, 0))(tensors, *[x.detach() for x in inputs])
    return {name: value.square().sum(0) for name, value in found.items()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("budget", [1, 2**21], ids=["an_example_at_a_time", "whole"])
@pytest.mark.parametrize("shape", [(5,), (5, 3), (4, 2, 3)])
def test_curvature_is_that_of_per_example_gradients(shape, budget, bias, monkeypatch):
    monkeypatch.setitem(accumulate.CHUNK_BYTES, "cpu", budget)
    layer = bl.BayesBilinear(3, 4, 2, bias=bias).double()
    plain, inputs = bl.to_deterministic(layer), make_inputs(shape)
    again = [x.detach().clone().requires_grad_() for x in inputs]
    with bl.tracked(layer) as tracker:
        output = layer(*inputs)
        potential(output).backward()
    potential(expected := plain(*again)).backward()
    assert_close(output, expected, **EXACT)
    assert_close([x.grad for x in inputs], [x.grad for x in again], **EXACT)
    assert_close([p.grad for p in layer.parameters()], [p.grad for p in plain.parameters()], **EXACT)
    assert tracker.examples == shape[0]
    assert_close({name: leaf.grad for name, leaf in tracker.leaves.items()}, oracle(layer, inputs), **EXACT)


def test_a_single_example_may_come_without_its_dimension():
    layer, inputs = bl.BayesBilinear(3, 4, 2).double(), make_inputs(())
    with bl.tracked(layer) as tracker:
        potential(layer(*inputs)).backward()
    found = {name: leaf.grad for name, leaf in tracker.leaves.items()}
    assert_close(found, oracle(layer, [x[None] for x in inputs]), **EXACT)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_tensor_gets_no_leaf(frozen):
    layer, inputs = bl.BayesBilinear(3, 4, 2).double(), make_inputs((5, 3))
    expected = oracle(layer, inputs)
    del expected[frozen]
    layer.get_parameter(frozen).requires_grad_(False)
    with bl.tracked(layer) as tracker:
        potential(layer(*inputs)).backward()
    assert_close({name: leaf.grad for name, leaf in tracker.leaves.items()}, expected, **EXACT)
    assert layer.get_parameter(frozen).grad is None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at the draws
def test_compiled_layer_gives_the_same_curvature():
    torch._dynamo.reset()
    layer, inputs = bl.BayesBilinear(3, 4, 2).double(), make_inputs((5, 3))
    noise, found = {name: torch.randn_like(p) for name, p in layer.named_parameters()}, []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        with bl.sampled(layer, noise=noise), bl.tracked(layer) as tracker:
            potential(run(*inputs)).backward()
        found.append({name: leaf.grad.clone() for name, leaf in tracker.leaves.items()})
    assert_close(found[1], found[0], **EXACT)


def test_it_converts_there_and_back_bit_for_bit():
    torch.manual_seed(0)
    plain, x = Pair(), torch.randn(6, 7)
    net, report = bl.to_bayesian(plain)
    assert (type(net.mix), report.coverage) == (bl.BayesBilinear, 1)
    assert_close(net(x), plain(x), **SAME)
    assert_close(bl.to_deterministic(net)(x), plain(x), **SAME)


@pytest.mark.parametrize("vectorise", [False, True])
def test_a_posterior_is_trained_saved_loaded_and_predicts(vectorise, tmp_path):
    torch.manual_seed(0)
    net, _ = bl.to_bayesian(Pair())
    before = {site.name: (site.mean.detach().clone(), site.precision.clone()) for site in bl.posterior(net)}
    x, y = torch.randn(8, 7), torch.randint(2, (8,))
    optimizer = bl.VOGN(net, dataset_size=8, num_samples=2, vectorise=vectorise)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        return loss if vectorise else (loss.backward(), loss)[1]

    optimizer.step(closure)
    for site in bl.posterior(net):
        mean, precision = before[site.name]
        assert (site.mean != mean).any() and (site.precision != precision).any(), site.name
    bl.save_posterior(net, tmp_path / "saved")
    loaded, _ = bl.to_bayesian(Pair())
    bl.load_posterior(tmp_path / "saved", loaded)
    predictions = [bl.predict(each, x, 16, generator=torch.Generator().manual_seed(1)) for each in (net, loaded)]
    assert_close(predictions[1].probs, predictions[0].probs, **SAME)
    assert predictions[0].epistemic.min() > 0
