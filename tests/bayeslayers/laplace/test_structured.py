"""Laplace with Kronecker factors and dense blocks: against closed forms and laplace-torch, saved, and as a prior."""

from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import bayeslayers as bl
from bayeslayers.distributions import dense_gaussian, matrix_gaussian
from bayeslayers.likelihoods.fisher import fisher_columns

pytestmark = pytest.mark.usefixtures("one_thread")
CURVATURES = ["kron", "full"]


def exact(got, expected, tolerance=1e-9):
    assert_close(got, expected, rtol=tolerance, atol=tolerance)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(outputs=3, bias=True):
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs, bias=bias)).double().eval()
    for number, parameter in enumerate(net.parameters()):
        parameter.data.copy_(0.7 * normal(*parameter.shape, seed=number) + 0.1)
    return net


def data(n=12, classes=3):
    return normal(n, 4, seed=9), torch.randint(classes, (n,), generator=torch.Generator().manual_seed(1))


def covariance_of(layer):
    """The covariance of all entries of a layer, its weight's and then its bias's."""
    if (root := layer.dense_root) is not None:
        return root @ root.mT
    changes = []
    for name, tensor in layer.own_tensors().items():
        for place in range(tensor.numel()):
            noise = {key: torch.zeros_like(own) for key, own in layer.own_tensors().items()}
            noise[name].view(-1)[place] = 1.0
            changes.append(torch.cat([part.flatten() for part in layer.change(noise).values()]))
    columns = torch.stack(changes, 1)
    return columns @ columns.mT


def fisher_of(net, names, x, likelihood):
    """The Fisher information in some parameters, one example and one output after the other."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def output(own, example):
        return functional_call(net, parameters | own, example[None])[0]

    own = {name: parameters[name] for name in names}
    jacobians = vmap(jacrev(output), in_dims=(None, 0))(own, x)
    flat = torch.cat([jacobians[name].flatten(2) for name in names], 2)  # (n, c, d)
    roots = torch.stack(list(fisher_columns(likelihood, net(x).detach())), 2)  # (n, c, k)
    rows = (flat.mT @ roots).mT.flatten(0, 1)
    return rows.mT @ rows


def test_a_dense_block_is_the_posterior_of_bayesian_linear_regression():
    noise, precision, x = 0.3, 2.0, normal(20, 4)
    y = x @ normal(4, 2, seed=3) + 0.5 * normal(20, 2, seed=4)
    design = torch.cat([x, torch.ones(20, 1, dtype=torch.float64)], 1)
    inverse = design.mT @ design / noise + precision * torch.eye(5, dtype=torch.float64)
    means = torch.linalg.solve(inverse, design.mT @ y / noise)  # (5, 2)
    net = nn.Linear(4, 2).double()
    net.weight.data, net.bias.data = means[:4].mT.contiguous(), means[4].clone()
    order = [0, 1, 2, 3, 8, 4, 5, 6, 7, 9]  # the rows of [weight | bias] in the order of weight, then bias
    expected = torch.block_diag(*[torch.linalg.inv(inverse)] * 2)
    order = torch.tensor([*range(4), *range(5, 9), 4, 9])
    expected = expected[order][:, order]
    covariance = torch.block_diag(*[design @ design.mT / precision + noise * torch.eye(20, dtype=torch.float64)] * 2)
    marginal = torch.distributions.MultivariateNormal(torch.zeros(40, dtype=torch.float64), covariance)
    for curvature in CURVATURES:  # both are exact for one linear layer and this likelihood
        found = bl.laplace(net, (x, y), bl.Gaussian(noise), precision, fisher="exact", curvature=curvature)
        exact(covariance_of(found), expected)
        exact(torch.cat([found.weight_precision.flatten(), found.bias_precision]), 1 / expected.diagonal())
        evidence = marginal.log_prob(y.mT.flatten()).item()
        assert math.isclose(found.laplace.log_marginal_likelihood, evidence, rel_tol=1e-10)
        mean, spread = bl.linearised_moments(found, x[:3])
        exact(mean, x[:3] @ means[:4] + means[4])
        variance = torch.einsum("ni,ij,nj->n", design[:3], torch.linalg.inv(inverse), design[:3])
        exact(spread, variance[:, None, None] * torch.eye(2, dtype=torch.float64))


def test_half_of_the_data_as_a_prior_and_then_the_other_half_are_all_of_it():
    x, y, likelihood = normal(20, 4), normal(20, 2, seed=4), bl.Gaussian(0.3)
    net = nn.Linear(4, 2).double()
    options = {"likelihood": likelihood, "fisher": "exact", "curvature": "full"}
    whole = bl.laplace(net, (x, y), prior_precision=2.0, **options)
    first = bl.laplace(net, (x[:8], y[:8]), prior_precision=2.0, **options)
    second = bl.laplace(net, (x[8:], y[8:]), prior=first, **options)
    exact(covariance_of(second), covariance_of(whole))
    bl.posterior_to_prior(first)
    assert float(bl.kl_divergence(first)) == pytest.approx(0, abs=1e-12)
    third = bl.laplace(first, (x[8:], y[8:]), prior_precision=None, **options)
    exact(covariance_of(third), covariance_of(whole))
    exact(third.prior_dense_root @ third.prior_dense_root.mT, covariance_of(first))


@pytest.mark.parametrize("likelihood", [bl.Categorical(), bl.Bernoulli(), bl.Gaussian(0.4), bl.Gaussian()])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_each_layer_has_the_dense_curvature_of_all_examples(likelihood, fisher):
    net, (x, y) = network(4), data(classes=4)
    if not isinstance(likelihood, bl.Categorical):
        y = normal(12, 4, seed=2)[:, : 2 if likelihood == bl.Gaussian() else 4]
        y = (y > 0).double() if likelihood == bl.Bernoulli() else y
    found = bl.laplace(net, [(x[:7], y[:7]), (x[7:], y[7:])], likelihood, 0.7, fisher=fisher, curvature="full")
    diagonal = bl.laplace(net, (x, y), likelihood, 0.7, fisher=fisher)
    for name in ("0", "2"):
        names = [f"{name}.weight", f"{name}.bias"]
        precision = torch.linalg.inv(covariance_of(found.get_submodule(name)))
        sums = torch.cat([diagonal.get_buffer(f"{n}_precision").flatten() for n in names])
        exact(precision.diagonal(), sums)
        if fisher == "exact":
            information = fisher_of(net, names, x, likelihood)
            exact(precision, information + 0.7 * torch.eye(len(precision), dtype=torch.float64))
    assert found.laplace.curvature == {"0": "dense", "2": "dense"}


def test_the_prior_precision_has_the_most_evidence():
    for curvature in CURVATURES:
        best = bl.laplace(network(), data(), curvature=curvature, fisher="exact")
        value = best.laplace.prior_precision["0"]
        for factor in (0.9, 1.1):
            other = bl.laplace(network(), data(), prior_precision=factor * value, curvature=curvature, fisher="exact")
            assert other.laplace.log_marginal_likelihood < best.laplace.log_marginal_likelihood


@pytest.mark.parametrize("structure", CURVATURES)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_last_layer_is_that_of_laplace_torch(structure, temperature):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("laplace")
        from laplace.curvature import BackPackGGN

        net, (x, y) = network(bias=structure == "full"), data()  # its Kronecker factors leave out the bias
        options = {"prior_precision": 0.7, "temperature": temperature, "backend": BackPackGGN}
        oracle = package.Laplace(copy.deepcopy(net), "classification", "last_layer", structure, **options)
        oracle.fit(DataLoader(TensorDataset(x, y), batch_size=12))
        their_mean, their_covariance = oracle._glm_predictive_distribution(x)
    options = {"layers": bl.last_layer, "temperature": temperature, "fisher": "exact", "curvature": structure}
    found = bl.laplace(net, (x, y), prior_precision=0.7, **options)
    mean, covariance = bl.linearised_moments(found, x)
    exact(mean, their_mean)
    exact(covariance, their_covariance)
    evidence = oracle.log_marginal_likelihood().item()
    assert math.isclose(found.laplace.log_marginal_likelihood, evidence, rel_tol=1e-9)
    if structure == "full":
        exact(torch.linalg.inv(covariance_of(found[2])), oracle.posterior_precision)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_it_is_saved_loaded_and_sampled(curvature, tmp_path):
    net, (x, y) = network(), data()
    found = bl.laplace(net, (x, y), prior_precision=0.7, curvature=curvature)
    bl.posterior_to_prior(found)
    again = bl.laplace(found, (x, y), prior_precision=None, curvature=curvature)
    bl.save_posterior(again, tmp_path / "posterior")
    loaded = bl.to_bayesian(network())[0]
    bl.load_posterior(tmp_path / "posterior", loaded)
    assert_close(dict(loaded.state_dict()), dict(again.state_dict()), rtol=0, atol=0)
    assert set(again[0].correlations) <= set(dict(loaded.named_buffers(recurse=True))) | set(again[0]._buffers)
    seeded = [torch.Generator().manual_seed(0) for _ in range(2)]
    one, two = (bl.predict(n, x, 4, method="sample", generator=g) for n, g in zip((again, loaded), seeded, strict=True))
    assert_close(one.mean, two.mean, rtol=0, atol=0)
    assert (one.epistemic > 0).all()
    assert json.loads((tmp_path / "posterior/config.json").read_text())["method"] == "linearised"
    plain = bl.to_deterministic(loaded)
    assert [name for name, _ in plain.named_buffers()] == []
    merged = bl.merge([again, loaded], "average")
    assert not merged[0].correlations and not merged[0].prior_correlations
    optimizer = bl.VOGN(loaded, dataset_size=12, lr=1e-3)
    with optimizer.sampled():
        nn.functional.cross_entropy(loaded(x), y).backward()
    optimizer.step()
    assert not loaded[0].correlations and loaded[0].prior_correlations


@pytest.mark.parametrize("curvature", CURVATURES)
def test_samples_have_the_covariance(curvature):
    layer = bl.laplace(network(), data(), prior_precision=0.7, curvature=curvature)[2]
    samples, generator = [], torch.Generator().manual_seed(0)
    for _ in range(4000):
        with bl.sampled(layer, generator):
            samples.append(torch.cat([(layer.value(k) - p).detach().flatten() for k, p in layer.own_tensors().items()]))
    found, expected = torch.stack(samples).mT.cov(correction=0), covariance_of(layer)
    variance = torch.outer(expected.diagonal(), expected.diagonal()) + expected.square()
    assert ((found - expected) / (variance / 4000).sqrt()).abs().max() < 5


def test_divergence_and_strength_are_those_of_torch_distributions():
    net = bl.laplace(network(), data(), prior_precision=0.7, curvature="full")
    normals = {}
    for layer in (net[0], net[2]):
        mean = torch.cat([p.detach().flatten() for p in layer.own_tensors().values()])
        prior = torch.distributions.MultivariateNormal(torch.zeros_like(mean), torch.eye(len(mean)).double() / 0.7)
        normals[layer] = torch.distributions.MultivariateNormal(mean, covariance_of(layer)), prior
    expected = sum(torch.distributions.kl_divergence(*pair) for pair in normals.values())
    assert_close(bl.kl_divergence(net).detach(), expected)
    bl.posterior_to_prior(net, strength=3.0)
    for layer, (posterior, prior) in normals.items():
        precision = prior.precision_matrix + 3 * (posterior.precision_matrix - prior.precision_matrix)
        exact(torch.linalg.inv(layer.prior_dense_root @ layer.prior_dense_root.mT), precision, 1e-8)


def test_a_scale_between_roots_is_in_variance_divergence_and_rounding():
    inner, outer, scale = normal(4, 4), normal(3, 3, seed=1), normal(3, 4, seed=2).exp()
    root = torch.stack(
        [matrix_gaussian.correlated(e.view(3, 4), inner, outer, scale).flatten() for e in torch.eye(12).double()], 1
    )
    exact(matrix_gaussian.marginal_precision(inner, outer, scale).flatten(), dense_gaussian.marginal_precision(root))
    mean, precision = normal(3, 4, seed=5), torch.tensor(2.0, dtype=torch.float64)
    expected = dense_gaussian.kl_divergence(mean.flatten(), root, 0 * mean.flatten(), precision.rsqrt().expand(12))
    exact(matrix_gaussian.kl_divergence(mean, inner, outer, 0 * mean, precision, scale), expected)
    roots = torch.eye(4).double() * precision.rsqrt(), torch.eye(3).double()
    exact(matrix_gaussian.divergence_of_matrices(mean, (inner, outer), 0 * mean, roots, scale), expected)
    rounded = matrix_gaussian.without_scale(inner, outer, torch.outer(scale[:, 0], scale[0]))
    exact(
        matrix_gaussian.marginal_precision(*rounded),
        matrix_gaussian.marginal_precision(inner, outer, torch.outer(scale[:, 0], scale[0])),
    )


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        return self.head(self.layer(self.layer(x).tanh()))


def test_a_layer_that_runs_twice_has_the_curvature_of_both_uses():
    net, (x, y) = Reused(), data()
    found = bl.laplace(net, (x, y), prior_precision=0.7, fisher="exact", curvature="full")
    information = fisher_of(net, ["layer.weight", "layer.bias"], x, bl.Categorical())
    precision = torch.linalg.inv(covariance_of(found.layer))
    exact(precision, information + 0.7 * torch.eye(20, dtype=torch.float64))


def test_norms_stay_diagonal_and_the_fit_says_so():
    net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    for curvature, kind in zip(CURVATURES, ("kronecker", "dense"), strict=True):
        found = bl.laplace(net, data(), curvature=curvature).laplace
        assert found.curvature == {"0": kind, "1": "diagonal", "2": kind}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"curvature": "dense"}, ValueError, "curvature must be 'diagonal', 'kron' or 'full', got 'dense'"),
        ({"model": nn.Linear(4, 2000).double(), "curvature": "full"}, ValueError, "at most 6,000 weights .* 10,000"),
        ({"likelihood": bl.Categorical(class_weights=[1, 2, 3]), "fisher": "exact"}, ValueError, "class_weights must"),
    ],
)
def test_what_has_no_such_curvature_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        bl.laplace(**{"model": network(), "data": data()} | options)


def test_a_prior_that_is_no_product_is_refused_by_kron():
    net = bl.laplace(network(), data(), prior_precision=0.7)
    bl.posterior_to_prior(net)
    with pytest.raises(ValueError, match="the prior of layer '0' must be one precision or a Kronecker product"):
        bl.laplace(net, data(), prior_precision=None, curvature="kron")
