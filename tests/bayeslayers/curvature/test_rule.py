"""Rules as objects: layers of any number of tensors under any names, end to end, and kernels in place of squares."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.layers import PAIRS, BayesCell, BayesGain, Gain, LowRank, Net
from torch import nn
from torch.func import grad, vmap
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers import curvature
from bayeslayers.convert import conversion
from bayeslayers.curvature import Use, accumulate
from bayeslayers.curvature.kernels import register_kernel

SAME = {"rtol": 0, "atol": 0}
EXACT = {"rtol": 1e-10, "atol": 1e-12}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(conversion, "_RULES", dict(conversion._RULES))
    for ordinary, bayesian in PAIRS.items():
        bl.register_rule(ordinary, bayesian)


def potential(y):
    return (y.square() + y.sin()).sum()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_net(plain=None):
    torch.manual_seed(0)
    return bl.to_bayesian(plain or Net())[0]


def make_batch():
    torch.manual_seed(1)
    return torch.randn(8, 3), torch.randint(2, (8,))


def close(net, x, y):
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    return loss


@pytest.mark.parametrize("budget", [1, 2**21], ids=["an_example_at_a_time", "whole"])
def test_a_forward_is_enough_for_exact_curvature(registered, budget, monkeypatch):
    monkeypatch.setitem(accumulate.CHUNK_BYTES, "cpu", budget)
    net = make_net().double()
    plain, x = bl.to_deterministic(net), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    with bl.tracked(net) as tracker:
        potential(net(x)).backward()
    potential(plain(again)).backward()
    rows = [torch.autograd.grad(potential(plain(row[None])), [*plain.parameters()]) for row in x.detach()]
    names = [name for name, _ in plain.named_parameters()]
    expected = {n: torch.stack(g).square().sum(0) for n, g in zip(names, zip(*rows, strict=True), strict=True)}
    assert {name.rpartition(".")[2] for name in expected} == {
        "gain", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "down", "up", "shift"
    }  # fmt: skip
    assert_close({name: leaf.grad for name, leaf in tracker.leaves.items()}, expected, **EXACT)
    assert_close({n: p.grad for n, p in net.named_parameters()}, {n: p.grad for n, p in plain.named_parameters()})
    assert_close(x.grad, again.grad, **EXACT)


@pytest.mark.parametrize("make", [
    lambda net: bl.VOGN(net, 8, lr=0.1, precision_lr=0.1), lambda net: bl.OGN(net, 8, lr=0.1, precision_lr=0.1),
    lambda net: bl.VOGN(net, 8), lambda net: bl.IVON(net, 8), lambda net: bl.BBB(net, 8, lr=0.1),
    lambda net: bl.BBB(net, 8, lr=0.1, estimator="local"), lambda net: bl.KFAC(net, 8, fisher="empirical"),
    lambda net: bl.NoisyKFAC(net, 8, fisher="sampled"),
], ids=["VOGN", "OGN", "VOGN_defaults", "IVON", "BBB", "BBB_local", "KFAC", "NoisyKFAC"])  # fmt: skip
def test_every_method_trains_every_tensor(registered, make):
    net, (x, y) = make_net(), make_batch()
    optimizer = make(net)
    before = {site.name: (site.mean.detach().clone(), site.precision.clone()) for site in bl.posterior(net)}
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step(lambda: close(net, x, y))
    for site in bl.posterior(net):
        mean, precision = before[site.name]
        assert (site.mean != mean).any() and (site.precision != precision).any(), site.name


def test_a_posterior_is_saved_loaded_and_predicts(registered, tmp_path):
    net, (x, y) = make_net(), make_batch()
    bl.VOGN(net, 8).step(lambda: close(net, x, y))
    bl.save_posterior(net, tmp_path / "saved")
    loaded = make_net()
    bl.load_posterior(tmp_path / "saved", loaded)
    predictions = [bl.predict(each, x, 16, generator=seeded()) for each in (net, loaded)]
    assert_close(predictions[1].probs, predictions[0].probs, **SAME)
    assert predictions[0].epistemic.min() > 0
    assert_close(bl.to_deterministic(loaded)(x), net(x), **SAME)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at the draws
def test_a_rule_of_a_forward_compiles_without_a_graph_break(registered):
    torch._dynamo.reset()
    net, (x, _) = make_net(), make_batch()
    noise, found = {site.name: torch.randn_like(site.mean) for site in bl.posterior(net)}, []
    for run in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        with bl.sampled(net, noise=noise), bl.tracked(net) as tracker:
            potential(run(x)).backward()
        found.append({name: leaf.grad.clone() for name, leaf in tracker.leaves.items()})
    assert_close(found[1], found[0])


def test_per_example_gradients_of_several_uses_add_up():
    """What a layer that runs several times will need of every rule: its per-example gradients over uses are summed."""
    torch.manual_seed(0)
    x, h = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    cell = BayesCell(3, 4).double()
    tensors = tuple(p.detach() for p in cell.parameters())

    def run(*tensors, x=x, h=h):
        first = cell.rule.forward((x, h), tensors, ())
        return first, cell.rule.forward((x, first), tensors, ())

    first, second = run(*tensors)
    g_second = 2 * second + second.cos()
    of_second = Use((x, first), tensors, (), (True,) * 10)
    g_first = cell.rule.squares(of_second, g_second)[1]
    uses = [(Use((x, h), tensors, (), (True,) * 10), g_first), (of_second, g_second)]
    found = [sum(gradients) for gradients in zip(*(cell.rule.per_example(*use) for use in uses), strict=True)]
    expected = vmap(
        grad(lambda w, x, h: potential(run(*w, x=x[None], h=h[None])[1])), (None, 0, 0)
    )(tensors, x, h)  # fmt: skip
    assert_close(tuple(found), expected, **EXACT)


# Refusals.


@pytest.mark.parametrize(("tensors", "message"), [
    (None, "got None: rule of Broken"), (("weight", "weight"), "names that differ"), ((), "a tuple of the names"),
    ("weight", "a tuple of the names"), ((1,), "a tuple of the names"),
])  # fmt: skip
def test_a_rule_without_proper_names_is_rejected_where_it_is_registered_or_used(tensors, message):
    rule = type("Rule", (type(BayesGain.rule),), {"tensors": tensors})()
    broken = type("Broken", (BayesGain,), {"rule": rule, "forward": lambda self, x: x})
    for use in (lambda: bl.register_rule(Gain, broken), lambda: broken(3)):
        with pytest.raises(TypeError, match=message):
            use()


def test_factors_are_of_weight_and_bias():
    rule = type("Rule", (type(curvature.LINEAR),), {"tensors": ("kernel", "offset")})()
    broken = type("Broken", (bl.BayesLinear,), {"rule": rule})
    with pytest.raises(TypeError, match=r"Rule.tensors must be \('weight', 'bias'\) in a rule with Kronecker factors"):
        broken(3, 3)


def test_a_layer_names_its_rule():
    class Nameless(bl.BayesianLayer, nn.Linear):
        def forward(self, input):
            return input

    with pytest.raises(
        TypeError, match=r"Nameless.rule must be a CurvatureRule, got None. Name that of the layer's op"
    ):
        Nameless(3, 3)
    with pytest.raises(TypeError, match=r"Nameless.rule must be a CurvatureRule, got None"):
        bl.register_rule(nn.Linear, Nameless)


def test_a_parameter_that_the_rule_does_not_cover_is_named():
    class Shifted(BayesGain):
        def __init__(self, features):
            super().__init__(features)
            self.shift = nn.Parameter(torch.zeros(features))
            self.attach_posterior(50.0, 1e3)

    net = nn.Sequential(Shifted(3))
    with pytest.raises(ValueError, match=r"'0.shift' must be covered by its layer's .* got a Shifted, .* covers gain"):
        bl.VOGN(net, 8)
    bl.IVON(net, 8)


def test_a_computed_tensor_and_one_too_many_stay_deterministic(registered):
    weighted = nn.utils.parametrizations.weight_norm(LowRank(3, 2, 2), "up")
    gained = Gain(3)
    gained.other = nn.Parameter(torch.zeros(1))
    _, report = bl.to_bayesian(nn.Sequential(nn.Linear(3, 3), weighted, gained))
    found = {entry.name: entry.reason for entry in report.entries if entry.status == "deterministic"}
    assert found["1.down"] == "the up of this ParametrizedLowRank is computed from other tensors"
    assert found["2.gain"] == "this Gain has a parameter 'other' too, for which there is no curvature rule"


# Kernels.


def test_a_kernel_computes_the_squares_of_its_device(monkeypatch):
    layer, x, calls = bl.BayesLinear(3, 2), torch.randn(5, 3), []

    def kernel(use: Use, g: torch.Tensor):
        calls.append((use.inputs[0].shape, g.shape))
        *grads, squares_weight, squares_bias = curvature.LINEAR.squares(use, g)
        return *grads, 2 * squares_weight, squares_bias

    def squares():
        with bl.tracked(layer) as tracker:
            potential(layer(x)).backward()
        return {name: leaf.grad.clone() for name, leaf in tracker.leaves.items()}

    plain = squares()
    monkeypatch.setattr(curvature.LINEAR, "kernels", {})
    register_kernel(curvature.LINEAR, "cuda", lambda use, g: 1 / 0)
    assert_close(squares(), plain, **SAME)
    register_kernel(curvature.LINEAR, "cpu", kernel)
    assert_close(squares(), {"weight": 2 * plain["weight"], "bias": plain["bias"]}, **SAME)
    assert calls == [((5, 3), (5, 2))]
    monkeypatch.undo()
    assert_close(squares(), plain, **SAME)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ((nn.Linear, "cpu", len), TypeError, "rule must be a CurvatureRule, got"),
    ((curvature.LINEAR, "cpu", None), TypeError, "kernel must be a function of a use and a gradient, got None"),
    ((curvature.LINEAR, "cpv", len), ValueError, "device must be a type of device, as 'cuda', got 'cpv'"),
    ((curvature.LINEAR, "cuda:0", len), ValueError, "device must be a type of device, as 'cuda', got 'cuda:0'"),
])  # fmt: skip
def test_a_kernel_that_cannot_be_is_rejected(arguments, error, message):
    before = dict(curvature.LINEAR.kernels)
    with pytest.raises(error, match=message):
        register_kernel(*arguments)
    assert curvature.LINEAR.kernels == before
