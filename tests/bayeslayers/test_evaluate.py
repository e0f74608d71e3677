from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats
from sklearn.metrics import brier_score_loss, jaccard_score, log_loss, roc_auc_score, roc_curve
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_calibration_error,
    multiclass_jaccard_index,
)

import bayeslayers as bl
from bayeslayers.metrics import adaptive_calibration_error, classification_metrics, gaussian_crps, gaussian_nll

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Scaled(nn.Module):
    """Outputs its input, scaled by an uncertain factor around 1: the data decides what is predicted."""

    def __init__(self, likelihood=None, precision=30.0):
        super().__init__()
        self.factor = bl.BayesLinear(1, 1, bias=False, init_precision=precision)
        nn.init.ones_(self.factor.weight)
        self.likelihood = likelihood

    def forward(self, x):
        return x * self.factor(x.new_ones(1, 1)).squeeze()


def logits_of(case, n=200, num_classes=4):
    """Logits and labels that are right more often where the logits are sure."""
    x = 3 * torch.randn(n, num_classes, generator=generator())
    y = (x / 2 - torch.rand(x.shape, generator=generator(1)).log().neg().log()).argmax(1)  # Gumbel: soft labels
    if case == "ties":
        x = x.round()
    elif case == "exactly 0 or 1":
        x = 300 * F.one_hot(x.argmax(1), num_classes).float()
    elif case == "one class absent":
        y[y == 2] = 1
    elif case == "empty bins":
        x = 0.01 * x
    elif case == "all right":
        y = x.argmax(1)
    elif case == "all wrong":
        y = x.argmin(1)
    elif case == "one example":
        x, y = x[:1], y[:1]
    return x, y


CASES = ["plain", "ties", "exactly 0 or 1", "one class absent", "empty bins", "all right", "all wrong", "one example"]


def calibration_error(probs, target):
    """That of torchmetrics, whose confidence of exactly 1 has a bin of its own without the next number below 1."""
    return float(multiclass_calibration_error(probs.clamp_max(1 - 1e-12), target, probs.shape[1], n_bins=15))


def classwise(probs, target):
    hits = F.one_hot(target, probs.shape[1])
    errors = [binary_calibration_error(p.clamp_max(1 - 1e-12), h) for p, h in zip(probs.T, hits.T, strict=True)]
    return float(torch.stack(errors).mean())


def ranking(score, positive):
    if positive.min() == positive.max():
        return math.nan, math.nan
    rates, recalls, _ = roc_curve(positive, score, drop_intermediate=False)
    return roc_auc_score(positive, score), rates[np.argmax(recalls >= 0.95)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["sample", "mean"])
def test_classes_equal_the_references(case, method):
    x, y = logits_of(case)
    model = Scaled()
    found = bl.evaluate(model, (x, y), num_samples=5, generator=generator(2), method=method)
    prediction = bl.predict(model, x, 5, generator=generator(2), method=method)
    probs, correct = prediction.probs.double(), (prediction.labels == y).numpy()
    expected = {
        "accuracy": correct.mean(),
        "nll": -probs.clamp_min(2.0**-126).log()[torch.arange(len(y)), y].mean(),
        "brier": np.square(probs.numpy() - np.eye(4)[y]).sum(1).mean(),
        "ece": calibration_error(probs, y),
        "adaptive_ece": adaptive_calibration_error(prediction.confidence, torch.as_tensor(correct)),
        "classwise_ece": classwise(probs, y),
    }
    scores = -prediction.confidence, prediction.total, prediction.epistemic
    for name, score in zip(("confidence", "entropy", "epistemic"), scores, strict=True):
        auroc, rate = ranking(score.numpy(), ~correct)
        expected |= {f"misclassification_auroc_{name}": auroc, f"misclassification_fpr95_{name}": rate}
    for key, value in expected.items():
        assert found.metrics[key] == pytest.approx(float(value), abs=1e-7, nan_ok=True), key
    assert {k: found.metrics[k] for k in ("accuracy", "nll", "brier", "ece")} == pytest.approx(
        classification_metrics(prediction, y)
    )
    assert 0 <= found.metrics["aurc"] <= 1
    assert found.metrics["coverage_at_risk_0.1"] == found.risk_coverage.coverage_at(0.1)
    assert (found.likelihood, found.num_examples, found.num_samples) == ("categorical", len(y), prediction.num_samples)


def test_a_label_that_was_held_impossible_has_the_likelihood_of_the_smallest_float():
    x, y = torch.tensor([[300.0, 0.0], [300.0, 0.0]]), torch.tensor([0, 1])
    found = bl.evaluate(Scaled(), (x, y), method="mean").metrics
    assert found["nll"] == pytest.approx(-math.log(torch.finfo(torch.float32).tiny) / 2)
    assert found["brier"] == pytest.approx(1.0)


def test_a_no_to_a_certain_yes_has_the_likelihood_that_rounds_off():
    x, y = torch.tensor([[40.0], [40.0], [-80.0]]), torch.tensor([[1], [0], [1]])
    found = bl.evaluate(Scaled(bl.Bernoulli()), (x, y), method="mean").metrics
    assert found["nll"] == pytest.approx((25 * math.log(2) + 80) / 3)
    assert found["brier"] == pytest.approx(2 / 3)


def test_scores_are_those_of_the_prediction():
    x, y = logits_of("plain")
    found = bl.evaluate(Scaled(), (x, y), num_samples=5, generator=generator(2))
    prediction = bl.predict(Scaled(), x, 5, generator=generator(2))
    names = {"confidence": "confidence", "entropy": "total", "epistemic": "epistemic", "aleatoric": "aleatoric"}
    for key, name in names.items():
        assert_close(found.scores[key], getattr(prediction, name))
    assert torch.equal(found.scores["correct"], prediction.labels == y)
    assert found.class_iou is None


def test_reliability_is_the_calibration_error_taken_apart():
    x, y = logits_of("plain")
    found = bl.evaluate(Scaled(), (x, y), num_samples=5)
    bins = found.reliability
    gaps = bins.count / len(y) * (bins.accuracy - bins.confidence).abs()
    assert float(gaps.nansum()) == pytest.approx(found.metrics["ece"])
    assert bins.count.sum() == len(y) and bins.edges.shape == (16,)
    assert torch.equal(bins.accuracy.isnan(), bins.count == 0) and (bins.count == 0).any()
    inside = bins.count > 0
    assert ((bins.edges[:-1] <= bins.confidence) & (bins.confidence <= bins.edges[1:]))[inside].all()


def batched(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


KINDS = {
    "classes": (None, (60, 4), (60,), 4),
    "segmentation": (None, (12, 3, 5, 4), (12, 5, 4), 3),
    "yes or no": (bl.Bernoulli(), (60, 1), (60, 1), 2),
    "several yes or no": (bl.Bernoulli(), (20, 6), (20, 6), 2),
    "real": (bl.Gaussian(0.3), (60, 1), (60, 1), None),
    "several real": (bl.Gaussian(), (20, 6), (20, 3), None),
}


def case_of(kind):
    likelihood, inputs, targets, num_classes = KINDS[kind]
    x = torch.randn(inputs, generator=generator(3))
    if num_classes is None:
        return Scaled(likelihood), x, torch.randn(targets, generator=generator(4))
    return Scaled(likelihood), x, torch.randint(num_classes, targets, generator=generator(4))


def same(a, b):
    assert a.metrics == pytest.approx(b.metrics, abs=1e-7, nan_ok=True)
    for part in ("scores", "ood"):
        assert_close(getattr(a, part), getattr(b, part), equal_nan=True)
    for part in ("reliability", "risk_coverage"):
        if getattr(a, part) is not None:
            assert_close(vars(getattr(a, part)), vars(getattr(b, part)), equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_size_and_kind_give_the_same(kind):
    model, x, y = case_of(kind)
    whole = bl.evaluate(model, (x, y), ood={"far": 3 * x}, method="mean")
    for size in (1, 7, 100):
        same(bl.evaluate(model, batched(x, y, size), ood={"far": (3 * x).split(size)}, method="mean"), whole)
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    far = DataLoader(TensorDataset(3 * x), batch_size=8)
    same(bl.evaluate(model, loader, ood={"far": far}, method="mean"), whole)
    same(bl.evaluate(model, iter(batched(x, y, 9)), ood={"far": [(3 * x, y)]}, method="mean"), whole)
    assert whole.num_examples == len(x)
    assert all(len(score) == len(x) and score.device.type == "cpu" for score in whole.scores.values())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_generator_decides(kind):
    model, x, y = case_of(kind)
    before = copy.deepcopy(model.state_dict())
    runs = [
        bl.evaluate(model, batched(x, y, 6), ood={"far": x}, num_samples=3, generator=generator(s)) for s in (0, 0, 1)
    ]
    same(runs[0], runs[1])
    assert runs[0].metrics != runs[2].metrics
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def dense(ignored=True):
    x = 2 * torch.randn(6, 5, 11, 13, generator=generator(5))
    y = (x + 2 * torch.randn(x.shape, generator=generator(6)))[:, :4].argmax(1)  # class 4 is absent
    if ignored:
        y[torch.rand(y.shape, generator=generator(7)) < 0.2] = 255
        y[2] = 255
    return x, y


@pytest.mark.parametrize("ignore_index", [255, -100, None, 1])
def test_segmentation_equals_the_references(ignore_index):
    x, y = dense(ignored=ignore_index in (255, -100))
    y[y == 255] = ignore_index or 0
    found = bl.evaluate(Scaled(), batched(x, y, 4), num_samples=4, method="mean", ignore_index=ignore_index)
    prediction = bl.predict(Scaled(), x, method="mean")
    counted = (y != ignore_index) if ignore_index is not None else torch.ones_like(y).bool()
    probs, labels = prediction.probs.double().movedim(1, -1)[counted], y[counted]
    correct = prediction.labels[counted] == labels
    metrics = found.metrics
    assert metrics["accuracy"] == pytest.approx(float(correct.double().mean()))
    assert metrics["nll"] == pytest.approx(-float(probs.log()[torch.arange(len(labels)), labels].mean()))
    assert metrics["brier"] == pytest.approx(np.square(probs.numpy() - np.eye(5)[labels]).sum(1).mean())
    ece = multiclass_calibration_error(prediction.probs.double(), y, 5, n_bins=15, ignore_index=ignore_index)
    assert metrics["ece"] == pytest.approx(float(ece))
    assert metrics["classwise_ece"] == pytest.approx(classwise(probs, labels))
    # torchmetrics gives the ignored class, where it is one of them, an IoU of 0 and a part in the mean.
    classes = list(range(5))
    predicted = prediction.labels[counted]
    iou = jaccard_score(labels, predicted, labels=classes, average=None, zero_division=0)
    assert_close(found.class_iou.double().numpy(), iou, rtol=1e-6, atol=0)
    assert metrics["miou"] == pytest.approx(float(multiclass_jaccard_index(predicted, labels, 5)), abs=1e-6)
    for name, score in {"confidence": 1 - prediction.confidence, "entropy": prediction.total}.items():
        rounded = (score[counted].view(torch.int32) >> 16 << 16).view(torch.float32)
        auroc, rate = ranking(rounded.numpy(), ~correct.numpy())
        assert metrics[f"misclassification_auroc_{name}"] == pytest.approx(auroc, abs=1e-9)
        assert metrics[f"misclassification_fpr95_{name}"] == pytest.approx(rate, abs=1e-9)
        assert auroc == pytest.approx(roc_auc_score(~correct, score[counted]), abs=1e-3)
    assert metrics["misclassification_auroc_epistemic"] == 0.5  # the means know no ignorance
    assert "adaptive_ece" not in metrics


def test_a_class_without_positions_has_no_intersection_over_union():
    x, y = dense(ignored=False)
    x[:, 4] = -50.0
    found = bl.evaluate(Scaled(), (x, y), method="mean")
    assert torch.equal(found.class_iou.isnan(), torch.tensor([False] * 4 + [True]))
    assert found.metrics["miou"] == pytest.approx(float(found.class_iou[:4].mean()))
    predicted = bl.predict(Scaled(), x, method="mean").labels
    assert found.metrics["miou"] == pytest.approx(float(multiclass_jaccard_index(predicted, y, 5)), abs=1e-6)
    assert found.to_dict()["class_iou"][4] is None


def test_scores_of_a_segmentation_are_means_over_positions():
    x, y = dense()
    found = bl.evaluate(Scaled(), (x, y), num_samples=4, generator=generator(1), ignore_index=255)
    prediction = bl.predict(Scaled(), x, 4, generator=generator(1))
    assert_close(found.scores["entropy"], prediction.total.mean((1, 2)))
    assert_close(found.scores["confidence"], prediction.confidence.mean((1, 2)))
    right, counted = prediction.labels == y, y != 255
    share = torch.stack([r[c].float().mean() for r, c in zip(right, counted, strict=True)])
    assert_close(found.scores["correct"], share, equal_nan=True)
    assert share.isnan().tolist() == [False, False, True, False, False, False]
    assert found.num_examples == 6


def test_large_maps_are_taken_apart_in_parts(monkeypatch):
    x, y = dense()
    whole = bl.evaluate(Scaled(), (x, y), method="mean", ignore_index=255)
    monkeypatch.setattr("bayeslayers.metrics.classification._CHUNK", 2 * 5 * 11 * 13)
    same(bl.evaluate(Scaled(), (x, y), method="mean", ignore_index=255), whole)


def test_an_ignored_example_is_left_out():
    x, y = logits_of("plain")
    marked = torch.where(torch.arange(200) % 3 == 0, -1, y)
    found = bl.evaluate(Scaled(), (x, marked), method="mean", ignore_index=-1)
    same(found, bl.evaluate(Scaled(), (x[marked >= 0], y[marked >= 0]), method="mean"))
    assert found.num_examples == 133


@pytest.mark.parametrize("shape", [(300,), (300, 1), (60, 5)])
def test_yes_or_no_equals_the_references(shape):
    x = 2 * torch.randn(shape, generator=generator(8))
    y = (x + torch.randn(shape, generator=generator(9)) > 0).float()
    found = bl.evaluate(Scaled(bl.Bernoulli()), (x, y), method="mean")
    prob, label = x.sigmoid().double().flatten(), y.flatten().long()
    correct = (prob > 0.5) == (label == 1)
    metrics, confidence = found.metrics, torch.maximum(prob, 1 - prob)
    assert found.likelihood == "bernoulli"
    assert metrics["accuracy"] == pytest.approx(float(correct.double().mean()))
    assert metrics["nll"] == pytest.approx(log_loss(label, prob), rel=1e-6)
    assert metrics["brier"] == pytest.approx(brier_score_loss(label, prob), rel=1e-6)
    assert metrics["ece"] == pytest.approx(calibration_error(torch.stack([1 - prob, prob], 1), label), abs=1e-6)
    assert metrics["classwise_ece"] == pytest.approx(float(binary_calibration_error(prob, label)), abs=1e-6)
    auroc = roc_auc_score(~correct, -confidence)
    assert metrics["misclassification_auroc_confidence"] == pytest.approx(auroc, abs=1e-3 if len(shape) > 1 else 1e-6)
    assert len(found.scores["correct"]) == len(x)


@pytest.mark.parametrize("case", ["predicted variance", "known variance", "several targets"])
def test_real_targets_equal_the_references(case):
    likelihood = bl.Gaussian(0.3) if case == "known variance" else bl.Gaussian()
    x = torch.randn(50, 6 if case == "several targets" else 1 if case == "known variance" else 2, generator=generator())
    model = Scaled(likelihood)
    prediction = bl.predict(model, x, 7, generator=generator(1))
    y = prediction.mean + torch.randn(prediction.mean.shape, generator=generator(2))
    found = bl.evaluate(model, (x, y), num_samples=7, generator=generator(1))
    mean, deviation = prediction.mean.double().numpy(), prediction.total.double().sqrt().numpy()
    target = y.double().numpy()
    law = stats.norm(mean, deviation)
    assert found.metrics["rmse"] == pytest.approx(np.sqrt(np.square(target - mean).mean()))
    assert found.metrics["nll"] == pytest.approx(-law.logpdf(target).sum(1).mean())
    assert found.metrics["crps"] == pytest.approx(float(gaussian_crps(y - prediction.mean, prediction.total).mean()))
    for level in (0.5, 0.9, 0.95):
        low, high = law.interval(level)
        assert found.metrics[f"coverage_{level}"] == pytest.approx(((low <= target) & (target <= high)).mean())
    names = ["rmse", "nll", "mixture_nll", "crps", "coverage_0.5", "coverage_0.9", "coverage_0.95"]
    assert list(found.metrics) == names
    mixture = bl.predict(model, x, 7, generator=generator(1), target=y).log_prob
    assert found.metrics["mixture_nll"] == pytest.approx(-float(mixture.mean()))
    residual = (
        (y - prediction.mean).square().mean(1).sqrt() if case == "several targets" else (y - prediction.mean)[:, 0]
    )
    assert_close(found.scores["residual"], residual)
    assert_close(found.scores["variance"], prediction.total.mean(1))
    assert found.reliability is found.risk_coverage is found.class_iou is None


@pytest.mark.parametrize("variance", [1e-4, 1.0, 30.0])
@pytest.mark.parametrize("residual", [0.0, 0.3, -2.0, 5.0])
def test_crps_is_its_integral(residual, variance):
    law = stats.norm(0, math.sqrt(variance))
    span = 12 * math.sqrt(variance) + abs(residual)
    left = integrate.quad(lambda t: law.cdf(t) ** 2, -span, residual, points=[0.0] if residual > 0 else None, limit=200)
    right = integrate.quad(lambda t: law.sf(t) ** 2, residual, span, points=[0.0] if residual < 0 else None, limit=200)
    found = gaussian_crps(torch.tensor(residual).double(), torch.tensor(variance).double())
    assert float(found) == pytest.approx(left[0] + right[0], rel=1e-6)


def test_the_likelihood_of_one_draw_is_the_loss():
    x = torch.randn(20, 6, generator=generator())
    y = torch.randn(20, 3, generator=generator(1))
    found = bl.evaluate(Scaled(bl.Gaussian()), (x, y), method="mean")
    assert found.metrics["nll"] == pytest.approx(float(bl.Gaussian().loss(x, y)), rel=1e-6)
    assert float(gaussian_nll(torch.tensor(2.0), torch.tensor(4.0))) == pytest.approx(-stats.norm(0, 2).logpdf(2))


@pytest.mark.parametrize("kind", KINDS)
def test_ood_detection_is_that_of_sklearn(kind):
    model, x, y = case_of(kind)
    far = 4 * x[: len(x) // 2]
    found = bl.evaluate(model, (x, y), ood={"far": far, "same": x}, num_samples=6, generator=generator(1))
    assert set(found.ood) == {"far", "same"}
    names = ("variance", "epistemic") if KINDS[kind][3] is None else ("confidence", "entropy", "epistemic")
    label = np.r_[np.zeros(len(x)), np.ones(len(far))]
    for name in names:
        score = torch.cat([found.scores[name], found.ood["far"][name]]).numpy() * (-1 if name == "confidence" else 1)
        auroc, rate = ranking(score, label)
        assert found.metrics[f"far/auroc_{name}"] == pytest.approx(auroc, abs=1e-9)
        assert found.metrics[f"far/fpr95_{name}"] == pytest.approx(rate, abs=1e-9)
    assert set(found.ood["far"]) == set(found.scores) - {"correct", "residual"}
    assert all(len(score) == len(far) for score in found.ood["far"].values())


def test_memory_holds_bins_and_a_few_numbers_per_example(new_tensors):
    def grown(batches):
        """Numbers in tensors that have come to live between the second batch and the last."""
        sizes, calls, net = [], iter(range(batches)), Scaled()

        def count(*_):
            if next(calls) in (1, batches - 1):
                sizes.append(sum(t.numel() for t in new_tensors()))

        hook = net.register_forward_hook(count)
        source = ((torch.randn(4, 3, 16, 16), torch.randint(3, (4, 16, 16))) for _ in range(batches))
        bl.evaluate(net, source, method="mean")
        hook.remove()
        return sizes[1] - sizes[0]

    assert grown(22) == 20 * 4 * 5  # images and their scores


def test_many_classes_need_no_memory_of_their_square():
    torch.manual_seed(0)
    classes = 100_000  # whose pairs would take 80 GB
    model, x, y = bl.BayesLinear(4, classes), torch.randn(2, 4), torch.randint(classes, (2,))
    evaluation = bl.evaluate(model, (x, y), method="mean")
    expected = nn.functional.cross_entropy(model(x), y).item()
    assert evaluation.metrics["nll"] == pytest.approx(expected, rel=1e-5) and evaluation.class_iou is None


def test_a_segmentation_of_many_classes_needs_none_either():
    torch.manual_seed(0)
    classes = 20_000  # 3.2 GB
    probs = torch.full((1, classes, 2), 1e-9)
    probs[0, 7, 0] = probs[0, 9, 1] = 1.0
    model = nn.Sequential(bl.BayesLinear(1, 1), nn.Identity())
    model.forward = lambda x: probs.log()  # type: ignore[method-assign]
    iou = bl.evaluate(model, (torch.ones(1, 1), torch.tensor([[7, 8]])), method="mean").class_iou
    assert iou is not None
    assert iou[7:10].tolist() == [1.0, 0.0, 0.0] and int(iou.isnan().sum()) == classes - 3


def test_a_baseline_without_bayesian_layers_is_evaluated_at_its_weights():
    torch.manual_seed(0)
    net, x = nn.Linear(4, 3), torch.randn(30, 4)
    y = torch.where(torch.arange(30) < 20, net(x).argmax(1), 0)  # mostly right
    evaluation = bl.evaluate(net, (x, y), ood={"far": 9 * x}, method="mean")
    assert evaluation.metrics["nll"] == pytest.approx(nn.functional.cross_entropy(net(x), y).item(), rel=1e-5)
    assert evaluation.num_samples == 1 and "far/auroc_entropy" in evaluation.metrics
    assert bl.recalibrate(net, (x, y), method="mean").nll_after <= evaluation.metrics["nll"] + 1e-6
    for call in (
        lambda: bl.evaluate(net, (x, y)),
        lambda: bl.predict(net, x),
        lambda: bl.predict(net, x, method="local"),
    ):
        with pytest.raises(ValueError, match=r"must have Bayesian layers, got none: .*method='mean' predicts"):
            call()


class Broken(Scaled):
    def forward(self, x):
        return super().forward(x) * math.nan


X, Y = logits_of("plain", 6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data": []}, ValueError, "data must hold at least one batch, got none"),
        ({"data": 3}, TypeError, "data must be a loader, another iterable of batches, or tensors, got int"),
        ({"data": X}, TypeError, r"data must yield batches \(x, y\) of tensors, or mappings .*, got Tensor"),
        (
            {"data": (X,)},
            TypeError,
            r"data must yield batches \(x, y\) of tensors, or mappings .*, got tuple of Tensor",
        ),
        ({"data": [(X, Y.numpy())]}, TypeError, r"got tuple of Tensor, ndarray"),
        ({"data": (X[:0], Y[:0])}, ValueError, r"x must hold at least one example in dimension 0, got shape \(0, 4\)"),
        ({"data": (X, Y[:4])}, ValueError, r"target must have the shape \(6,\), got \(4,\)"),
        ({"data": (X, Y.unsqueeze(1))}, ValueError, r"target must have the shape \(6,\), got \(6, 1\)"),
        ({"data": (X, Y + 3)}, ValueError, r"target must hold classes from 0 to 3, got [456] among them.*ignore_index"),
        ({"data": (X, 0 * Y + 4)}, ValueError, "target must hold classes from 0 to 3, got 4 among them"),
        ({"data": (X, Y - 9), "ignore_index": 255}, ValueError, "classes from 0 to 3, got -[6789] among them.$"),
        ({"data": (X, Y + 0.5)}, ValueError, r"target must hold classes from 0 to 3, got \d.5 among them"),
        ({"data": (X, Y * math.nan)}, ValueError, "target must hold classes from 0 to 3, got nan among them"),
        ({"data": (X, 0 * Y - 1), "ignore_index": -1}, ValueError, "must hold labels that count, got ignore_index=-1"),
        ({"data": (X * math.nan, Y)}, ValueError, "x must be finite"),
        ({"model": Broken()}, ValueError, "prediction must be finite, got 30 NaN or infinite values"),
        (
            {"likelihood": bl.Gaussian(), "data": (1000 * X.abs(), X[:, :2]), "method": "mean"},
            ValueError,
            "prediction must be finite, got 12 NaN or infinite values",
        ),
        ({"model": nn.Linear(4, 3)}, ValueError, "model must have Bayesian layers"),
        ({"num_samples": 0}, ValueError, "num_samples must be an integer >= 1, got 0"),
        ({"likelihood": bl.Bernoulli()}, ValueError, r"target must have the shape \(6, 4\), got \(6,\)"),
        (
            {"likelihood": bl.Bernoulli(), "data": (X, X)},
            ValueError,
            "target must hold classes from 0 to 1, got .* among them",
        ),
        ({"likelihood": bl.Gaussian(1.0)}, ValueError, r"target must have the shape \(6, 4\), got \(6,\)"),
        (
            {"likelihood": bl.Gaussian(1.0), "data": (X, X / 0)},
            ValueError,
            "target must be finite, got 24 NaN or infinite values",
        ),
        (
            {"likelihood": bl.Gaussian(), "data": (-1000 * X.abs(), X[:, :2]), "method": "mean"},
            ValueError,
            "predictive variance must be > 0, got 0.0",
        ),
        ({"ood": X}, TypeError, "ood must map names to data, got Tensor"),
        ({"ood": {"far": []}}, ValueError, r"ood\['far'\] must hold at least one batch, got none"),
        ({"ood": {"far": ["image"]}}, TypeError, r"ood\['far'\] must yield tensors x or batches \(x, y\), got str"),
        ({"ood": {"far": X[:0]}}, ValueError, "x must hold at least one example"),
    ],
)
def test_bad_input_is_one_sentence(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        bl.evaluate(**{"model": Scaled(), "data": (X, Y), "num_samples": 2} | arguments)
    assert "\n" not in str(caught.value)


def test_it_prints_and_is_ready_for_json(capsys):
    x, y = logits_of("all right")
    found = bl.evaluate(Scaled(), (x, y), num_samples=3, ood={"far": -x}, progress=True)
    text = str(found)
    assert "misclassification_auroc_entropy" in text and "categorical, 200 examples, 3 samples" in text
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["metrics"]["accuracy"] == 1.0 and plain["metrics"]["misclassification_auroc_entropy"] is None
    assert plain["metrics"]["far/auroc_entropy"] == found.metrics["far/auroc_entropy"]
    assert len(plain["reliability"]["edges"]) == 16 and sum(plain["reliability"]["count"]) == 200
    real = bl.evaluate(Scaled(bl.Gaussian(1.0)), (x, x), num_samples=3).to_dict()
    assert set(real) == {"likelihood", "num_examples", "num_samples", "metrics"}
