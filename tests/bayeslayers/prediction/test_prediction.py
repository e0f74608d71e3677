from __future__ import annotations

import json
import math
import sys
from io import StringIO

import pytest
import torch
from rich.console import Console
from scipy import stats
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.prediction.result import joined


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def classes(*shape):
    """A categorical prediction whose probabilities are random."""
    probs = torch.rand(*shape, generator=generator()).double().softmax(1)
    total = torch.special.entr(probs).sum(1)
    return bl.Prediction(probs, total, total / 2, total / 2, torch.zeros_like(probs), 7, bl.Categorical())


def yes_or_no(*probs):
    p = torch.tensor(probs, dtype=torch.float64)
    return bl.Prediction(p, p, p, p, torch.zeros_like(p), 7, bl.Bernoulli())


def real():
    mean, variance = torch.tensor([[1.0], [-2.0], [0.0]]), torch.tensor([[4.0], [0.25], [1.0]])
    parts = [part.double() for part in (mean, variance, variance / 4, 3 * variance / 4, variance / 10)]
    return bl.Prediction(*parts, 7, bl.Gaussian())


class Draws(torch.nn.Module):
    """A network whose outputs are given, one draw after the other; its one weight moves nothing."""

    def __init__(self, outputs, likelihood):
        super().__init__()
        self.layer, self.outputs, self.likelihood = bl.BayesLinear(1, 1), iter(outputs), likelihood

    def forward(self, x):
        return next(self.outputs)


def predicted(outputs, likelihood):
    x = torch.zeros(len(outputs[0]), 1)
    return bl.predict(Draws(outputs, likelihood), x, len(outputs), sample_chunk=1)


def test_known_classes_have_known_entropies():
    certain, torn = [50.0, 0.0, 0.0], [0.0, 0.0, -50.0]
    draws = torch.tensor([[certain, torn], [[0.0, 50.0, 0.0], torn]], dtype=torch.float64)
    found = predicted(draws, bl.Categorical())
    # The first example's draws are each sure of another class, the second's agree that two are possible.
    assert_close(found.total, torch.full((2,), math.log(2), dtype=torch.float64))
    assert_close(found.aleatoric, torch.tensor([0, math.log(2)], dtype=torch.float64))
    assert_close(found.epistemic, torch.tensor([math.log(2), 0], dtype=torch.float64))


def test_known_bernoullis_have_known_entropies_per_pixel():
    draws = torch.tensor([[[[50.0, 0.0]]], [[[-50.0, 0.0]]]], dtype=torch.float64)
    found = predicted(draws, bl.Bernoulli())
    assert found.total.shape == (1, 1, 2)
    assert_close(found.total, torch.full((1, 1, 2), math.log(2), dtype=torch.float64))
    assert_close(found.aleatoric[0, 0], torch.tensor([0, math.log(2)], dtype=torch.float64))


def test_known_gaussians_have_known_variances():
    means, variances = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.5, 1.0, 1.5])
    draws = torch.stack([means, variances.log()], 1)[:, None]
    found = predicted(draws, bl.Gaussian())
    assert_close([float(found.mean), float(found.aleatoric), float(found.epistemic)], [3.0, 1.0, 8 / 3])
    assert_close(found.total, found.aleatoric + found.epistemic)
    assert_close(float(found.standard_error), math.sqrt(4 / 3))


@pytest.mark.parametrize("shape", [(5, 6), (2, 6, 3, 4)])
def test_top_k_are_the_greatest_probabilities(shape):
    prediction = classes(*shape)
    values, labels = prediction.top_k(3)
    order = prediction.probs.argsort(1, descending=True)[:, :3]
    assert torch.equal(labels, order)
    assert_close(values, prediction.probs.gather(1, order))
    assert torch.equal(labels[:, 0], prediction.labels)


@pytest.mark.parametrize("shape", [(50, 6), (2, 6, 3, 4)])
@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.5, 0.9])
def test_a_credible_set_is_the_smallest_that_is_probable_enough(shape, alpha):
    prediction = classes(*shape)
    chosen, probs = prediction.credible_set(alpha), prediction.probs
    assert chosen.shape == probs.shape and chosen.dtype == torch.bool
    held = torch.where(chosen, probs, 0).sum(1)
    least = torch.where(chosen, probs, math.inf).amin(1)
    assert (held > 1 - alpha - 1e-9).all()
    assert (held - least < 1 - alpha).all()  # without its least probable class it would not do
    assert (torch.where(chosen, 0, probs).amax(1) <= least).all()


def test_a_credible_set_of_a_certain_prediction():
    probs = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    prediction = bl.Prediction(probs, *[probs[:, 0]] * 3, probs, 1, bl.Categorical())
    assert prediction.credible_set(0.0).tolist() == [[True, False], [True, True]]


def test_quantiles_are_those_of_the_gaussian():
    prediction = real()
    found = prediction.quantile([0.025, 0.5, 0.9])
    for row, q in zip(found, (0.025, 0.5, 0.9), strict=True):
        expected = stats.norm.ppf(q, prediction.mean.numpy(), prediction.total.sqrt().numpy())
        assert_close(row.numpy(), expected)
        assert_close(prediction.quantile(q), row)
    assert found.shape == (3, 3, 1)


def test_abstaining_by_threshold():
    assert yes_or_no(0.1, 0.6, 0.95).abstain(0.85).tolist() == [False, True, False]
    prediction = classes(9, 4)
    assert torch.equal(prediction.abstain(threshold=0.3), prediction.confidence < 0.3)
    assert not prediction.abstain(0.0).any() and prediction.abstain(1.1).all()
    assert real().abstain(0.5).flatten().tolist() == [True, False, True]


@pytest.mark.parametrize(("coverage", "kept"), [(1.0, 60), (0.5, 30), (0.01, 1), (1e-9, 0)])
def test_abstaining_by_coverage_keeps_the_most_confident(coverage, kept):
    prediction = classes(10, 4, 2, 3)
    abstains = prediction.abstain(coverage=coverage)
    assert abstains.shape == (10, 2, 3) and int((~abstains).sum()) == kept
    if 0 < kept < 60:
        assert prediction.confidence[~abstains].min() >= prediction.confidence[abstains].max()


def test_among_equals_the_earlier_are_answered():
    assert yes_or_no(0.9, 0.1, 0.9, 0.9).abstain(coverage=0.5).tolist() == [False, False, True, True]
    assert real().abstain(coverage=1 / 3).flatten().tolist() == [True, False, True]


@pytest.mark.parametrize("prediction", [classes(3, 4), classes(2, 4, 2, 2), yes_or_no(0.2, 0.9), real()])
def test_a_dictionary_is_ready_for_json(prediction):
    found = json.loads(json.dumps(prediction.to_dict(), allow_nan=False))
    for name in ("mean", "total", "aleatoric", "epistemic", "standard_error"):
        assert_close(torch.tensor(found[name], dtype=torch.float64), getattr(prediction, name))
    assert (found["likelihood"], found["num_samples"]) == (prediction.likelihood.name, 7)
    assert ("labels" in found) == prediction.likelihood.discrete


def test_nan_is_none_in_a_dictionary():
    prediction = bl.predict(bl.BayesLinear(2, 2), torch.zeros(1, 2), 1)
    assert prediction.to_dict()["standard_error"] == [[None, None]]


def test_pandas_has_a_row_per_example():
    pandas = pytest.importorskip("pandas")
    prediction = classes(3, 4)
    frame = prediction.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and frame.index.name == "example"
    assert [*frame] == ["label", "confidence", "total", "aleatoric", "epistemic", *(f"prob_{k}" for k in range(4))]
    assert_close(torch.tensor(frame[[f"prob_{k}" for k in range(4)]].to_numpy()), prediction.probs)
    assert frame["label"].tolist() == prediction.labels.tolist()
    dense = classes(2, 4, 3, 5).to_pandas()
    assert len(dense) == 30 and dense.index.names == ["example", "position_1", "position_2"]
    assert dense.loc[(1, 2, 4), "confidence"] == float(classes(2, 4, 3, 5).confidence[1, 2, 4])
    assert [*real().to_pandas()] == ["mean", "total", "aleatoric", "epistemic", "standard_error"]
    assert real().to_pandas()["mean"].tolist() == [1.0, -2.0, 0.0]
    assert yes_or_no(0.2, 0.9).to_pandas()["prob"].tolist() == [0.2, 0.9]


def test_pandas_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_pandas needs pandas"):
        real().to_pandas()


def text_of(table):
    console = Console(width=120, file=StringIO())
    console.print(table)
    return console.file.getvalue()


def test_a_prediction_prints_as_a_table():
    prediction = classes(3, 4)
    text = text_of(prediction)
    assert str(prediction).splitlines()[0].startswith("┏") and "3 examples, 7 samples." in str(prediction)
    assert "categorical, 3 examples, 7 samples." in text and f"{float(prediction.confidence[1]):.4f}" in text
    named = text_of(prediction.table(["ant", "bee", "cat", "dog"]))
    assert ["ant", "bee", "cat", "dog"][int(prediction.labels[0])] in named
    assert "The first 20." in text_of(classes(30, 4))
    assert f"{float(real().mean[1]):.4f}" in text_of(real())
    dense = classes(2, 4, 3, 5)
    assert f"{float(dense.confidence[1].mean()):.4f}" in text_of(dense)


def test_parts_join_in_their_order():
    parts = [bl.predict(bl.BayesLinear(2, 3), torch.zeros(n, 2), s) for n, s in ((2, 4), (3, 9))]
    whole = joined(parts)
    assert whole.num_samples == 9 and whole.samples_per_batch == (4, 9) and len(whole) == 5
    assert torch.equal(whole.probs[2:], parts[1].probs)
    assert torch.equal(whole.to("cpu").probs, whole.probs)


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda: real().top_k(1), AttributeError, "top_k: a gaussian prediction has no classes"),
        (lambda: yes_or_no(0.5).credible_set(), AttributeError, "credible_set: a bernoulli prediction has no classes"),
        (
            lambda: classes(2, 3).quantile(0.5),
            AttributeError,
            "quantile: a categorical prediction has probabilities, not quantiles",
        ),
        (lambda: classes(2, 3).top_k(4), ValueError, "k must be at most the number of classes, 3, got 4"),
        (lambda: classes(2, 3).top_k(0), ValueError, "k must be an integer >= 1, got 0"),
        (lambda: classes(2, 3).credible_set(1.0), ValueError, r"alpha must be in \[0, 1\), got 1.0"),
        (lambda: real().quantile(1.0), ValueError, r"q must be in \(0, 1\), a number or a sequence of them, got 1.0"),
        (lambda: real().abstain(), ValueError, "either threshold or coverage, got threshold=None, coverage=None"),
        (lambda: real().abstain(0.1, coverage=0.5), ValueError, "either threshold or coverage, got threshold=0.1"),
        (lambda: real().abstain(coverage=0.0), ValueError, r"coverage must be in \(0, 1\], got 0.0"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(ask, error, message):
    with pytest.raises(error, match=message):
        ask()


@pytest.mark.parametrize(("samples", "shape"), [(5, (6, 2)), (40, (3, 4))])
def test_log_prob_is_that_of_the_mixture_of_all_samples(samples, shape):
    outputs = torch.randn(samples, *shape, generator=generator()).double()
    target = torch.randn(shape[0], shape[1] // 2, generator=generator(1)).double()
    model, x = Draws(outputs, bl.Gaussian()), torch.zeros(shape[0], 1)
    prediction = bl.predict(model, x, samples, target=target, sample_chunk=1)
    mean, log_variance = outputs.chunk(2, 2)
    law = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = law.log_prob(target).sum(2).exp().mean(0).log()
    assert_close(prediction.log_prob, expected)
    assert_close(joined([prediction, prediction]).log_prob, torch.cat([expected, expected]))
    assert bl.predict(Draws(outputs, bl.Gaussian()), x, samples, sample_chunk=1).log_prob is None


@pytest.mark.parametrize(
    ("x", "target", "likelihood", "error"),
    [
        (torch.zeros(3, 1), torch.zeros(3), bl.Categorical(), "got one for a categorical likelihood"),
        ([torch.zeros(3, 1)], torch.zeros(3, 1), bl.Gaussian(1.0), "got one for an iterable of batches"),
        (torch.zeros(3, 1), torch.zeros(2, 1), bl.Gaussian(1.0), "a row for each of the 3 examples, got 2"),
    ],
)
def test_a_target_that_does_not_fit_is_rejected(x, target, likelihood, error):
    with pytest.raises(ValueError, match=error):
        bl.predict(bl.BayesLinear(1, 1), x, 2, likelihood=likelihood, target=target)
