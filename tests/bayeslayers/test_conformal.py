from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Fixed(nn.Module):
    """Outputs its input; its one uncertain weight has no effect."""

    def __init__(self, likelihood=None):
        super().__init__()
        self.weight = bl.BayesLinear(1, 1, bias=False)
        self.likelihood = likelihood

    def forward(self, x):
        return x + 0 * self.weight(x.new_ones(1, 1)).squeeze()


def drawn(kind, n, seed):
    """Return a model, inputs and targets: the model is far too confident."""
    source = generator(seed)
    x = 2 * torch.randn(n, 5, generator=source)
    noise = torch.rand(n, 5, generator=source)
    if kind == "classes":
        return Fixed(), 3 * x, (x - noise.log().neg().log()).argmax(1)
    if kind == "binary":
        return Fixed(bl.Bernoulli()), 3 * x[:, 0], (noise[:, 0] < x[:, 0].sigmoid()).long()
    residual = 3 * torch.randn(n, 2, generator=source) * (x[:, 2:4] / 2).exp()
    return Fixed(bl.Gaussian()), x[:, :4], x[:, :2] + residual


def predict(model, x):
    return bl.predict(model, x, 2, generator=generator())


CASES = [
    ("classes", "lac"),
    ("classes", "aps"),
    ("binary", "lac"),
    ("binary", "aps"),
    ("real", "scaled"),
    ("real", "cqr"),
]


@pytest.mark.parametrize(("kind", "score"), CASES)
@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_coverage_is_the_guaranteed_one_on_average_over_calibration_sets(kind, score, alpha):
    n, repeats = 59, 120
    model, x, y = drawn(kind, n * repeats + 2000, seed=3)
    prediction = predict(model, x[-2000:])
    covered = []
    for i in range(repeats):
        part = slice(i * n, (i + 1) * n)
        fit = bl.conformal(model, (x[part], y[part]), alpha=alpha, score=score, num_samples=2, generator=generator(i))
        covered.append(fit.measure(prediction, y[-2000:], generator(i))["coverage"])
    expected = math.ceil((n + 1) * (1 - alpha)) / (n + 1)  # 1 - alpha at both alphas: scores have no ties
    error = torch.tensor(covered).std().item() / math.sqrt(repeats) + math.sqrt(alpha * (1 - alpha) / 2000)
    assert abs(sum(covered) / repeats - expected) < 5 * error


def test_the_threshold_is_the_order_statistic_of_the_scores():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.8, 0.15, 0.05]])
    y = torch.tensor([0, 1, 2, 0])  # scores 0.3, 0.7, 0.9, 0.2
    fit = bl.conformal(Fixed(), (probs.log(), y), alpha=0.4, num_samples=1)
    assert fit == bl.ConformalFit("categorical", "lac", 0.4, fit.threshold, 4)
    assert fit.threshold == pytest.approx(0.7, abs=1e-6)  # the third of four
    shown = bl.predict(Fixed(), torch.tensor([[0.45, 0.35, 0.2], [0.25, 0.5, 0.25]]).log(), 1)
    assert fit.sets(shown).tolist() == [[True, True, False], [False, True, False]]


def test_aps_counts_more_probable_classes_and_a_random_share_of_the_own():
    probs = torch.tensor([[0.5, 0.2, 0.3]])
    prediction = bl.predict(Fixed(), probs.log(), 1)
    u = torch.rand(1, 1, dtype=torch.float64, generator=generator(7)).item()
    for threshold, expected in [
        (0.5 * u - 1e-6, [False, False, False]),
        (0.5 * u + 1e-6, [True, False, False]),
        (0.5 + 0.3 * u + 1e-6, [True, False, True]),
        (0.8 + 0.2 * u + 1e-6, [True, True, True]),
    ]:
        fit = bl.ConformalFit("categorical", "aps", 0.1, threshold, 50)
        assert fit.sets(prediction, generator=generator(7)).tolist() == [expected]


def test_an_empty_set_gets_the_most_probable_class_on_request():
    prediction = bl.predict(Fixed(), torch.tensor([[0.4, 0.6], [0.05, 0.95]]).log(), 1)
    fit = bl.ConformalFit("categorical", "lac", 0.2, 0.1, 50)
    assert fit.sets(prediction).tolist() == [[False, False], [False, True]]
    assert fit.sets(prediction, nonempty=True).tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize("score", ["scaled", "cqr"])
def test_intervals_follow_their_formulas(score):
    prediction = bl.predict(Fixed(bl.Gaussian()), torch.tensor([[1.0, 2.0], [0.0, -2.0]]), 1)
    deviation = prediction.total.sqrt()
    fit = bl.ConformalFit("gaussian", score, 0.1, 0.5, 50)
    low, high = fit.intervals(prediction)
    half = 0.5 * deviation if score == "scaled" else prediction.quantile(0.95) - prediction.mean + 0.5
    assert_close(high, prediction.mean + half)
    assert_close(low, prediction.mean - half)
    narrow = bl.ConformalFit("gaussian", "cqr", 0.1, -100.0, 50)
    assert_close(narrow.intervals(prediction), (prediction.mean, prediction.mean))


def test_all_elements_of_a_target_lie_in_their_intervals_together():
    model, x, y = drawn("real", 4000, seed=5)
    fit = bl.conformal(model, (x[:2000], y[:2000]), num_samples=2)
    low, high = fit.intervals(predict(model, x[2000:]))
    inside = (low <= y[2000:]) & (y[2000:] <= high)
    assert abs(inside.all(1).double().mean() - 0.9) < 0.03
    assert inside.double().mean() > 0.93
    measured = fit.measure(predict(model, x[2000:]), y[2000:])
    assert measured["coverage"] == pytest.approx(float(inside.all(1).double().mean()))
    assert measured["mean_width"] == pytest.approx(float((high - low).double().mean()))


def test_wrong_input_is_named():
    model, x, y = drawn("classes", 8, seed=1)
    with pytest.raises(ValueError, match=r"at least 9 examples for alpha=0\.1, got 8"):
        bl.conformal(model, (x, y))
    with pytest.raises(ValueError, match="score must be 'lac' or 'aps' for classes, got 'cqr'"):
        bl.conformal(model, (x, y), score="cqr")
    for alpha in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="alpha must be in"):
            bl.conformal(model, (x, y), alpha=alpha)
    with pytest.raises(ValueError, match="one label per example"):
        bl.conformal(Fixed(), (torch.randn(9, 3, 4, 4), torch.zeros(9, 4, 4, dtype=torch.long)))
    with pytest.raises(ValueError, match="threshold must be finite, got nan"):
        bl.ConformalFit("gaussian", "cqr", 0.1, math.nan, 5)
    fit = bl.conformal(model, (x, y), alpha=0.5)
    with pytest.raises(ValueError, match="must be categorical, as those of the calibration, got gaussian"):
        fit.sets(bl.predict(Fixed(bl.Gaussian()), torch.zeros(2, 2), 1))
    with pytest.raises(ValueError, match="intervals must not be asked of a categorical prediction"):
        fit.intervals(bl.predict(Fixed(), x, 1))
    with pytest.raises(ValueError, match="sets must not be asked of a gaussian prediction"):
        bl.ConformalFit("gaussian", "scaled", 0.1, 1.0, 5).sets(bl.predict(Fixed(bl.Gaussian()), torch.zeros(2, 2), 1))
