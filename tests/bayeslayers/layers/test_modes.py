"""Draws of outputs: their distribution against closed forms, their gradient, their scope, and what is refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support.subclasses import GatedLinear, Plain
from torch import nn
from torch.func import functional_call, jacrev
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bayeslayers as bl
from bayeslayers.sampling import Sampler

SAME = {"rtol": 0, "atol": 0}
F64 = {"dtype": torch.float64}

pytestmark = pytest.mark.usefixtures("one_thread")

# A layer and the shape of two examples.
LAYERS = [
    (bl.BayesLinear(3, 2), (2, 3)),
    (bl.BayesLinear(3, 2, bias=False), (2, 3)),
    (bl.BayesLinear(3, 2), (2, 4, 3)),
    (bl.BayesConv1d(4, 2, 3, stride=2, dilation=2, groups=2, padding=1), (2, 4, 7)),
    (bl.BayesConv1d(1, 2, 3, padding="same", bias=False), (2, 1, 4)),
    (bl.BayesConv2d(2, 2, 2, padding=1, padding_mode="circular"), (2, 2, 2, 2)),
    (bl.BayesConv3d(1, 2, 2), (2, 1, 2, 3, 2)),
    (bl.BayesConvTranspose1d(2, 2, 3, stride=2, output_padding=1), (2, 2, 3)),
    (bl.BayesConvTranspose2d(2, 4, 2, groups=2, padding=1), (2, 2, 3, 2)),
    (bl.BayesConvTranspose3d(1, 1, 2, bias=False), (2, 1, 1, 2, 1)),
]
EVERY_LAYER = pytest.mark.parametrize(
    ("layer", "shape"), LAYERS, ids=[f"{type(layer).__name__}-{len(shape)}" for layer, shape in LAYERS]
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prepared(layer: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, torch.Tensor]:
    """Return the layer in float64 with precisions of its own for each entry, and inputs."""
    torch.manual_seed(0)
    layer = layer.double()
    for site in bl.posterior(layer):
        site.precision.uniform_(0.5, 20)
    return layer, torch.randn(shape, **F64)


def moments(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, of each example's output under weight draws, the mean `(n, k)` and the covariance `(n, k, k)`."""
    plain = bl.to_deterministic(layer)
    parameters = {name: p.detach() for name, p in plain.named_parameters()}
    jacobian = jacrev(lambda w: functional_call(plain, w, (x,)).flatten(1))(parameters)
    covariance = torch.zeros((), **F64)
    for site in bl.posterior(layer):
        scaled = (jacobian[site.name] * site.precision.rsqrt()).flatten(2)
        covariance = covariance + scaled @ scaled.mT
    return layer(x).detach().flatten(1), covariance


def assert_z(estimate: torch.Tensor, expected: torch.Tensor | float, deviation: torch.Tensor | float) -> None:
    """Assert that each estimate lies within 5 of its standard deviations of what is expected."""
    z = (estimate - expected) / deviation
    assert_close(z.abs().clamp(max=5), z.abs())


def draws(layer: nn.Module, x: torch.Tensor, estimator: str, count: int) -> torch.Tensor:
    """Return outputs `(count, n, k)`, each under a scope of its own."""
    sampler = Sampler(list(bl.posterior(layer)), seeded(), estimator=estimator)
    outputs = []
    for _ in range(count):
        with sampler.draw(), torch.no_grad():
            outputs.append(layer(x).flatten(1))
    return torch.stack(outputs)


@EVERY_LAYER
def test_local_entries_have_the_moments_of_weight_draws_and_are_independent(layer, shape):
    layer, x = prepared(layer, shape)
    mean, covariance = moments(layer, x)
    count = 5000
    with bl.sampled(layer, seeded(), estimator="local"), torch.no_grad():
        outputs = layer(x.repeat(count, *[1] * (x.dim() - 1))).reshape(count, *mean.shape)
    z = ((outputs - mean) / covariance.diagonal(dim1=1, dim2=2).sqrt()).flatten(1)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert_z(z.pow(power).mean(0), expected, (variance / count) ** 0.5)
    products = z.T @ z / count
    assert_z(products - products.diag().diag(), 0, count**-0.5)  # within an example and between the two


@EVERY_LAYER
def test_flipout_is_a_weight_draw_to_each_example_and_uncorrelated_between_examples(layer, shape):
    layer, x = prepared(layer, shape)
    mean, covariance = moments(layer, x)
    count = 1000
    deviations = draws(layer, x, "flipout", count) - mean
    variance = covariance.diagonal(dim1=1, dim2=2)
    assert_z(deviations.mean(0), 0, (variance / count).sqrt())
    estimate = torch.einsum("sni,snj->nij", deviations, deviations) / count
    assert_z(estimate, covariance, ((variance[:, :, None] * variance[:, None] + covariance.square()) / count).sqrt())
    between = deviations[:, 0, :, None] * deviations[:, 1, None, :]
    assert_z(between.mean(0), 0, between.std(0) / count**0.5)


def test_weight_draws_are_correlated_between_examples():
    layer, x = prepared(bl.BayesLinear(3, 2), (2, 3))
    deviations = draws(layer, x, "weights", 500) - moments(layer, x)[0]
    expected = x[0] @ (x[1] / layer.weight_precision[0]) + 1 / layer.bias_precision[0]
    between = deviations[:, 0, 0] * deviations[:, 1, 0]
    assert_z(between.mean(), expected, between.std() / 500**0.5)
    assert abs(float(expected)) > 5 * float(between.std()) / 500**0.5


def test_given_noise_is_flipouts_perturbation():
    layer, x = prepared(bl.BayesLinear(1, 1, bias=False), (50, 1))
    with bl.sampled(layer, seeded(), noise={"weight": torch.full((1, 1), 1.7, **F64)}, estimator="flipout"):
        deviations = layer(x) - x * layer.weight
    expected = 1.7 * x / layer.weight_precision.sqrt()
    assert_close(deviations.detach().abs(), expected.abs())
    assert 10 < int((deviations * expected > 0).sum()) < 40


@pytest.mark.parametrize("estimator", ["local", "flipout"])
@pytest.mark.parametrize(("layer", "shape"), [(bl.BayesLinear(3, 2), (3,)), (bl.BayesConv1d(3, 2, 2), (3, 5))])
def test_a_single_example_needs_no_dimension_for_examples(layer, shape, estimator):
    layer, x = prepared(layer, shape)
    outputs = []
    for input in (x, x[None]):
        with bl.sampled(layer, seeded(), estimator=estimator):
            outputs.append(layer(input))
    assert_close(outputs[0], outputs[1][0])
    assert not torch.equal(outputs[0], layer(x))


class Doubled(bl.BayesLinear):
    """A subclass with a forward of its own, which computes by the drawn weight."""

    def forward(self, input):
        return nn.functional.linear(input, 2 * self.value("weight"))


def make_mixed_net() -> nn.Sequential:
    """Return a net of linear layers and others, converted subclasses among them."""
    torch.manual_seed(0)
    parts = [nn.Embedding(5, 2), Plain(), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), GatedLinear(28, 4)]
    return nn.Sequential(*bl.to_bayesian(nn.Sequential(*parts))[0], Doubled(2, 3), bl.BayesLinear(3, 1))


@pytest.mark.parametrize("estimator", ["local", "flipout"])
def test_other_layers_draw_weights(estimator):
    net, ids = make_mixed_net(), torch.randint(5, (6, 7), generator=seeded())
    net[0].register_forward_hook(lambda layer, inputs, output: output.mT)
    drawn = {"0.weight", "2.weight", "2.bias", "5.weight", "5.bias", "6.weight", "6.bias"}
    with bl.sampled(net, seeded(), estimator=estimator):
        for site in bl.posterior(net):
            changed = not torch.equal(site.module.value(site.key), site.mean)
            assert changed == (site.name in drawn), site.name
        net(ids).square().mean().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None and name != "6.bias"]


@pytest.mark.parametrize("estimator", ["local", "flipout"])
def test_tied_weight_is_drawn_once_for_all_its_places(estimator):
    layer, x = prepared(bl.BayesLinear(3, 3, bias=False), (4, 3))
    counterpart = nn.Linear(3, 3, bias=False)
    counterpart.weight = layer.weight
    with bl.sampled(nn.Sequential(layer, counterpart), seeded(), estimator=estimator):
        assert_close(layer(x), counterpart(x), **SAME)
        assert not torch.equal(layer.value("weight"), layer.weight)


@pytest.mark.parametrize("estimator", ["local", "flipout"])
def test_generator_fixes_the_draw_and_each_call_draws_anew(estimator):
    layer, x = prepared(bl.BayesLinear(3, 300), (500, 3))
    state = torch.get_rng_state()
    results = []
    for seed in (1, 1, 2):
        with bl.sampled(layer.float(), seeded(seed), estimator=estimator):
            results += [layer(x.float()), layer(x.float())]
    assert_close(torch.get_rng_state(), state, **SAME)
    assert_close(results[:2], results[2:4], **SAME)
    for other in results[1], results[4]:
        assert not torch.equal(other, results[0])
    torch.manual_seed(3)
    with bl.sampled(layer, estimator=estimator):
        first = layer(x.float())
    torch.manual_seed(3)
    with bl.sampled(layer, estimator=estimator):
        assert_close(layer(x.float()), first, **SAME)


def test_scopes_of_different_kinds_nest_and_the_inner_one_holds():
    layer, x = prepared(bl.BayesLinear(3, 2), (4, 3))
    plain = layer(x)
    with bl.sampled(layer, seeded(1)):
        weights = layer(x)
        with bl.sampled(layer, seeded(2), estimator="local"):
            inner = layer(x)
            with bl.sampled(layer, seeded(1)):
                assert_close(layer(x), weights, **SAME)
            assert not torch.equal(layer(x), weights)
        assert_close(layer(x), weights, **SAME)
    with bl.sampled(layer, seeded(2), estimator="local"):
        assert_close(layer(x), inner, **SAME)
        with pytest.raises(KeyError, match="boom"), bl.sampled(layer, estimator="flipout"):
            raise KeyError("boom")
        assert layer.perturbation.estimator == "local"
    assert_close(layer(x), plain, **SAME)


@pytest.mark.parametrize("estimator", ["local", "flipout"])
def test_deterministic_counterpart_made_inside_a_scope_is_free_of_it(estimator):
    layer, x = prepared(bl.BayesLinear(3, 2), (4, 3))
    with bl.sampled(layer, seeded(), estimator=estimator):
        counterpart = bl.to_deterministic(layer)
    assert_close(counterpart(x), layer(x), **SAME)
    assert not hasattr(counterpart, "perturbation")


@pytest.mark.parametrize("bias", [False, True])
def test_gradient_where_nothing_is_uncertain_is_zero(bias):
    """An example of zeros, and a convolution's window of zeros, have a variance of 0, at which the root is steep."""
    torch.manual_seed(0)
    net = nn.Sequential(bl.BayesConv2d(1, 2, 3, bias=bias), nn.Flatten(), nn.ReLU(), bl.BayesLinear(8, 2, bias=bias))
    x = torch.randn(3, 1, 4, 4).requires_grad_()
    with torch.no_grad():
        x[0] = 0
        x[1, :, :3, :3] = 0
    sampler = Sampler(list(bl.posterior(net)), seeded(), estimator="local", differentiable=True)
    with sampler.draw():
        net(x).square().sum().backward()
    tensors = [x, *net.parameters(), *sampler.leaves.values()]
    assert all(bool(t.grad.isfinite().all()) for t in tensors)
    if not bias:
        layer = net[3]
        sampler = Sampler(list(bl.posterior(layer)), seeded(), estimator="local", differentiable=True)
        with sampler.draw():
            layer(torch.zeros(2, 8)).sum().backward()
        assert_close(sampler.leaves["weight"].grad, torch.zeros(2, 8), **SAME)


@pytest.mark.parametrize("estimator", ["local", "flipout"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "half"])
def test_half_precision_is_close_to_full(estimator, dtype, autocast):
    torch.manual_seed(0)
    layer = bl.BayesLinear(4, 3, init_precision=1e4)
    x = torch.tensor([[300.0, -600.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])  # whose squares overflow in float16
    with bl.sampled(layer, seeded(), noise_for(layer, estimator), estimator):
        expected = layer(x)
    expected.sum().backward()
    half = bl.BayesLinear(4, 3, init_precision=1e4)
    half.load_state_dict(layer.state_dict())
    if not autocast:
        half, x = half.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype) if autocast else contextlib.nullcontext():
        with bl.sampled(half, seeded(), noise_for(half, estimator), estimator):
            output = half(x)
    assert output.dtype == dtype
    output.float().sum().backward()
    if estimator == "flipout":  # the signs of half-precision operands are other draws
        assert bool(output.isfinite().all()) and bool(half.weight.grad.isfinite().all())
        return
    assert_close(output.float(), expected, rtol=0, atol=700 * torch.finfo(dtype).eps)
    assert_close(half.weight.grad.float(), layer.weight.grad, rtol=4 * torch.finfo(dtype).eps, atol=0)


def noise_for(layer: nn.Module, estimator: str) -> dict[str, torch.Tensor] | None:
    return None if estimator == "local" else {s.name: torch.ones_like(s.mean) for s in bl.posterior(layer)}


@pytest.mark.parametrize("estimator", ["local", "flipout"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_draw_of_the_default_generator(estimator, reentrant):
    torch.manual_seed(0)
    net = nn.Sequential(bl.BayesLinear(3, 300), nn.Tanh(), bl.BayesLinear(300, 2))
    x = torch.randn(400, 3, requires_grad=True)
    grads = []
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=reentrant)):
        net.zero_grad()
        torch.manual_seed(1)
        noise = {s.name: torch.ones_like(s.mean) for s in bl.posterior(net)} if estimator == "flipout" else None
        with bl.sampled(net, noise=noise, estimator=estimator):
            run(x).square().mean().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert_close(grads[1], grads[0], **SAME)
    with pytest.raises(RuntimeError, match=f"default generator under estimator='{estimator}', got another"):
        with bl.sampled(net, seeded(), estimator=estimator):
            checkpoint(net, x, use_reentrant=reentrant).sum().backward()


@pytest.mark.parametrize("estimator", ["local", "flipout"])
@pytest.mark.parametrize(
    ("layer", "shape"), [LAYERS[0], LAYERS[3], LAYERS[7]], ids=["linear", "convolution", "transposed"]
)
def test_a_curvature_is_refused(estimator, layer, shape):
    layer, x = prepared(layer, shape)
    with bl.sampled(layer, estimator=estimator), bl.tracked(layer):
        with pytest.raises(RuntimeError, match=f"must be tracked under estimator='weights', got '{estimator}'"):
            layer(x)
        with torch.no_grad():
            layer(x)  # from which nothing goes backward
    optimizer = bl.VOGN(layer, dataset_size=5)
    with bl.sampled(layer, estimator=estimator), optimizer.sampled():  # a scope with weight draws of its own
        layer(x).sum().backward()
    optimizer.step()


def test_bad_arguments_are_refused():
    layer, _ = prepared(bl.BayesLinear(3, 2), (2, 3))
    with pytest.raises(ValueError, match="estimator must be 'weights', 'local' or 'flipout', got 'weight'"):
        bl.sampled(layer, estimator="weight")
    noise = {site.name: site.mean for site in bl.posterior(layer)}
    with (
        pytest.raises(ValueError, match="noise must be None under estimator='local'"),
        bl.sampled(layer, None, noise, "local"),
    ):
        pass
    with pytest.raises(ValueError, match=r"noise must hold 'bias' of shape \(2,\), got none"):
        with bl.sampled(layer, noise={"weight": layer.weight}, estimator="flipout"):
            pass
    assert layer.perturbation is None
