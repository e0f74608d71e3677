"""Metrics of predictions in memory, by the likelihood that they are of: what a card claims and `verify` measures."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bayeslayers.metrics import RegressionRecord, classification_metrics, ood_auroc
from bayeslayers.metrics.classification import ClassificationRecord
from bayeslayers.metrics.ranking import Levels
from bayeslayers.prediction import Prediction


def target_metrics(prediction: Prediction, targets: Tensor) -> dict[str, float]:
    """Return how good predictions of classes, of a yes or no, or of real targets are."""
    if prediction.likelihood.discrete and targets.dim() == 3:  # of pixels
        pixels = ClassificationRecord(prediction, _ignored(prediction))
        pixels.add(prediction, targets)
        found = pixels.metrics()
        return {key: found[key] for key in ("miou", "accuracy", "nll", "brier", "ece")}
    if prediction.likelihood.discrete:
        return classification_metrics(prediction, targets)
    record = RegressionRecord()
    record.add(prediction, targets)
    return record.metrics()


def prediction_metrics(parts: Mapping[str, Prediction], targets: Tensor) -> dict[str, float]:
    """Return metrics of predictions, with their mean uncertainty and how well it tells OOD data.

    Args:
        parts: Predictions for the examples of a posterior's data set, by "", and for those of others, by name.
        targets: Of the former.
    """
    known = parts[""]
    found = target_metrics(known, targets)
    for name, part in parts.items():
        for kind in ("total", "epistemic"):
            found[f"{kind}{suffix(name)}"] = float(getattr(part, kind).mean())
        if name:
            for kind, end in (("total", ""), ("epistemic", "_epistemic")):
                scores = [_per_example(getattr(prediction, kind)) for prediction in (known, part)]
                found[f"ood_auroc_{name}{end}"] = ood_auroc(*scores)
    return found


def with_errors_found(parts: Mapping[str, Prediction], targets: Tensor) -> dict[str, float]:
    """Return `prediction_metrics`, and how well confidence finds errors: NaN without errors, or without others."""
    found, known = prediction_metrics(parts, targets), parts[""]
    if not known.likelihood.discrete:
        return found
    counted = targets != _ignored(known) if _ignored(known) is not None else torch.ones_like(targets, dtype=torch.bool)
    wrong = (known.labels != targets)[counted]
    found["misclassification_auroc_confidence"] = Levels.of(1 - known.confidence[counted], wrong).auroc()
    if targets.dim() == 3:
        found["misclassification_auroc_entropy"] = Levels.of(known.total[counted], wrong).auroc()
    return found


def _ignored(prediction: Prediction) -> int | None:
    return getattr(prediction.likelihood, "ignore_index", None)


def _per_example(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).mean(1)


def suffix(name: str) -> str:
    """Return what stands behind a metric's name for a set of OOD data."""
    return f"_{name}" if name else ""
