from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.prediction import linearised

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bayesian(net, **options):
    """A network whose posterior differs from weight to weight."""
    net = bl.to_bayesian(net.double(), **options)[0]
    for seed, site in enumerate(bl.posterior(net)):
        site.mean.data.copy_(0.4 * normal(*site.mean.shape, seed=seed))
        site.precision.copy_(1 + normal(*site.mean.shape, seed=seed + 100).square())
    return net


NETS = {
    "mlp": lambda: [nn.Flatten(), nn.Linear(72, 4), nn.Tanh(), nn.Linear(4, 3)],
    "conv": lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)],
    "norms": lambda: [nn.Conv2d(2, 2, 5, bias=False), nn.BatchNorm2d(2), nn.Flatten(), nn.LayerNorm(8), nn.Dropout()],
    "dense": lambda: [nn.ConvTranspose2d(2, 1, 2, stride=2), nn.GELU(), nn.Conv2d(1, 2, 11)],
    "in place": lambda: [nn.Flatten(), nn.Linear(72, 3), nn.ReLU(inplace=True)],
}


def images(n=5):
    return normal(n, 2, 6, 6, seed=7)


def brute_force(net, x):
    """Covariance of an example's outputs from the Jacobian of the deterministic counterpart."""
    plain, sites = bl.to_deterministic(net).eval(), list(bl.posterior(net))
    parameters = {name: p.detach() for name, p in plain.named_parameters()}
    jacobian = jacrev(lambda p: functional_call(plain, p, x).flatten(1))(parameters)
    rows = torch.cat([jacobian[s.name].flatten(2) * s.precision.rsqrt().flatten() for s in sites], 2)
    return rows @ rows.mT


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("budget", [linearised._CHUNK_BYTES, 2**14, 1])  # all at once; by examples; by rows
def test_the_covariance_is_that_of_the_jacobian(kind, budget, monkeypatch):
    monkeypatch.setattr(linearised, "_CHUNK_BYTES", budget)
    net, x = bayesian(nn.Sequential(*NETS[kind]())).train(), images()
    mean, covariance = bl.linearised_moments(net, x)
    assert net.training
    assert not mean.requires_grad
    assert not covariance.requires_grad
    assert_close(mean, net.eval()(x).detach(), rtol=0, atol=0)
    assert_close(covariance, brute_force(net, x), rtol=1e-10, atol=1e-12)


def test_a_last_layer_alone_needs_no_jacobian(monkeypatch):
    body = [nn.Flatten(), nn.Linear(72, 4), nn.Tanh()]
    for bias in (True, False):
        net = bayesian(nn.Sequential(*body, nn.Linear(4, 3, bias=bias)), include=bl.last_layer)
        general = bl.linearised_moments(nn.Sequential(net, nn.Unflatten(1, (3, 1))), images())[1]
        with monkeypatch.context() as patch:
            patch.setattr(linearised, "vjp", None)
            mean, covariance = bl.linearised_moments(net, images())
            draws = bl.linearised_outputs(net, images(), 3)
        assert_close(mean, net(images()).detach(), rtol=0, atol=0)
        assert_close(covariance, general, rtol=1e-12, atol=1e-14)
        assert_close(covariance, brute_force(net, images()), rtol=1e-12, atol=1e-14)
        assert draws.shape == (3, 5, 3)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(self.layer(x))


def doubled(module, args, output):
    return 2 * output


def test_a_last_layer_with_more_behind_it_is_not_taken_for_the_outputs():
    hooked = bayesian(nn.Sequential(nn.Linear(3, 3)))
    hooked[0].register_forward_hook(doubled)
    unused = bayesian(nn.Sequential(nn.Linear(3, 3)))
    unused.forward = torch.tanh
    for net in (bayesian(Twice()), hooked, unused, bayesian(nn.Sequential(nn.Linear(3, 3), nn.Softplus()))):
        assert_close(bl.linearised_moments(net, normal(4, 3))[1], brute_force(net, normal(4, 3)))


def test_a_scope_of_drawn_weights_does_not_shift_the_point_of_linearisation():
    net = bayesian(nn.Sequential(*NETS["conv"]()))
    outside = bl.linearised_moments(net, images())
    with bl.sampled(net):
        drawn = net(images())
        inside = bl.linearised_moments(net, images())
        assert_close(net(images()), drawn, rtol=0, atol=0)
    for a, b in zip(inside, outside, strict=True):
        assert_close(a, b, rtol=0, atol=0)


def within_five_deviations(draws, mean, covariance):
    """Mean and covariance of draws `(s, n, c)` have z-scores under 5."""
    count = len(draws)
    variance = covariance.diagonal(dim1=1, dim2=2)
    assert ((draws.mean(0) - mean).abs() / (variance / count).sqrt()).max() < 5
    deviation = draws - mean
    sampled = torch.einsum("sni,snj->nij", deviation, deviation) / count
    spread = ((variance[:, :, None] * variance[:, None, :] + covariance.square()) / count).sqrt()
    assert ((sampled - covariance).abs() / spread).max() < 5


@pytest.mark.parametrize("include", [None, bl.last_layer])
def test_draws_have_the_moments(include):
    net = bayesian(nn.Sequential(*NETS["conv"]()), include=include)
    draws = bl.linearised_outputs(net, images(), 20_000, torch.Generator().manual_seed(3))
    within_five_deviations(draws, *bl.linearised_moments(net, images()))
    again = bl.linearised_outputs(net, images(), 20_000, torch.Generator().manual_seed(3))
    assert_close(draws, again, rtol=0, atol=0)


def test_predict_averages_these_draws():
    net = bayesian(nn.Sequential(*NETS["mlp"]()))
    draws = bl.linearised_outputs(net, images(), 40, torch.Generator().manual_seed(6))
    prediction = bl.predict(net, images(), 40, method="linearised", generator=torch.Generator().manual_seed(6))
    assert_close(prediction.probs, draws.softmax(2).mean(0))


def test_draws_of_weights_near_the_mean_have_the_moments_too():
    net, draws = bayesian(nn.Sequential(*NETS["norms"]())).eval(), []
    for site in bl.posterior(net):
        site.precision.mul_(1e8)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _ in range(1000):
            with bl.sampled(net, g):
                draws.append(net(images(2)))
    within_five_deviations(torch.stack(draws), *bl.linearised_moments(net, images(2)))


def test_more_outputs_than_weights_give_draws_in_their_span():
    net = nn.Sequential(bayesian(nn.Linear(1, 1)), nn.Linear(1, 4, dtype=torch.float64), nn.Unflatten(1, (2, 2)))
    x = normal(6, 1)
    draws = bl.linearised_outputs(net, x, 50, torch.Generator().manual_seed(5))
    assert draws.shape == (50, 6, 2, 2)
    deviation = (draws - net(x).detach()).flatten(2)
    direction = nn.functional.normalize(net[1].weight.detach()[:, 0], dim=0)
    along = (deviation @ direction)[..., None] * direction
    assert_close(deviation, along, rtol=0, atol=1e-6)
    variance = (1 + 0 * x.square()) / net[0].bias_precision + x.square() / net[0].weight_precision
    exact = variance[:, :, None] * net[1].weight.detach() @ net[1].weight.detach().T
    assert_close(bl.linearised_moments(net, x)[1], exact, rtol=1e-10, atol=1e-12)


def test_attention_and_half_precision_have_a_covariance():
    net = bayesian(nn.Sequential(*NETS["mlp"]())).bfloat16()
    mean, covariance = bl.linearised_moments(net, images().bfloat16())
    assert (mean.dtype, covariance.dtype) == (torch.bfloat16, torch.float32)
    assert bl.linearised_outputs(net, images().bfloat16(), 2).dtype == torch.bfloat16

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(6, 18)

        def forward(self, x):
            q, k, v = self.qkv(x.flatten(1, 2)).chunk(3, -1)
            return nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]).mean((1, 2))

    net = bayesian(Attention())
    covariance = bl.linearised_moments(net, images())[1]
    with sdpa_kernel(SDPBackend.MATH):
        assert_close(covariance, brute_force(net, images()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bl.linearised_moments(nn.Linear(2, 2), torch.ones(1, 2)), "must have Bayesian layers, got none"),
        (lambda: bl.linearised_outputs(bl.BayesLinear(2, 2), torch.ones(1, 2), 0), "num_samples must be an integer >="),
    ],
)
def test_what_has_no_outputs_to_draw_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
