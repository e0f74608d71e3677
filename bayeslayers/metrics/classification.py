"""Multi-class and binary classification: accuracy, likelihood, calibration, and error detection by uncertainty."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.likelihoods import Bernoulli, Likelihood
from bayeslayers.metrics.calibration import CalibrationBins, Reliability, adaptive_calibration_error
from bayeslayers.metrics.elements import RANKED, as_uncertainty, class_labels, per_example, uncertainties
from bayeslayers.metrics.ranking import Levels, RiskCoverage, ScoreHistogram
from bayeslayers.prediction import Prediction

SCORES = RANKED[True]
RISKS = (0.01, 0.05, 0.1)
_CHUNK = 2**21  # probabilities that are processed at once: 16 MB in float64, and some copies of them


def classification_metrics(prediction: Prediction, target: Tensor) -> dict[str, float]:
    """Return accuracy, negative log-likelihood (nats), Brier score and expected calibration error.

    The calibration error bins the most probable class's confidence into 15 equal bins (Guo et al.
    2017, arXiv 1706.04599, Eq. 3).

    Args:
        prediction: Prediction of classes `(n, c)`, or of one binary label per example, `(n,)` or `(n, 1)`.
        target: Class indices `(n,)`, or 0 and 1 in the shape of the binary probabilities.
    """
    if not prediction.likelihood.discrete or prediction.labels.numel() != len(prediction):
        raise ValueError(
            "prediction must be categorical of shape (n, c), or bernoulli of shape (n,) or (n, 1), got "
            f"{prediction.likelihood.name} of shape {tuple(prediction.mean.shape)}."
        )
    record = ClassificationRecord(prediction)
    record.add(prediction, target)
    return {key: value for key, value in record.fit().items() if key != "classwise_ece"}


def class_probs(probs: Tensor, likelihood: Likelihood) -> Tensor:
    """Return class probabilities `(n, c, *)`, float64; a binary probability becomes those of labels 0 and 1."""
    if not isinstance(likelihood, Bernoulli):
        return probs.double()
    # A probability within half a step of 1 (2^-25 in float32) is stored as 1: label 0 is improbable, not impossible.
    half_step = torch.finfo(probs.dtype).eps / 4
    return torch.stack([(1 - probs.double()).clamp_min(half_step), probs.double()], 1)


def log_probs(probs: Tensor) -> Tensor:
    """Return logarithms of probabilities; where a float32 softmax underflows to 0, the smallest float32 replaces it."""
    return probs.clamp_min(torch.finfo(torch.float32).tiny).log()


class ClassificationRecord:
    """Running metrics of predicted classes.

    With one label per example, scores are kept as one number per example and ranked exactly. With one label per
    position (segmentation, or several binary labels), metrics are means over positions, and positions are ranked in
    the bins of a `ScoreHistogram`. The scores of an example are then means over its positions.

    Args:
        like: A prediction of the same kind as those to be added.
        ignore_index: Label that all metrics leave out, or None.
    """

    def __init__(self, like: Prediction, ignore_index: int | None = None):
        self.likelihood, self.ignore_index = like.likelihood, ignore_index
        self.dense = like.total[0].numel() > 1
        self.num_classes = num_classes = 2 if isinstance(self.likelihood, Bernoulli) else like.mean.shape[1]
        self.num_examples = 0
        self._sums = torch.zeros(4, dtype=torch.float64)  # elements, correct ones, negative log-likelihood, Brier score
        self._top, self._each = CalibrationBins(), CalibrationBins(num_classes)
        # By class, positions that are predicted and true, predicted, and true; a full confusion matrix is not needed.
        self._positions = torch.zeros(3, num_classes if self.dense else 0, dtype=torch.int64)
        self._histograms = {name: ScoreHistogram() for name in SCORES}
        self._scores: list[dict[str, Tensor]] = []

    def add(self, prediction: Prediction, target: Tensor) -> None:
        """Add a batch.

        Raises:
            TypeError: If `target` is not a tensor.
            ValueError: If it does not fit the prediction, or the prediction is not finite.
        """
        scores = uncertainties(prediction)
        labels, counted = class_labels(prediction, target, self.ignore_index)
        correct = prediction.labels == labels
        examples = max(1, _CHUNK // prediction.mean[0].numel())
        for chunk in zip(*(part.split(examples) for part in (prediction.probs, labels, counted)), strict=True):
            self._add_probs(*chunk)
        hits = correct[counted]
        self._sums[:2] += torch.tensor([hits.numel(), int(hits.sum())])
        self._top.add(prediction.confidence[counted].double().unsqueeze(1), hits.unsqueeze(1))
        if self.dense:
            self._add_positions(scores, correct, counted, labels, prediction.labels)
        else:
            kept = counted.flatten().cpu()
            each = {name: per_example(score)[kept] for name, score in scores.items()}
            self._scores.append(each | {"correct": hits.cpu()})
        self.num_examples += len(self._scores[-1]["correct"])

    def _add_probs(self, probs: Tensor, labels: Tensor, counted: Tensor) -> None:
        classes, labels = class_probs(probs, self.likelihood).movedim(1, -1)[counted], labels[counted]
        of_label = classes.gather(1, labels.unsqueeze(1))
        brier = classes.square().sum() - 2 * of_label.sum() + len(labels)
        # The binary score is (p - y)^2, that of one class.
        brier = brier / 2 if isinstance(self.likelihood, Bernoulli) else brier
        self._sums[2:] += torch.stack([-log_probs(of_label).sum(), brier]).cpu()
        self._each.add(classes, F.one_hot(labels, classes.shape[1]))

    def _add_positions(
        self, scores: dict[str, Tensor], correct: Tensor, counted: Tensor, labels: Tensor, predicted: Tensor
    ) -> None:
        for name, histogram in self._histograms.items():
            histogram.add(as_uncertainty(name, scores[name])[counted], ~correct[counted])
        for count, classes in zip(
            self._positions, (labels[counted & correct], predicted[counted], labels[counted]), strict=True
        ):
            count += classes.bincount(minlength=len(count)).cpu()
        share = (correct & counted).flatten(1).sum(1) / counted.flatten(1).sum(1)
        self._scores.append({name: per_example(score) for name, score in scores.items()} | {"correct": share.cpu()})

    def scores(self) -> dict[str, Tensor]:
        """Return the uncertainties of each example, and whether it is `correct`, or the share of correct positions."""
        return {key: torch.cat([batch[key] for batch in self._scores]) for key in self._scores[0]}

    def levels(self) -> dict[str, Levels]:
        """Return the levels of each uncertainty, with errors as positives."""
        if self.dense:
            return {name: histogram.levels() for name, histogram in self._histograms.items()}
        scores = self.scores()
        return {name: Levels.of(as_uncertainty(name, scores[name]), ~scores["correct"]) for name in SCORES}

    def fit(self) -> dict[str, float]:
        """Return the metrics without ranking: accuracy, likelihood, Brier score and calibration.

        Raises:
            ValueError: If no element has a label.
        """
        count, right, nll, brier = self._sums.tolist()
        if count == 0:
            raise ValueError(f"target must hold labels that count, got ignore_index={self.ignore_index} alone.")
        return {
            "accuracy": right / count,
            "nll": nll / count,
            "brier": brier / count,
            "ece": float(self._top.errors()),
            "classwise_ece": float(self._each.errors().mean()),
        }

    def metrics(self) -> dict[str, float]:
        """Return all metrics; see `bayeslayers.evaluate`."""
        metrics, levels = self.fit(), self.levels()
        if self.dense:
            metrics["miou"] = float(self.class_iou().nanmean())
        else:
            scores = self.scores()
            metrics["adaptive_ece"] = adaptive_calibration_error(scores["confidence"], scores["correct"])
        for name, level in levels.items():
            metrics[f"misclassification_auroc_{name}"] = level.auroc()
            metrics[f"misclassification_fpr95_{name}"] = level.false_positive_rate()
        curve = levels["confidence"].risk_coverage()
        metrics["aurc"] = levels["confidence"].aurc()
        return metrics | {f"coverage_at_risk_{risk}": curve.coverage_at(risk) for risk in RISKS}

    def reliability(self) -> Reliability:
        """Return the reliability diagram of the confidence."""
        return self._top.reliability()

    def risk_coverage(self) -> RiskCoverage:
        """Return the risk-coverage curve of the confidence."""
        return self.levels()["confidence"].risk_coverage()

    def class_iou(self) -> Tensor:
        """Return the intersection over union of each class's predicted and true positions, `(c,)`; NaN without any."""
        both, predicted, true = self._positions
        return both / (predicted + true - both)
