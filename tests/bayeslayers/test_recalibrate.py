from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.recalibrate import _Classes, root_of_increasing

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Scaled(nn.Module):
    """Outputs its input, scaled by an uncertain factor around 1: the data decides what is predicted."""

    def __init__(self, likelihood=None):
        super().__init__()
        self.factor = bl.BayesLinear(1, 1, bias=False, init_precision=30.0)
        nn.init.ones_(self.factor.weight)
        self.likelihood = likelihood

    def forward(self, x):
        return x * self.factor(x.new_ones(1, 1)).squeeze()


def drawn_labels(logits, seed=1):
    """Labels from the softmax of the logits, by Gumbel noise."""
    noise = torch.rand(logits.shape, generator=generator(seed), dtype=logits.dtype)
    return (logits - noise.log().neg().log()).argmax(1)


def case_of(kind, sharpness=2.0, n=400):
    """Logits `sharpness` times as large as those the labels come from."""
    if kind == "classes":
        x = 2 * torch.randn(n, 4, generator=generator())
        return Scaled(), sharpness * x, drawn_labels(x)
    if kind == "segmentation":
        x = 2 * torch.randn(n // 40, 3, 8, 5, generator=generator())
        y = drawn_labels(x)
        y[torch.rand(y.shape, generator=generator(2)) < 0.3] = 255
        return Scaled(), sharpness * x, y
    if kind == "yes or no":
        x = 2 * torch.randn(n, 1, generator=generator())
        y = torch.rand(x.shape, generator=generator(1)) < x.sigmoid()
        return Scaled(bl.Bernoulli()), sharpness * x, y
    x = torch.randn(n, 4, generator=generator())
    noise = torch.randn(n, 2, generator=generator(1))
    return Scaled(bl.Gaussian()), x, x[:, :2] + noise * (x[:, 2:] / 2).exp() * math.sqrt(sharpness)


DISCRETE = ["classes", "segmentation", "yes or no"]
KINDS = [*DISCRETE, "real"]


def nll_of(prediction, y, temperature):
    """Negative log-likelihood of p^(1 / temperature), by numpy."""
    if not prediction.likelihood.discrete:
        mean, variance = (part.double().numpy() for part in (prediction.mean, prediction.total))
        squares = np.square(y.double().numpy() - mean) / variance / temperature
        return 0.5 * (squares + np.log(2 * np.pi * temperature * variance)).sum(1).mean()
    probs = prediction.probs.double()
    if isinstance(prediction.likelihood, bl.Bernoulli):
        probs = torch.stack([(1 - probs).clamp_min(2**-25), probs], 1)
    probs = probs.clamp_min(2.0**-126)
    counted = y != 255
    logits = probs.movedim(1, -1)[counted].log().numpy() / temperature
    return (logsumexp(logits, axis=1) - logits[np.arange(len(logits)), y[counted].long()]).mean()


def fitted(kind, sharpness=2.0):
    model, x, y = case_of(kind, sharpness)
    prediction = bl.predict(model, x, 6, generator=generator(3))
    found = bl.recalibrate(model, (x, y), num_samples=6, generator=generator(3), ignore_index=255)
    return found, prediction, y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharpness", [0.2, 1.0, 3.0, 20.0])
def test_temperature_is_the_least_likelihoods_of_scipy(kind, sharpness):
    found, prediction, y = fitted(kind, sharpness)
    least = minimize_scalar(lambda log: nll_of(prediction, y, math.exp(log)), bracket=(-1, 1), options={"xtol": 1e-10})
    assert found.temperature == pytest.approx(math.exp(least.x), rel=1e-5)
    assert found.nll_after == pytest.approx(least.fun, rel=1e-7)
    assert found.nll_before == pytest.approx(nll_of(prediction, y, 1.0), rel=1e-6)
    assert found.nll_after <= found.nll_before
    assert found.likelihood == prediction.likelihood.name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_recalibrated_stays(kind):
    found, prediction, y = fitted(kind)
    assert abs(math.log(found.temperature)) > 0.1
    again = found.apply(prediction)
    assert nll_of(again, y, 1.0) == pytest.approx(found.nll_after, rel=1e-5)
    least = minimize_scalar(lambda log: nll_of(again, y, math.exp(log)), bracket=(-1, 1), options={"xtol": 1e-10})
    assert math.exp(least.x) == pytest.approx(1.0, abs=1e-4)


def test_labels_from_the_predictions_themselves_give_a_temperature_of_one():
    x = 2 * torch.randn(20_000, 4, generator=generator(), dtype=torch.float64)
    found = bl.recalibrate(Scaled().double(), (x, drawn_labels(x)), method="mean")
    probs = x.softmax(1)
    log_p = probs.log()
    information = ((probs * log_p**2).sum(1) - (probs * log_p).sum(1) ** 2).sum()
    assert abs(1 / found.temperature - 1) * float(information) ** 0.5 < 5
    assert 0 <= found.nll_before - found.nll_after < 25 / 2 / 20_000


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_takes_it(kind):
    model, x, y = case_of(kind)
    found = bl.recalibrate(model, (x, y), method="mean", ignore_index=255)
    before = bl.evaluate(model, (x, y), method="mean", ignore_index=255)
    after = bl.evaluate(model, (x, y), method="mean", ignore_index=255, recalibration=found)
    assert before.metrics["nll"] == pytest.approx(found.nll_before, rel=1e-6)
    assert after.metrics["nll"] == pytest.approx(found.nll_after, rel=1e-6)
    if kind != "real":
        assert after.metrics["ece"] < before.metrics["ece"]
        assert after.metrics["accuracy"] == before.metrics["accuracy"]


def test_batches_give_the_same():
    model, x, y = case_of("classes")
    whole = bl.recalibrate(model, (x, y), method="mean")
    parts = bl.recalibrate(model, list(zip(x.split(7), y.split(7), strict=True)), method="mean")
    assert parts.temperature == pytest.approx(whole.temperature, rel=1e-9)
    assert (parts.nll_before, parts.nll_after) == pytest.approx((whole.nll_before, whole.nll_after), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_applied_it_is_the_distribution_to_a_power(kind, temperature):
    _, prediction, _ = fitted(kind)
    found = bl.Recalibration(prediction.likelihood.name, temperature).apply(prediction)
    assert_close(found.total, found.aleatoric + found.epistemic)
    assert (found.aleatoric >= 0).all() and (found.epistemic >= 0).all()
    assert_close(found.epistemic * prediction.total, prediction.epistemic * found.total, rtol=1e-4, atol=1e-9)
    if temperature == 1:
        for name in ("mean", "total", "aleatoric", "epistemic"):
            assert_close(getattr(found, name), getattr(prediction, name), rtol=1e-4, atol=1e-6)
    if kind == "real":
        # N(m, v)^(1 / t) is N(m, t v), renormalised.
        assert_close(found.mean, prediction.mean)
        assert_close(found.total, temperature * prediction.total)
        assert_close(found.standard_error, prediction.standard_error)
        return
    probs = prediction.probs.double()
    power = probs ** (1 / temperature)
    rest = (
        (1 - probs).clamp_min(2**-25) ** (1 / temperature) + power
        if kind == "yes or no"
        else power.sum(1, keepdim=True)
    )
    assert_close(found.probs, (power / rest).float(), rtol=1e-5, atol=1e-7)
    assert torch.equal(found.labels, prediction.labels)
    parts = (found.probs, 1 - found.probs) if kind == "yes or no" else found.probs.unbind(1)
    assert_close(found.total, sum(torch.special.entr(part) for part in parts), rtol=1e-5, atol=1e-6)
    assert found.standard_error.isnan().all()


def test_certain_predictions_can_be_recalibrated():
    x = torch.tensor([[500.0, 0.0], [0.0, 500.0], [500.0, 0.0], [300.0, 0.0]])
    found = bl.recalibrate(Scaled(), (x, torch.tensor([0, 1, 1, 0])), method="mean")
    # log(1 / tiny) / t is the logit of 3 / 4.
    assert found.temperature == pytest.approx(-math.log(torch.finfo(torch.float32).tiny) / math.log(3), rel=1e-5)
    applied = found.apply(bl.predict(Scaled(), x, method="mean"))
    assert_close(applied.confidence, torch.full((4,), 0.75))
    assert_close(applied.total, applied.aleatoric)


def test_uniform_predictions_have_no_better_temperature():
    found = bl.recalibrate(Scaled(), (torch.zeros(6, 4), torch.arange(6) % 4), method="mean")
    assert found.temperature == 1.0 and found.nll_after == found.nll_before == pytest.approx(math.log(4))


def test_slope_and_curvature_are_derivatives():
    _, prediction, y = fitted("classes")
    classes = _Classes(None)
    classes.add(prediction, y)
    for b in (0.3, 1.0, 2.5):
        power = torch.tensor(b, dtype=torch.float64, requires_grad=True)
        loss = nn.functional.cross_entropy(power * prediction.probs.log().double(), y)
        (slope,) = torch.autograd.grad(loss, power, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, power)
        assert classes.slope(b) == pytest.approx((slope.item(), curvature.item()), rel=1e-5)


@pytest.mark.parametrize("root", [1e-6, 0.02, 0.9, 1.0, 3.0, 1e5])
@pytest.mark.parametrize(
    "function",
    [lambda u: (u, 1.0), lambda u: (math.tanh(u), 1 - math.tanh(u) ** 2), lambda u: (u**3, 3 * u**2)],
    ids=["line", "flat ends", "flat root"],
)
def test_root(function, root):
    def of(x):
        value, derivative = function(math.log(x / root))
        return value, derivative / x

    assert root_of_increasing(of) == pytest.approx(root, rel=1e-8)


X, Y = case_of("classes")[1:]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data": []}, ValueError, "data must hold at least one batch"),
        ({"data": (X, Y[:5])}, ValueError, r"target must have the shape \(400,\), got \(5,\)"),
        ({"data": (X, Y + 9)}, ValueError, "target must hold classes from 0 to 3"),
        ({"data": (X, 0 * Y - 1), "ignore_index": -1}, ValueError, "must hold labels that count"),
        ({"data": (X, X.argmax(1))}, ValueError, "must hold a label that is not the predicted one, got none"),
        ({"data": (X, X.argmin(1))}, ValueError, "must be more probable than chance, got labels that are not"),
        ({"data": (X, X), "likelihood": bl.Gaussian(1.0)}, ValueError, "target must differ from the predictions"),
        ({"model": nn.Linear(4, 4), "method": None}, ValueError, "model must have Bayesian layers"),
        ({"num_samples": -1}, ValueError, "num_samples must be an integer >= 1, got -1"),
    ],
)
def test_bad_input_is_one_sentence(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        bl.recalibrate(**{"model": Scaled(), "data": (X, Y), "method": "mean"} | arguments)
    assert "\n" not in str(caught.value)


def test_a_temperature_is_for_its_likelihood():
    with pytest.raises(ValueError, match=r"prediction must be gaussian, .* got categorical"):
        bl.Recalibration("gaussian", 2.0).apply(bl.predict(Scaled(), X, 2))
    with pytest.raises(ValueError, match=r"temperature must be a finite number > 0, got 0\.0"):
        bl.Recalibration("categorical", 0.0)
