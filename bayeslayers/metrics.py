"""How good a prediction is: accuracy, likelihood, calibration, and telling strangers apart (torchmetrics inside)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.predict import Prediction

CALIBRATION_BINS = 15


def classification_metrics(prediction: Prediction, target: Tensor) -> dict[str, float]:
    """Return accuracy, negative log-likelihood (nats), Brier score and expected calibration error.

    The calibration error takes the most probable class's confidence in 15 equal bins (Guo et al.
    2017, arXiv 1706.04599, Eq. 3).

    Args:
        prediction: Prediction of a Categorical likelihood for n examples.
        target: Class indices `(n,)`.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    if prediction.likelihood.name != "categorical" or prediction.mean.dim() != 2:
        raise ValueError(
            f"prediction must be categorical of shape (n, c), got {prediction.likelihood.name} of shape "
            f"{tuple(prediction.mean.shape)}."
        )
    probs, target = prediction.probs.double(), target.to(prediction.probs.device)
    if target.shape != prediction.labels.shape:
        raise ValueError(f"target must have the shape {tuple(prediction.labels.shape)}, got {tuple(target.shape)}.")
    num_classes = probs.shape[1]
    # torchmetrics gives a confidence of exactly 1 a bin of its own: the next float32 below is in the last one.
    binned = probs.clamp_max(1 - 2**-24)
    # A float32 softmax can underflow to 0: the smallest float32 keeps the likelihood finite.
    log_probs = probs.clamp_min(torch.finfo(torch.float32).tiny).log()
    return {
        "accuracy": float((prediction.labels == target).double().mean()),
        "nll": float(F.nll_loss(log_probs, target)),
        "brier": float((probs - F.one_hot(target, num_classes)).square().sum(1).mean()),
        "ece": float(multiclass_calibration_error(binned, target, num_classes, n_bins=CALIBRATION_BINS)),
    }


def ood_auroc(known: Tensor, strange: Tensor) -> float:
    """Return the probability that an out-of-distribution example scores higher than a known one.

    Args:
        known: Uncertainty scores of in-distribution examples, `(n,)`.
        strange: Uncertainty scores of out-of-distribution examples, `(m,)`.
    """
    from torchmetrics.functional.classification import binary_auroc

    scores = torch.cat([known, strange]).double()
    if 0 in (len(known), len(strange)) or not scores.isfinite().all():
        raise ValueError(
            f"known and strange must hold finite scores, got {len(known)} and {len(strange)} scores, "
            f"{int((~scores.isfinite()).sum())} of them NaN or infinite."
        )
    label = torch.cat([torch.zeros_like(known), torch.ones_like(strange)]).long()
    # torchmetrics squashes scores outside [0, 1] by a sigmoid, which could tie them: ranks keep the order.
    ranks = torch.unique(scores, return_inverse=True)[1]
    return float(binary_auroc(ranks / max(1, int(ranks.max())), label))
