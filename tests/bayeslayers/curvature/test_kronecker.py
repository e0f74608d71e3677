"""Kronecker factors against per-example autograd, matrix-variate draws and their roots on disk."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.curvature_cases import case_id, make_input, make_pair, per_case, potential
from support.factors import tracked_factors
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.curvature import accumulate
from bayeslayers.distributions.matrix_gaussian import (
    as_matrix,
    correlated,
    damp,
    inverse,
    inverse_root,
    marginal_precision,
)
from bayeslayers.layers import ROOTS
from bayeslayers.likelihoods import sampled_loss
from bayeslayers.sampling import Sampler

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]
EXACT = {"rtol": 1e-10, "atol": 1e-12}
SAME = {"rtol": 0, "atol": 0}
F64 = {"dtype": torch.float64}

FACTORED = [
    *[("Linear", (3, 4), {}, shape) for shape in ((5, 3), (5, 1, 3), (5, 4, 3), (4, 2, 3, 3), (3,))],
    ("Linear", (3, 4), {"bias": False}, (5, 2, 3)),
    ("Conv1d", (2, 3, 3), {}, (4, 2, 8)),
    ("Conv1d", (2, 3, 4), {"padding": "same"}, (4, 2, 7)),
    ("Conv2d", (2, 3, 3), {"stride": 2, "padding": 1}, (4, 2, 6, 6)),
    ("Conv2d", (2, 3, (3, 2)), {"stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)}, (4, 2, 7, 6)),
    ("Conv2d", (2, 3, 3), {"padding": (1, 2), "padding_mode": "reflect", "bias": False}, (3, 2, 4, 4)),
    ("Conv2d", (2, 3, 2), {}, (2, 5, 5)),
    ("Conv3d", (2, 3, 2), {"padding": 1, "stride": (1, 2, 2), "dilation": (2, 1, 1)}, (3, 2, 3, 4, 4)),
]
SQUARED = [
    ("Conv2d", (4, 6, 3), {"groups": 2}, (4, 4, 5, 5)),
    ("ConvTranspose2d", (2, 3, 3), {"stride": 2}, (4, 2, 4, 4)),
    ("GroupNorm", (2, 4), {}, (5, 4, 3)),
    ("Embedding", (6, 3), {}, (5, 4)),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def oracle_factors(counterpart: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of A and G, the input of one output read off as its gradient in weight and bias."""
    y = counterpart(x)
    (g,) = torch.autograd.grad(potential(y), y, retain_graph=True)
    channel = y.dim() - 1 if isinstance(counterpart, nn.Linear) else 1
    y, g = (t.movedim(channel, -1).flatten(1, -2) if t.dim() > 2 else t[:, None] for t in (y, g))  # (n, p, o)
    parameters = list(counterpart.parameters())
    inputs = torch.stack([
        torch.cat([d[0].flatten() for d in torch.autograd.grad(value, parameters, retain_graph=True)])
        for value in y[..., 0].flatten()
    ])  # fmt: skip
    rows = g.flatten(0, 1)
    return sum(torch.outer(a, a) for a in inputs), sum(torch.outer(r, r) for r in rows) / y.shape[1]


@per_case(FACTORED)
def test_factors_are_those_of_each_example_and_position(kind, args, kwargs, shape):
    layer, counterpart = make_pair(kind, args, kwargs)
    x = make_input(kind, shape)
    x_counterpart = x.detach().clone().requires_grad_()
    found = tracked_factors(layer, lambda: potential(layer(x)).backward())
    potential(counterpart(x_counterpart)).backward()
    batch = x.detach() if x.dim() >= max(2, counterpart.weight.dim()) else x.detach()[None]
    assert_close(
        [x.grad, *[p.grad for p in layer.parameters()]],
        [x_counterpart.grad, *[p.grad for p in counterpart.parameters()]],
    )
    expected = dict(
        zip(("weight_input_factor", "weight_output_factor"), oracle_factors(counterpart, batch), strict=True)
    )
    assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("budget", [1, 700])
def test_chunks_and_parts_of_a_batch_add_up(budget, monkeypatch):
    layer, counterpart = make_pair("Conv2d", (2, 3, 3), {"padding": 1})
    x = make_input("Conv2d", (5, 2, 4, 4))
    monkeypatch.setitem(accumulate.CHUNK_BYTES, "cpu", budget)
    found = tracked_factors(layer, lambda: [potential(layer(part)).backward() for part in x.chunk(2)])
    assert_close(tuple(found.values()), oracle_factors(counterpart, x.detach()), **EXACT)


@per_case(SQUARED)
def test_layers_without_factors_keep_their_squares(kind, args, kwargs, shape):
    layer, _ = make_pair(kind, args, kwargs)
    x = make_input(kind, shape)
    with bl.tracked(layer) as tracker:
        potential(layer(x)).backward()
    assert_close(tracked_factors(layer, lambda: potential(layer(x)).backward()), {
        name: leaf.grad for name, leaf in tracker.leaves.items()
    })  # fmt: skip
    assert layer.structure_shapes() == []


def test_frozen_parameters_change_the_factors():
    layer, counterpart = make_pair("Linear", (3, 4), {})
    x = make_input("Linear", (5, 3))
    whole, _ = oracle_factors(counterpart, x.detach())
    layer.bias.requires_grad_(False)
    found = tracked_factors(layer, lambda: potential(layer(x)).backward())
    assert_close(found["weight_input_factor"], whole[:3, :3], **EXACT)
    layer.weight.requires_grad_(False), layer.bias.requires_grad_(True)
    assert list(tracked_factors(layer, lambda: potential(layer(x)).backward())) == ["bias"]


def test_factors_of_half_precision_are_summed_in_float32():
    layer, counterpart = make_pair("Conv2d", (2, 3, 3), {})
    x = make_input("Conv2d", (4, 2, 6, 6)).detach()

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            y = low(x.float())
        potential(y.float()).backward()

    low = copy.deepcopy(layer).float()
    for found, exact in zip(tracked_factors(low, forward).values(), oracle_factors(counterpart, x), strict=True):
        assert found.dtype == torch.float32
        assert_close(found.double(), exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))


def test_reused_layer_and_folded_examples_are_refused():
    net = nn.ModuleDict({"one": bl.BayesLinear(3, 3), "two": bl.BayesLinear(3, 3)})
    x = torch.randn(4, 2, 3)
    with pytest.raises(RuntimeError, match="layer 'one' must run in one call"):
        tracked_factors(net, lambda: potential(net["one"](net["one"](x))).backward())
    with pytest.raises(RuntimeError, match="got 4 there and 8 in layer 'two'"):
        tracked_factors(net, lambda: potential(net["two"](net["one"](x).flatten(0, 1))).backward())


def test_factors_of_a_subclass_with_its_own_forward():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * F.linear(x, self.weight, self.bias)

    for bias in (True, False):
        torch.manual_seed(0)
        counterpart = Doubled(3, 2, bias=bias).double()
        net, _ = bl.to_bayesian(counterpart)
        x = make_input("Linear", (5, 3))
        found = tracked_factors(net, lambda net=net, x=x: potential(net(x)).backward())
        y = counterpart(x.detach())
        (g,) = torch.autograd.grad(potential(y), y)
        assert_close(found["weight_output_factor"], 4 * g.T @ g, **EXACT)
        assert len(found["weight_input_factor"]) == 3 + bias


def test_compiled_net_gives_the_same_factors():
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(bl.BayesConv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), bl.BayesLinear(12, 2)).double()
    compiled, x = torch.compile(net, backend="aot_eager", fullgraph=True), torch.randn(5, 2, 4, 4, **F64)
    found = tracked_factors(net, lambda: potential(compiled(x)).backward())
    assert_close(found, tracked_factors(net, lambda: potential(net(x)).backward()), rtol=1e-9, atol=1e-10)


# Labels of the model's own likelihood.


@pytest.mark.parametrize(("likelihood", "shape"), [
    (bl.Categorical(), (3,)), (bl.Categorical(), (3, 2)), (bl.Bernoulli(), ()), (bl.Bernoulli(), (2, 2)),
    (bl.Gaussian(0.3), (2,)), (bl.Gaussian(0.3), (2, 2)), (bl.Gaussian(), (4,)),
], ids=case_id)  # fmt: skip
def test_sampled_gradients_have_the_curvature_of_the_loss_as_second_moment(likelihood, shape):
    """The Hessian of these losses in the output does not depend on the label, but for a Gaussian's variance."""
    n, generator = 20_000, seeded()
    output = torch.randn(1, *shape, generator=generator, **F64)
    batch = output.expand(n, *shape).clone().requires_grad_()
    sampled_loss(likelihood, batch, generator).backward()
    g = batch.grad.reshape(n, -1)
    products = g[:, :, None] * g[:, None]

    def loss(flat):
        value = flat.reshape(output.shape)
        if isinstance(likelihood, bl.Categorical):
            return likelihood.loss(value, torch.zeros(1, *shape[1:], dtype=torch.long))
        return likelihood.loss(value, torch.zeros_like(value))

    if likelihood == bl.Gaussian():  # 1 / variance for the mean, 1/2 for the log variance
        exact = torch.cat([(-output[0, 2:]).exp(), torch.full((2,), 0.5, **F64)]).diag()
    else:
        exact = torch.autograd.functional.hessian(loss, output.flatten())
    error = products.std(0) / math.sqrt(n)
    assert ((products.mean(0) - exact).abs() / (error + 1e-12)).max() < 5
    assert (products.std(0) > 0).all()


# The maths of the damped factors.


def random_factors(i: int = 4, o: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded()
    roots = [torch.randn(n, 2 * n, generator=generator, **F64) * scale for n, scale in ((i, 3.0), (o, 0.2))]
    return roots[0] @ roots[0].T, roots[1] @ roots[1].T


def test_damping_splits_by_the_trace_norm():
    a, g = random_factors()
    pi, root = math.sqrt((a.trace() / 4) / (g.trace() / 3)), math.sqrt(0.7)
    damped = damp(a, g, 0.7)
    assert_close(damped, (a + pi * root * torch.eye(4, **F64), g + root / pi * torch.eye(3, **F64)), **EXACT)
    extra = torch.kron(*damped) - torch.kron(a, g) - 0.7 * torch.eye(12, **F64)
    assert_close(extra.trace(), 2 * root * torch.sqrt(a.trace() * g.trace() * 12), **EXACT)


@pytest.mark.parametrize("zero", [0, 1])
def test_damping_of_no_curvature_is_exact(zero):
    factors = list(random_factors())
    factors[zero] = torch.zeros_like(factors[zero])
    assert_close(torch.kron(*damp(*factors, 0.7)), 0.7 * torch.eye(12, **F64), **EXACT)


def test_inverse_and_roots_are_those_of_the_dense_kronecker_product():
    factors = damp(*random_factors(), 0.1)
    dense = torch.linalg.inv(torch.kron(*factors))  # over columns of W, one after the other
    assert_close(torch.kron(*map(inverse, factors)), dense, **EXACT)
    input_root, output_root = map(inverse_root, factors)
    assert_close(torch.kron(input_root @ input_root.T, output_root @ output_root.T), dense, **EXACT)
    assert_close(marginal_precision(input_root, output_root).T.flatten(), 1 / dense.diagonal(), **EXACT)
    noise = torch.randn(3, 4, generator=seeded(), **F64)
    expected = torch.kron(input_root, output_root) @ noise.T.flatten()
    assert_close(correlated(noise, input_root, output_root).T.flatten(), expected, **EXACT)


@pytest.mark.parametrize("matrix", [torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.full((2, 2), math.nan)])
def test_a_matrix_that_is_not_positive_definite_is_refused(matrix):
    for function in (inverse, inverse_root):
        with pytest.raises(FloatingPointError, match=r"must be positive definite, got one of shape \(2, 2\)"):
            function(matrix)


# Draws.


def with_roots(layer: bl.BayesianLayer, joint: bool = True, seed: int = 0) -> bl.BayesianLayer:
    """Give a layer random roots, and the precisions that belong to them."""
    sizes = [list(found.values()) for found in layer.structure_shapes() if found.keys() == set(ROOTS)]
    (i, _), (o, _) = sizes[0 if joint else -1]
    dtype = layer.weight.dtype
    roots = [torch.randn(n, n, generator=seeded(seed + n), **F64).to(dtype) / n for n in (i, o)]
    layer.set_roots(*roots)
    precision, columns = marginal_precision(*roots), layer.weight[0].numel()
    layer.weight_precision.copy_(precision[:, :columns].reshape(layer.weight.shape))
    if layer.bias is not None and joint:
        layer.bias_precision.copy_(precision[:, columns])
    return layer


@pytest.mark.parametrize(
    ("make", "frozen"), [(lambda: bl.BayesLinear(3, 2), False), (lambda: bl.BayesConv1d(1, 2, 2, bias=False), True)]
)
def test_draws_have_the_kronecker_product_as_covariance(make, frozen):
    torch.manual_seed(0)
    layer = with_roots(make().double())
    mean = as_matrix(layer.weight, layer.bias).detach()
    sampler, n, draws = Sampler(list(bl.posterior(layer)), seeded(), frozen), 2000, []
    for _ in range(n):
        with sampler.draw(), torch.no_grad():
            draws.append(as_matrix(layer.drawn["weight"], layer.drawn.get("bias")) - mean)
    rows = torch.stack(draws).mT.flatten(1)  # columns of W, one after the other
    a, g = (root @ root.T for root in layer.roots)
    exact = torch.kron(a, g)
    assert (rows.mean(0) / (exact.diagonal() / n).sqrt()).abs().max() < 5
    # Var(x y) = C_xx C_yy + C_xy^2 for a Gaussian.
    error = ((torch.outer(exact.diagonal(), exact.diagonal()) + exact.square()) / n).sqrt()
    assert ((rows.T @ rows / n - exact) / error).abs().max() < 5


@pytest.mark.parametrize("joint", [True, False])
def test_given_noise_and_gradients_of_a_draw(joint):
    layer = with_roots(bl.BayesConv2d(2, 3, 2).double(), joint)
    noise = {name: torch.randn(p.shape, generator=seeded(), **F64) for name, p in layer.named_parameters()}
    x = torch.randn(4, 2, 3, 3, generator=seeded(), **F64)
    i, o = layer.roots
    matrix = as_matrix(noise["weight"], noise["bias"]) if joint else as_matrix(noise["weight"])
    change = o @ matrix @ i.T
    bias = change[:, -1] if joint else noise["bias"] / layer.bias_precision.sqrt()
    weight = (layer.weight + change[:, :8].reshape(3, 2, 2, 2)).detach().requires_grad_()
    bias = (layer.bias + bias).detach().requires_grad_()
    with bl.sampled(layer, noise=noise):
        y = layer(x)
        potential(y).backward()
    assert_close(y, F.conv2d(x, weight, bias), **EXACT)
    potential(F.conv2d(x, weight, bias)).backward()
    assert_close([layer.weight.grad, layer.bias.grad], [weight.grad, bias.grad], **EXACT)


# The posterior elsewhere.


def make_net(seed: int = 0, roots: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        bl.BayesConv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), bl.BayesLayerNorm(12), bl.BayesLinear(12, 3, bias=False)
    )
    for layer in (net[0], net[4]) if roots else ():
        with_roots(layer, seed=seed)
    return net


def predicted(net: nn.Module) -> torch.Tensor:
    return bl.predict(net, torch.randn(4, 1, 3, 3, generator=seeded()), 8, generator=seeded()).mean


def test_saved_posterior_predicts_the_same_in_a_fresh_network(tmp_path):
    net = make_net()
    bl.save_posterior(net, tmp_path / "net")
    for fresh in (make_net(1, roots=False), make_net(1)):
        bl.load_posterior(tmp_path / "net", fresh)
        assert_close(fresh.state_dict(), net.state_dict(), **SAME)
        assert_close(predicted(fresh), predicted(net), **SAME)
    assert not torch.equal(predicted(make_net(roots=False)), predicted(net))
    counterpart = make_net(1, roots=False)
    counterpart.load_state_dict(net.state_dict())
    assert_close(predicted(counterpart), predicted(net), **SAME)


def test_diagonal_posterior_takes_the_place_of_a_matrix_variate_one(tmp_path):
    diagonal, net = make_net(roots=False), make_net(1)
    bl.save_posterior(diagonal, tmp_path / "net")
    bl.load_posterior(tmp_path / "net", net)
    assert net[0].roots is None
    assert_close(predicted(net), predicted(diagonal), **SAME)


def test_ordinary_checkpoint_leaves_the_roots():
    net, other = make_net(), nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(12),
                                           nn.Linear(12, 3, bias=False))  # fmt: skip
    before = [root.clone() for root in net[0].roots]
    net.load_state_dict(other.state_dict())
    assert_close(list(net[0].roots), before, **SAME)
    assert_close(net[0].weight, other[0].weight, **SAME)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("0.weight_input_root"), "must hold tensor '0.weight_input_root', got none"),
        (lambda t: t.update({"0.weight_output_root": torch.ones(4, 4)}), r"must be .* of shape \(3, 3\), got F32 of"),
        (lambda t: t.update({"0.weight_input_root": torch.ones(5, 5).long()}), "must be torch.float32 of shape"),
        (lambda t: t["4.weight_input_root"].fill_(math.nan), "'4.weight_input_root' must be finite"),
        (lambda t: t.update({"3.weight_input_root": torch.ones(2, 2)}), "got '3.weight_input_root'"),
    ],
    ids=["one", "shape", "kind", "nan", "norm"],
)
def test_damaged_roots_are_refused_and_the_model_is_as_it_was(spoil, message, tmp_path, monkeypatch):
    net = make_net()
    tensors = {key: value.clone() for key, value in net.state_dict().items()}
    spoil(tensors)
    monkeypatch.setattr(net, "state_dict", lambda: tensors)
    monkeypatch.setattr("bayeslayers.storage.posterior.check_values", lambda *args: None)
    bl.save_posterior(net, tmp_path / "net")
    fresh = make_net(1, roots=False)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    with pytest.raises(bl.PosteriorError, match=message):
        bl.load_posterior(tmp_path / "net", fresh)
    assert_close(fresh.state_dict(), before, **SAME)


def test_methods_of_prediction_draw_the_weights_of_a_matrix_variate_posterior():
    net, x = make_net(), torch.randn(3, 1, 3, 3, generator=seeded())
    one, other = (bl.predict(net, x, 8, method=method, generator=seeded()).mean for method in ("sample", "local"))
    assert_close(one, other)
    with pytest.raises(ValueError, match="no moment rule for a posterior of a layer with correlations"):
        bl.predict(net, x, method="moments", likelihood=bl.Gaussian(1.0))
    head = with_roots(bl.BayesLinear(3, 2).double())
    a, g = (root @ root.T for root in head.roots)
    x = torch.randn(4, 3, generator=seeded(), **F64)
    rows = torch.cat([x, torch.ones(4, 1, **F64)], 1)
    exact = (rows @ a * rows).sum(1)[:, None] * g.diagonal()
    prediction = bl.predict(head, x, 4000, method="linearised", generator=seeded(), likelihood=bl.Gaussian(1.0))
    assert (((prediction.epistemic / exact) - 1) * math.sqrt(4000 / 2)).abs().max() < 5


def test_roots_follow_copies_casts_conversion_and_merging():
    net = make_net()
    assert_close(predicted(copy.deepcopy(net)), predicted(net), **SAME)
    assert [root.dtype for root in copy.deepcopy(net).double()[0].roots] == [torch.float64] * 2
    plain = bl.to_deterministic(net)
    assert set(plain.state_dict()) == {name for name, _ in net.named_parameters()}
    merged = bl.merge([net, make_net(roots=False)], method="average")
    assert merged[0].roots is None
    assert net[0].roots is not None


@pytest.mark.parametrize("make", [bl.VOGN, bl.BBB])
def test_diagonal_optimisers_go_on_from_the_precisions_alone(make):
    net = make_net()
    optimizer, precision = make(net, 10), net[0].weight_precision.clone()
    with optimizer.sampled(noise={s.name: torch.ones_like(s.mean) for s in bl.posterior(net)}):
        drawn = net[0].drawn["weight"].detach()
        potential(net(torch.randn(4, 1, 3, 3))).backward()
    assert_close(drawn, (net[0].weight + precision.rsqrt()).detach(), **SAME)
    optimizer.step()
    assert net[0].roots is None
