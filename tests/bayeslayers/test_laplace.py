from __future__ import annotations

import copy
import dataclasses
import math
import warnings

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import bayeslayers as bl
import zoo
from bayeslayers.laplace import best_prior_precision
from zoo.registry import describe

pytestmark = pytest.mark.usefixtures("one_thread")


def exact(got, expected):
    assert_close(got, expected, rtol=1e-9, atol=1e-12)


def images(n=13, seed=0):
    return torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n=13, classes=3):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(1))


def network(kind, outputs=3):
    """An ordinary network whose weights are away from their prior means, in eval mode as after training."""
    bodies = {
        "mlp": [nn.Flatten(), nn.Linear(72, 5), nn.Tanh()],
        "conv": [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5), nn.ReLU()],
        "norms": [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LayerNorm(64)],
    }
    features = {"mlp": 5, "conv": 5, "norms": 64}
    net = nn.Sequential(*bodies[kind], nn.Linear(features[kind], outputs)).double()
    g = torch.Generator().manual_seed(2)
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(
                0.3 + 0.3 * torch.rand(tensor.shape, generator=g) * torch.randn(tensor.shape, generator=g)
            )
    return net.eval()


def squares(net, x, y, loss):
    """Sums of squared per-example gradients, one example at a time."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    single = lambda p, x, y: loss(functional_call(net, p, x[None]), y[None])  # noqa: E731
    per_example = vmap(grad(single), in_dims=(None, 0, 0))(parameters, x, y)
    return {name: g.square().sum(0) for name, g in per_example.items()}


def fitted_by(*args, **options):
    posterior = bl.laplace(*args, **options)
    return posterior, posterior.laplace


def flat(posterior, part="precision"):
    return torch.cat([getattr(site, part).detach().flatten() for site in bl.posterior(posterior)])


@pytest.fixture(scope="module")
def laplace_torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("laplace")
        from laplace.curvature import BackPackEF, CurvlinopsEF

        def fitted(net, x, y, subset="all", **options):
            backend = CurvlinopsEF if subset == "all" else BackPackEF  # which has no rule for norms
            oracle = package.Laplace(copy.deepcopy(net), "classification", subset, "diag", backend=backend, **options)
            oracle.fit(DataLoader(TensorDataset(x, y), batch_size=5))
            return oracle

        yield fitted


@pytest.mark.parametrize("kind", ["mlp", "conv", "norms"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_laplace_is_that_of_laplace_torch(laplace_torch, kind, subset, temperature):
    net, x, y = network(kind), images(), labels()
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    layers = bl.last_layer if subset == "last_layer" else None
    oracle = laplace_torch(net, x, y, subset, prior_precision=0.7, temperature=temperature)
    posterior, fit = fitted_by(net, loader, prior_precision=0.7, layers=layers, temperature=temperature)
    exact(flat(posterior), oracle.posterior_precision)
    mean, covariance = bl.linearised_moments(posterior, x)
    their_mean, their_covariance = oracle._glm_predictive_distribution(x)
    exact(mean, their_mean)
    exact(covariance, their_covariance)
    if kind != "norms" or subset == "last_layer":  # its prior has mean 0 for the scales of norms too
        assert math.isclose(fit.log_marginal_likelihood, oracle.log_marginal_likelihood().item(), rel_tol=1e-9)
        _, fit = fitted_by(net, loader, layers=layers, temperature=temperature)
        best = torch.tensor(next(iter(fit.prior_precision.values())), dtype=torch.float64, requires_grad=True)
        evidence = oracle.log_marginal_likelihood(best)
        assert math.isclose(fit.log_marginal_likelihood, evidence.item(), rel_tol=1e-9)
        assert abs(torch.autograd.grad(evidence, best)[0].item()) < 1e-9


def test_a_linear_map_has_its_exact_posterior_and_evidence():
    # The squared gradient is the Hessian where each residual is as large as the noise.
    noise, prior_precision, design = 0.3, 2.0, torch.linalg.qr(images().flatten(1)[:, :4])[0]
    residual = noise**0.5 * images(1).flatten()[:13].sign()
    x = design * torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    mean = x.T @ residual / noise / prior_precision  # where the gradient of likelihood and prior is 0
    y = x @ mean + residual
    net = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    net.weight.data.copy_(mean)
    posterior, fit = fitted_by(net, [(x, y[:, None])], bl.Gaussian(noise), prior_precision)
    precision = x.T @ x / noise + prior_precision * torch.eye(4, dtype=torch.float64)
    exact(torch.diag(posterior.weight_precision[0]), precision)
    exact(mean, torch.linalg.solve(precision, x.T @ y / noise))
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros_like(y), x @ x.T / prior_precision + noise * torch.eye(13, dtype=torch.float64)
    )
    assert math.isclose(fit.log_marginal_likelihood, marginal.log_prob(y).item(), rel_tol=1e-10)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "y"),
    [
        (bl.Categorical(), 3, labels()),
        (bl.Bernoulli(), 3, labels(39, 2).reshape(13, 3)),
        (bl.Gaussian(0.4), 3, images().flatten(1)[:, :3]),
        (bl.Gaussian(), 4, images().flatten(1)[:, :2]),
    ],
)
def test_the_precision_is_the_prior_s_and_the_sum_of_squares(likelihood, outputs, y):
    net, x = network("norms", outputs), images()
    posterior, fit = fitted_by(net, zip(x.split(5), y.split(5), strict=True), likelihood, 0.7, temperature=0.5)
    expected, elements = squares(net, x, y, likelihood.loss), 3 if likelihood.name == "bernoulli" else 1
    for site in bl.posterior(posterior):
        exact(site.precision, elements * expected[site.name] / 0.5 + 0.7)
        assert site.prior_precision == 0.7
    assert fit.dataset_size == 13
    assert math.isclose(fit.log_likelihood, -13 * likelihood.loss(net(x), y).item(), rel_tol=1e-9)
    assert fit.prior_precision == dict.fromkeys(["0", "1", "4", "5"], 0.7)


def test_a_step_of_ogn_at_rest_on_all_the_data_leaves_the_same():
    net, x, y = network("conv"), images(), labels()
    posterior = bl.laplace(net, (x, y), prior_precision=0.7, temperature=0.3)
    other, _ = bl.to_bayesian(net, prior_precision=0.7)
    optimizer = bl.OGN(other, dataset_size=13, lr=0, precision_lr=1, temperature=0.3)
    with optimizer.sampled():
        bl.Categorical().loss(other(x), y).backward()
    optimizer.step()
    exact(flat(other), flat(posterior))


def test_the_best_prior_precision_has_the_most_evidence():
    net, batch = network("norms"), (images(), labels())
    posterior, fit = fitted_by(net, batch)
    (best,) = set(fit.prior_precision.values())
    evidence = lambda p0: fitted_by(net, batch, prior_precision=p0)[1].log_marginal_likelihood  # noqa: E731
    found = minimize_scalar(lambda log: -evidence(math.exp(log)), (math.log(best / 50), math.log(best * 50)), tol=1e-9)
    assert math.isclose(math.exp(found.x), best, rel_tol=1e-5)
    assert all(evidence(best * factor) < fit.log_marginal_likelihood for factor in (1e-6, 0.1, 0.99, 1.01, 10, 1e6))
    assert {float(site.prior_precision) for site in bl.posterior(posterior)} == {best}


def test_each_layer_s_prior_precision_is_its_best():
    net, batch = network("conv"), (images(), labels())
    posterior, fit = fitted_by(net, batch, prior_precision="marglik_per_layer")
    assert fit.log_marginal_likelihood > fitted_by(net, batch)[1].log_marginal_likelihood
    assert list(fit.prior_precision) == ["0", "4", "6"]
    for layer, value in fit.prior_precision.items():
        for factor in (0.99, 1.01):
            other = copy.deepcopy(posterior)
            for site in bl.posterior(other):
                if site.name.startswith(layer):
                    site.prior_precision.fill_(value * factor)
            _, worse = fitted_by(other, batch, prior_precision=None)
            assert worse.log_marginal_likelihood < fit.log_marginal_likelihood
            assert worse.prior_precision == {}


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8, 1e30])
@pytest.mark.parametrize("distance", [1e-8, 1.0, 1e8])
def test_the_root_is_found_at_every_scale(scale, distance):
    curvature = scale * torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curvature[:5] = 0
    best = best_prior_precision(curvature, distance)
    assert math.isclose((curvature / (curvature + best)).sum().item(), best * distance, rel_tol=1e-9)
    one = torch.tensor([scale], dtype=torch.float64)
    best = best_prior_precision(one, distance)
    assert math.isclose(scale / (scale + best), best * distance, rel_tol=1e-9)


def test_the_network_given_stays_as_it_is():
    net = network("norms").train()
    net[0].weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    posterior = bl.laplace(net, (images(), labels()))
    for name, tensor in net.state_dict().items():
        assert_close(tensor, before[name], rtol=0, atol=0)
        assert_close(posterior.state_dict()[name], before[name], rtol=0, atol=0)
    assert [module.training for module in posterior.modules()] == [True] * 7
    assert [p.requires_grad for p in posterior.parameters()] == [p.requires_grad for p in net.parameters()]
    assert all(p.grad is None for p in (*net.parameters(), *posterior.parameters()))
    assert (posterior[0].weight_precision > posterior[0].weight_prior_precision).any()  # frozen, yet uncertain


def test_a_bayesian_network_keeps_its_layers_and_its_prior():
    net, _ = bl.to_bayesian(network("mlp"), include=bl.last_layer)
    with pytest.warns(UserWarning, match="2 parameters have no posterior and so get no prior"):
        bl.posterior_to_prior(net)
    with bl.sampled(net):
        posterior, fit = fitted_by(net, (images(), labels()), prior_precision=None)
    expected = squares(network("mlp"), images(), labels(), bl.Categorical().loss)
    assert [site.name for site in bl.posterior(posterior)] == ["3.weight", "3.bias"]
    assert fit.report is None
    for site, old in zip(bl.posterior(posterior), bl.posterior(net), strict=True):
        exact(site.precision, old.precision + expected[site.name])
        assert (old.precision == old.prior_precision).all()
        assert_close(site.prior_mean, old.mean.detach(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="prior_precision must be a number if all weights"):
        bl.laplace(net, (images(), labels()))


def test_a_last_layer_is_the_part_of_the_whole():
    net, batch = network("conv"), (images(), labels())
    whole = bl.laplace(net, batch, prior_precision=0.7)
    last, fit = fitted_by(net, batch, prior_precision=0.7, layers=bl.last_layer)
    assert [site.name for site in bl.posterior(last)] == ["6.weight", "6.bias"]
    assert fit.report.totals == {"converted": 18, "deterministic": 161, "tied": 0}
    exact(flat(last), flat(whole)[-18:])


def test_a_last_layer_of_a_bayesian_network_keeps_its_prior_and_the_rest_is_certain():
    net = bl.to_bayesian(network("conv"), prior_precision=0.7)[0]
    net[6].weight_prior_mean.fill_(0.2)
    net[6].set_roots(torch.eye(6).double(), torch.eye(3).double())
    last, fit = fitted_by(net, (images(), labels()), prior_precision=None, layers=bl.last_layer)
    whole = bl.laplace(net, (images(), labels()), prior_precision=None)
    assert [site.name for site in bl.posterior(last)] == ["6.weight", "6.bias"]
    assert fit.report.totals == {"converted": 18, "deterministic": 161, "tied": 0}
    assert (last[6].weight_prior_mean, last[6].bias_prior_precision) == (0.2, 0.7)
    exact(flat(last), flat(whole)[-18:])
    assert (last[6].roots, whole[6].roots) == (None, None)
    assert net[6].roots is not None


def test_a_weight_that_nothing_depends_on_keeps_its_prior():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.idle = network("mlp"), nn.Linear(3, 3, dtype=torch.float64)

        def forward(self, x):
            return self.body(x)

    posterior = bl.laplace(Idle(), (images(), labels()), prior_precision=0.7)
    assert (posterior.idle.weight_precision == 0.7).all()
    assert (posterior.body[3].weight_precision > 0.7).all()


def test_a_posterior_of_the_zoo_can_be_fitted_anew_saved_and_loaded(tmp_path):
    net = zoo.create("mlp", widths=[5], input_size=[1, 8, 9], num_classes=3)
    describe(net, dataclasses.replace(zoo.card_of(net), resize=10))
    x = images().reshape(13, 1, 8, 9).float().sigmoid()
    posterior = bl.laplace(net, (x, labels()), temperature=0.5)
    card = bl.save_posterior(posterior, tmp_path / "posterior")
    assert (card.builder, card.dataset_size, card.temperature, card.metrics) == ("mlp", 13, 0.5, {})
    assert (card.input_size, card.resize) == ([1, 8, 9], 10)
    loaded = zoo.load(tmp_path / "posterior")
    assert_close(flat(loaded), flat(posterior), rtol=0, atol=0)
    assert len(bl.predict(loaded, x, 2)) == 13
    plain = bl.to_deterministic(net)
    last = bl.laplace(plain, (x, labels()), layers=bl.last_layer)
    assert bl.save_posterior(last, tmp_path / "last").builder is None


def call(**options):
    return bl.laplace(**{"model": network("mlp"), "data": (images(), labels())} | options)


class Past(nn.Sequential):
    def forward(self, x):
        return x.flatten(1) @ self[0].weight.T


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prior_precision": "evidence"}, ValueError, "'marglik_per_layer' or None, got 'evidence'"),
        ({"prior_precision": 0.0}, ValueError, "prior_precision must be a finite number > 0, got 0.0"),
        ({"prior_precision": [1.0]}, TypeError, "prior_precision must be a number"),
        ({"temperature": -1}, ValueError, "temperature must be a finite number > 0, got -1"),
        ({"data": []}, ValueError, "data must hold at least one batch"),
        ({"data": [images()]}, TypeError, r"data must yield batches \(x, y\) of tensors, or mappings .*, got Tensor"),
        ({"layers": "head"}, ValueError, "include must name modules of the network, got 'head'"),
        (
            {"data": (images() * math.nan, labels())},
            FloatingPointError,
            "loss must be finite, got nan on a batch of 13",
        ),
        ({"data": (images() * 1e200, labels())}, FloatingPointError, "must be finite, got some that are not"),
        (
            {
                "data": (images() * 0, labels()),
                "model": nn.Sequential(nn.Flatten(), nn.Linear(72, 3, bias=False).double()),
            },
            ValueError,
            "if the loss has no gradient",
        ),
        (
            {"model": Past(bl.BayesLinear(72, 3, dtype=torch.float64))},
            RuntimeError,
            "'0.weight' must get its gradient through its own layer",
        ),
    ],
)
def test_what_cannot_be_fitted_is_one_sentence(options, error, message):
    with pytest.raises(error, match=message):
        call(**options)
