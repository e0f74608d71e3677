from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.prediction.moment_rules import RULES, Moments, maximum
from bayeslayers.prediction.moments import propagate, standard_points

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def gaussian_inputs(*shape):
    return Moments(inputs(*shape), inputs(*shape, seed=2).square() + 0.1)


def with_posterior(layer, seed=3):
    """The layer in float64 and eval mode, with weights, precisions and statistics of all sizes."""
    layer = layer.double().eval()
    source = generator(seed)
    with torch.no_grad():
        for site in bl.posterior(layer):
            site.mean.normal_(generator=source)
            site.precision.uniform_(0.5, 20, generator=source)
        for name, buffer in layer.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=source)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=source)
    return layer


def rule_of(module):
    return next(RULES[kind] for kind in type(module).__mro__ if kind in RULES)


def moments_by_draws(module, x, num_samples=5_000):
    """Mean and variance of a module's outputs over draws of its weights and inputs, with their standard errors."""
    source, outputs = generator(4), []
    sites = list(bl.posterior(module))
    for _ in range(num_samples):
        noise = torch.randn(x.mean.shape, generator=source, dtype=x.mean.dtype)
        with torch.no_grad(), bl.sampled(module, source) if sites else torch.no_grad():
            outputs.append(module(x.mean + noise * x.variance.sqrt()))
    outputs = torch.stack(outputs)
    mean, variance = outputs.mean(0), outputs.var(0)
    fourth = (outputs - mean).pow(4).mean(0)
    return mean, variance, (variance / num_samples).sqrt(), ((fourth - variance.square()) / num_samples).sqrt()


LINEAR = {
    "linear": (lambda: bl.BayesLinear(4, 3), (2, 4)),
    "without a bias": (lambda: bl.BayesLinear(4, 3, bias=False), (2, 4)),
    "conv": (lambda: bl.BayesConv2d(2, 4, 3, stride=2, padding=1, groups=2), (1, 2, 5, 4)),
    "conv1d, reflected": (lambda: bl.BayesConv1d(2, 3, 3, padding=1, padding_mode="circular"), (1, 2, 5)),
    "transposed": (lambda: bl.BayesConvTranspose1d(2, 3, 3, stride=2), (1, 2, 4)),
    "batch norm": (lambda: bl.BayesBatchNorm2d(3), (2, 3, 2, 2)),
    "average": (lambda: nn.AvgPool2d((2, 3), padding=1), (1, 2, 4, 6)),
    "adaptive average": (lambda: nn.AdaptiveAvgPool2d((2, 1)), (1, 2, 4, 3)),
}


@pytest.mark.parametrize("case", LINEAR)
def test_linear_layers_have_the_moments_of_their_draws(case):
    build, shape = LINEAR[case]
    module, x = with_posterior(build()), gaussian_inputs(*shape)
    with torch.no_grad():
        found = rule_of(module)(module, x)
    mean, variance, mean_error, variance_error = moments_by_draws(module, x, 2000)
    assert ((found.mean - mean) / mean_error).abs().max() < 5
    assert ((found.variance - variance) / variance_error).abs().max() < 5


@pytest.mark.parametrize("case", ["linear", "conv", "transposed"])
def test_a_linear_layer_of_known_inputs_is_exact(case):
    build, shape = LINEAR[case]
    module, x = with_posterior(build()), inputs(*shape)
    found = propagate(module, x)
    variance = copy_with(module, 1 / module.weight_precision, 1 / module.bias_precision)(x.square())
    assert_close(found.mean, module(x))
    assert_close(found.variance, variance)


def copy_with(module, weight, bias):
    import copy

    counterpart = copy.deepcopy(module).requires_grad_(False)
    counterpart.weight.copy_(weight)
    counterpart.bias.copy_(bias)
    return counterpart


def by_integration(function, mean, variance):
    """Mean and variance of a function of a Gaussian, by adaptive quadrature on each side of 0."""
    density = stats.norm(mean, math.sqrt(variance)).pdf
    low, high = mean - 12 * math.sqrt(variance), mean + 12 * math.sqrt(variance)
    breaks = [0.0] if low < 0 < high else None

    def expected(g):
        return integrate.quad(lambda z: g(z) * density(z), low, high, points=breaks, limit=200, epsabs=1e-13)[0]

    first = expected(function)
    return first, expected(lambda z: (function(z) - first) ** 2)


@pytest.mark.parametrize(
    ("module", "tolerance"),
    [(nn.ReLU(), 1e-9), (nn.LeakyReLU(0.2), 1e-9)]
    + [(module, 1e-4) for module in (nn.SiLU(), nn.GELU(), nn.Softplus(), nn.Tanh(), nn.Sigmoid())]
    + [(nn.ELU(), 1e-3)],
)
def test_activations_have_the_integrals_over_a_gaussian(module, tolerance):
    mean, variance = (torch.tensor(v, dtype=torch.float64) for v in ([-3, -0.5, 0, 1.2, 4], [1, 0.3, 2, 0.01, 1.5]))
    with torch.no_grad():
        found = rule_of(module)(module, Moments(mean, variance))

    def function(z):
        return float(module(torch.tensor(z, dtype=torch.float64)))

    expected = np.array(
        [by_integration(function, *pair) for pair in zip(mean.tolist(), variance.tolist(), strict=True)]
    )
    assert_close(torch.stack(found, 1), torch.from_numpy(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("module", [nn.ReLU(), nn.LeakyReLU(0.2), nn.SiLU(), nn.MaxPool1d(2)])
def test_what_is_known_stays_known(module):
    x = inputs(1, 2, 6)
    found = rule_of(module)(module, Moments(x, torch.zeros_like(x)))
    assert_close(found.mean, module(x))
    assert_close(found.variance, torch.zeros_like(found.mean), atol=1e-12, rtol=0)


def test_the_greater_of_two_gaussians():
    a, b = gaussian_inputs(5), Moments(inputs(5, seed=5), inputs(5, seed=6).square() + 0.05)
    found = torch.stack(maximum(a, b), 1)
    for i in range(5):
        first, second = (stats.norm(float(p.mean[i]), float(p.variance[i]) ** 0.5) for p in (a, b))
        low, high = (f(p.mean() + sign * 10 * p.std() for p in (first, second)) for f, sign in ((min, -1), (max, 1)))

        def moment(k, center=0.0, first=first, second=second, low=low, high=high):
            def value(z):
                return (z - center) ** k * (first.pdf(z) * second.cdf(z) + second.pdf(z) * first.cdf(z))

            return integrate.quad(value, low, high, points=[first.mean(), second.mean()], limit=200)[0]

        expected = [moment(1), moment(2, moment(1))]
        assert_close(found[i], torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d((3, 2), (2, 1), padding=1),
        nn.MaxPool2d(2, stride=1, dilation=2),
        nn.MaxPool2d(3, 2, 1),
    ],
)
def test_max_pooling_of_nearly_known_elements_is_torchs(pool):
    x = inputs(2, 3, 8, 9)
    found = rule_of(pool)(pool, Moments(x, torch.full_like(x, 1e-12)))
    assert_close(found.mean, pool(x), atol=1e-5, rtol=0)
    assert found.variance.max() < 1e-11


def test_max_pooling_of_pairs_is_exact_and_of_more_is_near():
    pool, x = nn.MaxPool1d(2), gaussian_inputs(2, 2, 8)
    found, (mean, variance, mean_error, variance_error) = rule_of(pool)(pool, x), moments_by_draws(pool, x)
    assert ((found.mean - mean) / mean_error).abs().max() < 5
    assert ((found.variance - variance) / variance_error).abs().max() < 5
    pool, x = nn.MaxPool2d(2), Moments(inputs(2, 2, 4, 4), torch.full((2, 2, 4, 4), 0.5, dtype=torch.float64))
    found, (mean, variance, *_) = rule_of(pool)(pool, x), moments_by_draws(pool, x)
    assert_close(found.mean, mean, atol=0.03, rtol=0)
    assert_close(found.variance, variance, atol=0.02, rtol=0.15)


@pytest.mark.parametrize("norm", [lambda: bl.BayesLayerNorm(64), lambda: bl.BayesGroupNorm(2, 64)])
def test_norms_over_many_elements_are_near_their_draws(norm):
    norm = with_posterior(norm())
    x = Moments(inputs(2, 64), 0.1 * inputs(2, 64, seed=2).square())
    with torch.no_grad():
        found = rule_of(norm)(norm, x)
    mean, variance, *_ = moments_by_draws(norm, x, 2000)
    assert_close(found.mean, mean, atol=0.05, rtol=0.05)
    assert_close(found.variance, variance, atol=0.03, rtol=0.15)


def test_points_have_the_moments_they_stand_for():
    for number in (2, 7, 64):
        points = standard_points(number, 3)
        assert points.shape == (number, 3)
        assert_close(points.mean(0), torch.zeros(3, dtype=torch.float64))
        assert_close(points.square().mean(0), torch.ones(3, dtype=torch.float64))
    assert_close(standard_points(1, 3), torch.zeros(1, 3, dtype=torch.float64))
    assert torch.equal(standard_points(64, 3), standard_points(64, 3))
    many = standard_points(1024, 2)
    assert abs(float((many[:, 0] * many[:, 1]).mean())) < 0.01
    assert stats.kstest(many[:, 0].numpy(), "norm").statistic < 0.01


def regression(outputs=1):
    torch.manual_seed(0)
    layers = [bl.BayesLinear(3, 32, init_precision=60.0), nn.ReLU(), bl.BayesLinear(32, outputs, init_precision=60.0)]
    return nn.Sequential(*layers).double()


def test_regression_by_moments_has_the_mean_and_variance_of_draws():
    net, x, num_samples = regression(), inputs(6, 3), 20_000
    found = bl.predict(net, x, method="moments", likelihood=bl.Gaussian(0.1))
    drawn = bl.predict(
        net, x, num_samples, likelihood=bl.Gaussian(0.1), generator=generator(), method="local", sample_chunk=500
    )
    # Hidden units are independent given the input, so that here the two moments are exact.
    assert ((found.mean - drawn.mean) / drawn.standard_error).abs().max() < 5
    assert_close(found.epistemic, drawn.epistemic, rtol=5 * math.sqrt(3 / num_samples), atol=0)
    assert_close(found.aleatoric, torch.full_like(found.aleatoric, 0.1))
    assert found.standard_error.isnan().all()


def test_classes_by_moments_are_near_many_draws():
    net, x = regression(4), inputs(20, 3)
    found = bl.predict(net, x, 256, method="moments")
    drawn = bl.predict(net, x, 20_000, generator=generator(), method="local", sample_chunk=500)
    assert_close(found.probs.sum(1), torch.ones(20, dtype=torch.float64))
    assert_close(found.probs, drawn.probs, atol=0.01, rtol=0)
    assert_close(found.total, drawn.total, atol=0.02, rtol=0)
    assert_close(found.epistemic, drawn.epistemic, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["lenet5", "lenet5_bn", "mlp", "resnet20"])
def test_networks_of_the_zoo_pass_moments(name):
    torch.manual_seed(0)
    net = zoo.create(name).eval()
    for site in bl.posterior(net):
        site.precision.fill_(2000.0)
    size = (3, 32, 32) if name == "resnet20" else (1, 28, 28)
    x = torch.rand(2, *size, generator=generator())
    found = bl.predict(net, x, 128, method="moments")
    again = bl.predict(net, x, 128, method="moments", generator=generator(9), batch_size=1)
    drawn = bl.predict(net, x, 64, generator=generator())
    assert_close(found.probs, again.probs, rtol=1e-4, atol=1e-5)
    assert_close(found.probs, drawn.probs, atol=0.06, rtol=0)
    assert (found.epistemic > 0).all()


def test_before_the_first_bayesian_layer_anything_goes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Softmax(1), bl.BayesLinear(8, 1)).double()
    x = inputs(4, 3)
    found = propagate(net, x)
    assert_close(found.mean, net(x))
    assert_close(found.variance, propagate(net[2], net[:2](x)).variance)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = bl.BayesLinear(3, 3)

    def forward(self, x):
        return torch.relu(self.layer(x)).flatten(1) + x


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = bl.BayesLinear(3, 3)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


def test_functions_between_modules_pass_moments():
    net = with_posterior(Residual())
    x = inputs(4, 3)
    found, inner = propagate(net, x), propagate(net.layer, x)
    relu = RULES[nn.ReLU](nn.ReLU(), inner)
    assert_close(found.mean, relu.mean + x)
    assert_close(found.variance, relu.variance)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(bl.BayesLinear(3, 3), nn.Softmax(1)), r"no moment rule for Softmax \(layer '1'\)"),
        (nn.Sequential(bl.BayesLinear(3, 3), nn.Hardtanh()), r"no moment rule for Hardtanh \(layer '1'\)"),
        (nn.Sequential(bl.BayesFilterResponseNorm2d(3)), r"BayesFilterResponseNorm2d \(layer '0'\)"),
        (nn.Sequential(bl.BayesConv1d(3, 2, 1), nn.MaxPool1d(2, ceil_mode=True)), "MaxPool1d with ceil_mode"),
        (nn.Sequential(bl.BayesConv1d(3, 2, 1), nn.AdaptiveAvgPool1d(2)), "AdaptiveAvgPool1d with windows of several"),
        (nn.Sequential(bl.BayesBatchNorm1d(3, track_running_stats=False)), "without running statistics"),
        (Branching(), "model must have a forward that torch.fx can trace"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(net, message):
    x = torch.rand(2, 3, 5) if "1d" in str(net) else torch.rand(2, 3)
    with pytest.raises(ValueError, match=message) as caught:
        bl.predict(net, x, method="moments")
    assert "\n" not in str(caught.value)
