from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch.testing import assert_close
from torchmetrics.functional.classification import binary_auroc

from bayeslayers.metrics import Levels, ScoreHistogram, adaptive_calibration_error

CASES = ["plain", "ties", "two values", "constant", "one positive", "one negative", "separated", "reversed"]


def scored(case, n=300):
    rng = np.random.default_rng(7)
    positive = rng.random(n) < 0.3
    score = rng.gamma(1.0, size=n) + 0.5 * positive
    if case == "ties":
        score = np.round(score, 1)
    elif case == "two values":
        score = np.round(score > 1).astype(float)
    elif case == "constant":
        score = np.zeros(n)
    elif case == "one positive":
        positive = np.arange(n) == 5
    elif case == "one negative":
        positive = np.arange(n) != 5
    elif case == "separated":
        score = score + 100.0 * positive
    elif case == "reversed":
        score = score - 100.0 * positive
    return torch.as_tensor(score), torch.as_tensor(positive)


def false_positive_rate(score, positive, recall=0.95):
    rates, recalls, _ = roc_curve(positive.numpy(), score.numpy(), drop_intermediate=False)
    return rates[np.argmax(recalls >= recall)]


@pytest.mark.parametrize("case", CASES)
def test_auroc_and_false_positive_rate_equal_sklearns(case):
    score, positive = scored(case)
    levels = Levels.of(score, positive)
    assert levels.auroc() == pytest.approx(roc_auc_score(positive, score), abs=1e-12)
    assert levels.false_positive_rate() == pytest.approx(false_positive_rate(score, positive), abs=1e-12)
    assert levels.false_positive_rate(0.5) == pytest.approx(false_positive_rate(score, positive, 0.5), abs=1e-12)


def test_auroc_equals_torchmetrics():
    score, positive = scored("ties")
    inside = (score / score.max()).float()  # scores outside [0, 1] it would squash
    assert Levels.of(inside, positive).auroc() == pytest.approx(float(binary_auroc(inside, positive.long())), abs=1e-6)


def test_exactly_the_recall_is_enough():
    # 19 of 20 OOD examples score above every known example, the last one below all.
    score = torch.cat([torch.arange(1.0, 11), torch.zeros(1), torch.arange(11.0, 30)])
    levels = Levels.of(score, torch.arange(30) >= 10)
    assert levels.false_positive_rate(0.95) == 0
    assert levels.false_positive_rate(0.951) == 1


@pytest.mark.parametrize("positive", [torch.zeros(4).bool(), torch.ones(4).bool()])
def test_one_kind_alone_cannot_be_told_apart(positive):
    levels = Levels.of(torch.rand(4, generator=torch.Generator().manual_seed(0)), positive)
    assert math.isnan(levels.auroc()) and math.isnan(levels.false_positive_rate())
    assert levels.aurc() == float(positive[0])
    assert_close(levels.risk_coverage().risk, torch.full((4,), float(positive[0])).double())


def areas_of_orders(score, wrong):
    """The area under the risk-coverage curve of every order that ascends in the score."""
    for order in itertools.permutations(range(len(score))):
        if all(score[a] <= score[b] for a, b in itertools.pairwise(order)):
            errors = np.cumsum([wrong[i] for i in order])
            yield (errors / np.arange(1, len(score) + 1)).mean()


@pytest.mark.parametrize(
    "score", [[3, 1, 2, 6, 5, 4, 0], [0, 1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 1, 1], [2, 2, 0, 0, 0, 1, 1]]
)
def test_area_under_risk_coverage_is_the_mean_over_orders_of_ties(score):
    wrong = [True, False, True, False, False, True, False]
    found = Levels.of(torch.tensor(score), torch.tensor(wrong)).aurc()
    assert found == pytest.approx(np.mean(list(areas_of_orders(score, wrong))), abs=1e-12)


def test_area_under_risk_coverage_of_many_distinct_scores():
    score, wrong = scored("plain", 5000)
    order = np.argsort(score.numpy())
    risks = np.cumsum(wrong.numpy()[order]) / np.arange(1, 5001)
    assert Levels.of(score, wrong).aurc() == pytest.approx(risks.mean(), abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_risk_coverage_equals_a_loop_over_thresholds(case):
    score, wrong = scored(case)
    kept = [score <= threshold for threshold in score.unique()]
    curve = Levels.of(score, wrong).risk_coverage()
    coverage = torch.stack([part.double().mean() for part in kept])
    risk = torch.stack([wrong[part].double().mean() for part in kept])
    assert_close(curve.coverage, coverage)
    assert_close(curve.risk, risk)
    for limit in (0.0, 0.01, 0.2, 1.0):
        allowed = [float(c) for c, r in zip(coverage, risk, strict=True) if r <= limit]
        assert curve.coverage_at(limit) == pytest.approx(max(allowed, default=0.0))


def test_coverage_at_a_risk_that_is_met_exactly():
    wrong = torch.arange(100) == 99  # the least certain one
    assert Levels.of(torch.arange(100), wrong).risk_coverage().coverage_at(0.01) == 1.0


def skewed(n=20_000):
    """Scores over 16 orders of magnitude, zeros among them, higher for positives."""
    rng = np.random.default_rng(3)
    positive = rng.random(n) < 0.2
    score = np.exp(rng.normal(-6, 4, n) + 2 * positive).clip(2**-27, 31.9)
    score[:50] = 0
    return torch.as_tensor(score, dtype=torch.float32), torch.as_tensor(positive)


def test_histogram_is_exact_for_scores_of_its_precision():
    score, positive = skewed()
    histogram = ScoreHistogram()
    for part in (slice(0, 7), slice(7, 9000), slice(9000, None)):
        histogram.add(score[part], positive[part])
    rounded = (score.view(torch.int32) >> 16 << 16).view(torch.float32)
    rounded[rounded == 2**-27] = 0  # the first bin holds all up to there
    found, exact = histogram.levels(), Levels.of(rounded, positive)
    assert_close(found.negatives, exact.negatives, rtol=0, atol=0)
    assert_close(found.positives, exact.positives, rtol=0, atol=0)
    assert found.auroc() == pytest.approx(roc_auc_score(positive, rounded), abs=1e-12)
    assert found.auroc() == pytest.approx(roc_auc_score(positive, score), abs=1e-4)
    assert len(found.negatives) < len(exact.negatives) + 1 <= 4097


def test_histogram_holds_scores_beyond_its_ends():
    histogram = ScoreHistogram()
    histogram.add(torch.tensor([0.0, -0.0, -1e-7, 1e-30, 33.0, 1e30]), torch.tensor([0, 0, 0, 1, 1, 1]).bool())
    levels = histogram.levels()
    assert (levels.negatives.tolist(), levels.positives.tolist()) == ([3, 0], [1, 2])


def adaptive_error(confidence, correct, bins):
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return sum(len(p) * abs(correct[p].mean() - confidence[p].mean()) for p in parts) / len(confidence)


@pytest.mark.parametrize("n", [3, 15, 100, 1001])
def test_adaptive_calibration_error_equals_a_loop_over_equal_parts(n):
    rng = np.random.default_rng(n)
    confidence = rng.beta(5, 1, n)
    correct = rng.random(n) < confidence**3
    found = adaptive_calibration_error(torch.as_tensor(confidence), torch.as_tensor(correct))
    assert found == pytest.approx(adaptive_error(confidence, correct, 15), abs=1e-12)


def test_adaptive_calibration_error_knows_no_order_of_ties():
    confidence = torch.tensor([0.5] * 10 + [1.0] * 20).double()
    correct = torch.arange(30) % 2 == 0  # half of each
    for order in (torch.arange(30), torch.arange(30).flip(0), torch.argsort(correct, stable=True)):
        found = adaptive_calibration_error(confidence[order], correct[order])
        assert found == pytest.approx(20 / 30 * 0.5, abs=1e-12)
