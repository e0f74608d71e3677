from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import bayeslayers as bl
from bayeslayers.metrics import classification_metrics, ood_auroc


def prediction(probs, likelihood=None):
    probs = torch.as_tensor(probs)
    zero = torch.zeros(len(probs))
    return bl.Prediction(probs, zero, zero, zero, torch.zeros_like(probs), 1, likelihood or bl.Categorical())


def calibration_error(probs, target, bins=15):
    """Guo et al. 2017, Eq. 3, by a loop over bins."""
    confidence, correct = probs.max(1), probs.argmax(1) == target
    error, edges = 0.0, np.linspace(0, 1, bins + 1)
    for low, high in pairwise(edges):
        inside = (confidence >= low) & ((confidence < high) | (high == 1.0))
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return error


def random_case(num_classes=4, n=400, sharpness=3.0):
    rng = np.random.default_rng(0)
    logits = sharpness * rng.standard_normal((n, num_classes))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    probs = probs.astype("float32")
    # Right in every other bin, so that other bins would give another error.
    return probs, (probs.argmax(1) + np.int64(probs.max(1) * 15) % 2) % num_classes


def test_metrics_equal_hand_computed_ones():
    probs, target = random_case()
    found = classification_metrics(prediction(probs), torch.as_tensor(target))
    double, rows = probs.astype("float64"), np.arange(len(target))
    assert found["accuracy"] == pytest.approx((probs.argmax(1) == target).mean())
    assert found["nll"] == pytest.approx(-np.log(double[rows, target]).mean())
    assert found["brier"] == pytest.approx(((double - np.eye(4)[target]) ** 2).sum(1).mean())
    assert found["ece"] == pytest.approx(calibration_error(double, target), rel=1e-5)
    assert list(found) == ["accuracy", "nll", "brier", "ece"]


def test_a_confidence_of_exactly_one_falls_into_the_last_bin():
    # 0.95 and right, 1.0 and wrong: |0.5 - 0.975| in their one bin; in bins of their own they would give 0.525.
    probs = np.array([[0.95, 0.05], [1.0, 0.0]])
    found = classification_metrics(prediction(probs), torch.tensor([0, 1]))
    assert found["ece"] == pytest.approx(0.475, abs=1e-6)
    assert found["ece"] == pytest.approx(calibration_error(probs, np.array([0, 1])), abs=1e-6)


def test_a_probability_of_exactly_zero_leaves_the_likelihood_finite():
    found = classification_metrics(prediction(torch.tensor([[1.0, 0.0], [1.0, 0.0]])), torch.tensor([0, 1]))
    assert found["nll"] == pytest.approx(-math.log(torch.finfo(torch.float32).tiny) / 2)
    assert found["brier"] == pytest.approx(1.0)


def test_a_perfect_prediction():
    found = classification_metrics(prediction(torch.eye(3)), torch.arange(3))
    assert found == pytest.approx({"accuracy": 1.0, "nll": 0.0, "brier": 0.0, "ece": 0.0}, abs=1e-6)


@pytest.mark.parametrize("shape", [(40,), (40, 1)])
def test_figures_of_yes_or_no_are_those_of_two_classes(shape):
    yes, target = torch.rand(40, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    likely = bl.Prediction(yes.view(shape), *[torch.zeros(shape)] * 4, 1, bl.Bernoulli())
    found = classification_metrics(likely, target.view(shape))
    expected = classification_metrics(prediction(torch.stack([1 - yes, yes], 1)), target)
    expected["brier"] /= 2  # one square in place of two
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("probs", "target", "likelihood", "message"),
    [
        (torch.full((3, 2), 0.5), torch.zeros(2).long(), None, r"target must have the shape \(3,\), got \(2,\)"),
        (torch.full((3, 2), 0.5), torch.zeros(3, 2).long(), None, r"target must have the shape \(3,\), got \(3, 2\)"),
        (
            torch.full((3, 2), 0.5),
            torch.zeros(3, 2).long(),
            bl.Bernoulli(),
            r"\(n, 1\), got bernoulli of shape \(3, 2\)",
        ),
        (torch.full((3, 2), 0.5), torch.zeros(3).long(), bl.Gaussian(1.0), r"must be categorical.*got gaussian"),
        (torch.full((3, 2, 4), 0.5), torch.zeros(3, 4).long(), None, r"shape \(n, c\).* got .* shape \(3, 2, 4\)"),
    ],
)
def test_what_does_not_fit_is_one_sentence(probs, target, likelihood, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(prediction(probs, likelihood), target)


def scores(case):
    rng = np.random.default_rng(1)
    known, strange = rng.gamma(1.0, size=150), 1 + rng.gamma(1.0, size=90)
    if case == "ties":
        return np.round(known, 1), np.round(strange, 1)
    if case == "beyond float32 and [0, 1]":
        return 1e6 + 1e-6 * known, 1e6 + 1e-6 * strange
    if case == "negative":
        return -strange, -known
    return known, strange


@pytest.mark.parametrize("case", ["plain", "ties", "beyond float32 and [0, 1]", "negative"])
def test_auroc_equals_sklearns(case):
    known, strange = scores(case)
    expected = roc_auc_score(np.r_[np.zeros(len(known)), np.ones(len(strange))], np.r_[known, strange])
    found = ood_auroc(torch.as_tensor(known), torch.as_tensor(strange))
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0.6 < found < 0.99


def test_auroc_of_scores_that_tell_nothing_or_all():
    assert ood_auroc(torch.ones(5), torch.ones(3)) == pytest.approx(0.5)
    assert ood_auroc(torch.zeros(5), torch.ones(3)) == pytest.approx(1.0)
    assert ood_auroc(torch.ones(5), torch.zeros(3)) == pytest.approx(0.0)


@pytest.mark.parametrize("strange", [torch.zeros(0), torch.tensor([math.nan]), torch.tensor([math.inf])])
def test_auroc_refuses_what_has_no_order(strange):
    with pytest.raises(ValueError, match="known and ood must hold finite scores"):
        ood_auroc(torch.zeros(3), strange)
