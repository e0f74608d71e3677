from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.likelihoods import likelihood_named, likelihood_of

generator = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 2, 4)])
def test_categorical_loss_is_the_mean_negative_log_probability(shape):
    logits = randn(*shape)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    log_prob = torch.distributions.Categorical(logits=logits.movedim(1, -1)).log_prob(target)
    assert_close(bl.Categorical().loss(logits, target), -log_prob.mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.long, torch.bool])
def test_bernoulli_loss_is_the_mean_negative_log_probability(dtype):
    logits, target = randn(5, 2), torch.randint(2, (5, 2), generator=generator)
    log_prob = torch.distributions.Bernoulli(logits=logits).log_prob(target.double())
    assert_close(bl.Bernoulli().loss(logits, target.to(dtype)), -log_prob.mean())


def test_gaussian_loss_with_known_variance():
    output, target = randn(6, 2), randn(6, 2)
    log_prob = torch.distributions.Normal(output, math.sqrt(0.3)).log_prob(target)
    assert_close(bl.Gaussian(0.3).loss(output, target), -log_prob.sum(1).mean())


@pytest.mark.parametrize("shape", [(6, 4), (6, 2, 3, 3)])
def test_gaussian_loss_with_predicted_variance(shape):
    output = randn(*shape)
    mean, log_variance = output.chunk(2, dim=1)
    target = randn(*mean.shape)
    log_prob = torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(target)
    assert_close(bl.Gaussian().loss(output, target), -log_prob.flatten(1).sum(1).mean())


def test_gaussian_loss_has_the_gradient_of_half_the_squared_error():
    output, target = randn(8, 1).requires_grad_(), randn(8, 1)
    (grad,) = torch.autograd.grad(bl.Gaussian(1.0).loss(output, target), output)
    assert_close(grad, (output - target).detach() / 8)


def test_categorical_per_draw_gives_probabilities_and_entropy():
    logits = randn(4, 5, 2)
    probs, entropy = bl.Categorical().per_draw(logits)
    expected = torch.distributions.Categorical(logits=logits.movedim(1, -1))
    assert_close(probs.movedim(1, -1), expected.probs)
    assert_close(entropy, expected.entropy())


@pytest.mark.parametrize(
    ("logits", "entropy"),
    [([0.0, 0.0, 0.0, 0.0], math.log(4)), ([0.0, 0.0, -math.inf, -math.inf], math.log(2)), ([0.0, -200.0], 0.0)],
)
def test_categorical_entropies_known_by_heart(logits, entropy):
    _, found = bl.Categorical().per_draw(torch.tensor([logits], dtype=torch.float64))
    assert_close(found, torch.tensor([entropy], dtype=torch.float64))


def test_bernoulli_per_draw_gives_the_probability_of_yes_and_entropy():
    logits = torch.cat([randn(9), torch.tensor([0.0, -800.0, 800.0], dtype=torch.float64)])
    prob, entropy = bl.Bernoulli().per_draw(logits)
    assert_close(prob, logits.sigmoid())
    assert_close(entropy[:9], torch.distributions.Bernoulli(logits=logits[:9]).entropy())
    assert_close(entropy[9:], torch.tensor([math.log(2), 0.0, 0.0], dtype=torch.float64))


def test_gaussian_per_draw_gives_mean_and_noise_variance():
    output = randn(3, 4)
    mean, variance = bl.Gaussian().per_draw(output)
    assert_close(mean, output[:, :2])
    assert_close(variance, output[:, 2:].exp())
    mean, variance = bl.Gaussian(2.5).per_draw(output)
    assert_close(mean, output)
    assert_close(variance, torch.full_like(output, 2.5))


def test_split_of_discrete_uncertainty_is_the_mutual_information():
    draws = randn(6, 4, 3).softmax(2)  # (s, n, c)
    aleatoric = torch.special.entr(draws).sum(2).mean(0)
    total, epistemic = bl.Categorical().split(draws.mean(0), draws.var(0), aleatoric)
    relative = (draws * (draws / draws.mean(0)).log()).sum(2).mean(0)  # E KL(p || E p)
    assert_close(epistemic, relative)
    assert_close(total, aleatoric + relative)


def test_gaussian_epistemic_variance_survives_a_noise_that_dwarfs_it():
    mean, aleatoric = torch.zeros(2), torch.full((2,), 1e6)
    total, epistemic = bl.Gaussian(1e6).split(mean, torch.tensor([1e-3, 4e-3]), aleatoric)
    assert_close(epistemic, torch.tensor([1e-3, 4e-3]))
    assert_close(total, aleatoric)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: bl.Categorical().loss(torch.zeros(4, 1), torch.zeros(4).long()), r"two or more classes.*\(4, 1\)"),
        (lambda: bl.Categorical().per_draw(torch.zeros(4)), r"two or more classes.*got shape \(4,\)"),
        (lambda: bl.Bernoulli().loss(torch.zeros(4, 1), torch.zeros(4)), r"\(4, 1\), got \(4,\)\. target.unsqueeze"),
        (lambda: bl.Gaussian().loss(torch.zeros(4, 3), torch.zeros(4, 3)), r"two halves of dimension 1.*\(4, 3\)"),
        (lambda: bl.Gaussian().loss(torch.zeros(4), torch.zeros(4)), r"two halves of dimension 1.*\(4,\)"),
        (lambda: bl.Gaussian(1.0).loss(torch.zeros(4, 1), torch.zeros(4)), r"shape \(4, 1\), got \(4,\)"),
        (lambda: bl.Gaussian().loss(torch.zeros(4, 2), torch.zeros(4)), r"shape \(4, 1\), got \(4,\)"),
        (lambda: bl.Gaussian(0.0), "variance must be a finite number > 0, got 0.0"),
        (lambda: bl.Gaussian(-1.0), "variance must be a finite number > 0"),
        (lambda: bl.Gaussian(math.nan), "variance must be a finite number > 0, got nan"),
        (lambda: likelihood_named("categorial"), "unknown likelihood 'categorial'. Did you mean 'categorical'"),
    ],
)
def test_wrong_shapes_and_values_are_one_sentence(call, error):
    with pytest.raises(ValueError, match=error) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_likelihood_of_a_model():
    model = nn.Linear(1, 1)
    assert likelihood_of(model) == bl.Categorical()
    model.likelihood = bl.Gaussian(0.5)
    assert likelihood_of(model) == bl.Gaussian(0.5)
    assert [likelihood_named(name).name for name in ("categorical", "bernoulli", "gaussian")] == [
        "categorical",
        "bernoulli",
        "gaussian",
    ]


def test_loss_is_a_batch_mean_so_that_vogn_sees_per_example_gradients():
    logits, target = randn(6, 3), torch.randint(3, (6,), generator=generator)
    whole = bl.Categorical().loss(logits, target)
    halves = [bl.Categorical().loss(a, b) for a, b in zip(logits.split(3), target.split(3), strict=True)]
    assert_close(whole, torch.stack(halves).mean())
    assert_close(whole, F.cross_entropy(logits, target))
