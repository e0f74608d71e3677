"""Predictions checked against their targets, and uncertainties per example.

An element has one target: it is an example, or one position of an example's dense prediction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayeslayers.likelihoods import Bernoulli
from bayeslayers.likelihoods.base import same_shape
from bayeslayers.prediction import Prediction

RANKED = {True: ("confidence", "entropy", "epistemic"), False: ("variance", "epistemic")}  # by likelihood.discrete


def check_finite(prediction: Prediction) -> None:
    """Raise if a prediction has NaN or infinite values."""
    if bad := sum(int((~part.isfinite()).sum()) for part in (prediction.mean, prediction.total)):
        raise ValueError(
            f"prediction must be finite, got {bad} NaN or infinite values of mean and uncertainty. "
            "Check the weights and the scale of the inputs."
        )


def uncertainties(prediction: Prediction) -> dict[str, Tensor]:
    """Return the uncertainties of each element, `(n, *)`.

    Classification has confidence and entropy, regression has variance; both have epistemic and aleatoric.

    Raises:
        ValueError: If the prediction is not finite.
    """
    check_finite(prediction)
    parts = {"epistemic": prediction.epistemic, "aleatoric": prediction.aleatoric}
    if prediction.likelihood.discrete:
        return {"confidence": prediction.confidence, "entropy": prediction.total} | parts
    return {"variance": prediction.total} | parts


def per_example(values: Tensor) -> Tensor:
    """Return the mean over the elements of each example, float32 on the CPU, `(n,)`."""
    return values.reshape(len(values), -1).float().mean(1).cpu()


def as_uncertainty(name: str, score: Tensor) -> Tensor:
    """Return a score that is high where a prediction is uncertain: 1 - confidence, or any other score unchanged."""
    return 1 - score.double() if name == "confidence" else score


def class_labels(prediction: Prediction, target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Return the labels, with 0 for ignored ones, and a mask of those that count, `(n, *)`.

    Raises:
        TypeError: If `target` is not a tensor.
        ValueError: If its shape is not that of the predicted labels, or a value is not a class.
    """
    target = _like(target, prediction.labels)
    num_classes = 2 if isinstance(prediction.likelihood, Bernoulli) else prediction.mean.shape[1]
    counted = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    labels = torch.where(counted, target, 0).long()
    bad = counted & ((labels != target) | (labels < 0) | (labels >= num_classes))
    if bad.any():
        hint = "" if ignore_index is not None else " Pass it as ignore_index if it marks elements without a label."
        raise ValueError(
            f"target must hold classes from 0 to {num_classes - 1}, got {target[bad][0].item()} among them.{hint}"
        )
    return labels, counted


def residuals(prediction: Prediction, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return target minus mean, and the predictive variance, float64 `(n, *)`.

    Raises:
        TypeError: If `target` is not a tensor.
        ValueError: If its shape is not that of the mean, it is not finite, or a variance is not > 0.
    """
    target = _like(target, prediction.mean)
    if not target.isfinite().all():
        raise ValueError(f"target must be finite, got {int((~target.isfinite()).sum())} NaN or infinite values.")
    variance = prediction.total.double()
    if not (variance > 0).all():
        raise ValueError(f"predictive variance must be > 0, got {variance.min().item()}: the density is undefined.")
    return target.double() - prediction.mean.double(), variance


def _like(target: Tensor, predicted: Tensor) -> Tensor:
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}. torch.as_tensor converts arrays.")
    same_shape(predicted, target)
    return target.to(predicted.device)
