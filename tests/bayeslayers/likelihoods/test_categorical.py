"""Class weights and ignored labels of the categorical likelihood."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.storage.card import Card, PosteriorError, card_from_json, likelihood_fields, likelihood_in

WEIGHTS = [0.5, 2.0, 1.0]


def pixels(n=4):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, 3, 5, 6, dtype=torch.float64, generator=generator)
    target = torch.randint(3, (n, 5, 6), generator=generator)
    target[:, :2] = 255
    return logits, target


def test_the_loss_is_the_weighted_mean_over_labels_that_count():
    logits, target = pixels()
    log_probs = logits.log_softmax(1).movedim(1, -1)[target != 255]
    labels = target[target != 255]
    losses = -log_probs.gather(1, labels[:, None])[:, 0]
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)[labels]
    assert_close(bl.Categorical(255).loss(logits, target), losses.mean())
    assert_close(bl.Categorical(255, WEIGHTS).loss(logits, target), (weights * losses).sum() / weights.sum())
    kept = logits[:, :, 2:], target[:, 2:]
    assert_close(bl.Categorical(None, WEIGHTS).loss(*kept), bl.Categorical(255, WEIGHTS).loss(logits, target))


def test_a_batch_without_a_label_has_no_loss_and_no_gradient():
    logits, target = pixels()
    logits.requires_grad_()
    loss = bl.Categorical(255).loss(logits, torch.full_like(target, 255))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0 and not grad.any()


def test_ignored_labels_may_be_classes():
    logits, _ = pixels()
    target = torch.ones(4, 5, 6, dtype=torch.long)
    target[0] = 0
    assert_close(bl.Categorical(0).loss(logits, target), F.cross_entropy(logits[1:], target[1:]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_weights": [1.0, 0.0]}, "class_weights must be numbers > 0, one for each class"),
        ({"class_weights": [1.0, math.nan]}, "class_weights must be numbers > 0"),
        ({"class_weights": [1.0]}, "class_weights must be numbers > 0"),
        ({"class_weights": 3}, "class_weights must be numbers > 0"),
        ({"ignore_index": 1.5}, "ignore_index must be an integer, got 1.5"),
    ],
)
def test_a_rule_that_is_broken_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bl.Categorical(**arguments)


def test_weights_must_be_those_of_the_classes():
    logits, target = pixels()
    with pytest.raises(ValueError, match="output must have a class for each of the 2 class_weights, got 3"):
        bl.Categorical(255, [1.0, 2.0]).loss(logits, target)


def test_a_card_gives_it_back():
    likelihood = bl.Categorical(255, WEIGHTS)
    card = Card(**likelihood_fields(likelihood))
    assert card.likelihood_parameters == {"ignore_index": 255, "class_weights": WEIGHTS}
    again = likelihood_in(card_from_json(card.to_json(), "config.json"))
    assert again == likelihood and hash(again) == hash(likelihood)
    assert likelihood_fields(bl.Categorical()) == {"likelihood": "categorical", "likelihood_parameters": {}}


@pytest.mark.parametrize(
    ("likelihood", "parameters"),
    [
        ("categorical", {"class_weights": [1.0, "a"]}),
        ("categorical", {"class_weights": [1.0, -1.0]}),
        ("categorical", {"class_weights": 2}),
        ("categorical", {"ignore_index": 0.5}),
        ("gaussian", {"variance": [1.0, 2.0]}),
        ("gaussian", {"variance": []}),
    ],
)
def test_a_card_from_elsewhere_with_bad_parameters_is_one_sentence(likelihood, parameters):
    text = Card().to_json().replace('"likelihood": "categorical"', f'"likelihood": "{likelihood}"')
    text = json.dumps(json.loads(text) | {"likelihood_parameters": parameters})
    with pytest.raises(PosteriorError, match=r"config\.json must name a likelihood: "):
        card_from_json(text, "config.json")


def test_vogn_counts_the_effective_number_of_weighted_pixels():
    """The curvature is Kish's number of elements times the squares of each example's part of the gradient."""
    generator = torch.Generator().manual_seed(1)
    x, (_, target) = torch.randn(4, 2, 5, 6, generator=generator), pixels()
    net = bl.BayesConv2d(2, 3, 1)
    net.likelihood = bl.Categorical(255, WEIGHTS)
    plain = copy.deepcopy(net)
    optimizer = bl.OGN(net, dataset_size=4, lr=1e-9, precision_lr=1.0, prior_precision=1e-6)

    def closure():
        optimizer.zero_grad()
        loss = net.likelihood.loss(net(x), target)
        loss.backward()
        return loss

    optimizer.step(closure)
    weights = torch.tensor(WEIGHTS)[target.where(target != 255, 0)] * (target != 255)
    number = float(weights.sum() ** 2 / weights.square().sum())
    squares = torch.zeros_like(plain.weight)
    for image, label in zip(x, target, strict=True):
        weight = torch.tensor(WEIGHTS)
        part = F.cross_entropy(plain(image[None]), label[None], weight=weight, ignore_index=255, reduction="sum")
        (grad,) = torch.autograd.grad(part / weights.sum(), plain.weight)
        squares += grad.square()
    assert_close(net.weight_precision, 4 * number * squares + 1e-6, rtol=1e-4, atol=1e-6)


def test_evaluate_leaves_out_what_the_likelihood_ignores():
    x, (_, target) = torch.rand(4, 2, 5, 6, generator=torch.Generator().manual_seed(2)), pixels()
    net = nn.Sequential(bl.BayesConv2d(2, 3, 1))
    with pytest.raises(ValueError, match="target must hold classes from 0 to 2, got 255"):
        bl.evaluate(net, (x, target), method="mean")
    expected = bl.evaluate(net, (x, target), method="mean", ignore_index=255).metrics
    net.likelihood = bl.Categorical(255)
    assert bl.evaluate(net, (x, target), method="mean").metrics == expected
