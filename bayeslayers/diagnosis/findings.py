"""What stands out in a posterior, and what to do about it. The bounds are rules of thumb."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from bayeslayers.diagnosis.tensors import TensorDiagnosis
from bayeslayers.evaluate import Evaluation

_NEARLY_ALL = 0.995  # share of entries that makes a finding; in a good posterior of an MLP 0.97 are untouched


@dataclass(frozen=True)
class Finding:
    """One sentence on what is wrong with a posterior, the evidence, and what to do.

    Attributes:
        problem: A key: "not finite", "never updated", "untouched", "noisy layer", "nothing learned", "too wide",
            "no uncertainty", "overconfident" or "underconfident".
        text: The sentences.
    """

    problem: str
    text: str


def of_weights(tensors: tuple[TensorDiagnosis, ...]) -> Iterator[Finding]:
    """Yield what the weights alone tell."""
    bad = [t.name for t in tensors if not (math.isfinite(t.noise) and math.isfinite(t.precision_over_prior))]
    if bad:
        yield Finding(
            "not finite",
            f"'{bad[0]}' and {len(bad) - 1} more tensors hold means or precisions that are NaN, infinite or all 0. "
            "Load an earlier checkpoint, and lower lr.",
        )
    if all(t.precision_range == 1 for t in tensors) and max(t.size for t in tensors) > 1:
        yield Finding(
            "never updated",
            "All precisions of each tensor are equal: no step has moved them. Train the model, call "
            "optimizer.finalize() where the method needs it, or load the posterior.",
        )
    new = [t for t in tensors if not t.prior_is_posterior]
    entries = sum(t.size for t in new)
    if entries and (share := sum(t.size * t.untouched for t in new) / entries) > _NEARLY_ALL:
        yield Finding(
            "untouched",
            f"{share:.1%} of the precisions are below twice the prior's: the data has told less than the prior. "
            "Train longer, lower prior_precision, or check that dataset_size is the number of training examples.",
        )
    elif noisy := [t for t in tensors if len(t.shape) > 1 and t.undecided > _NEARLY_ALL]:
        listed = ", ".join(f"'{t.name}'" for t in noisy[:5])
        more = f" and {len(noisy) - 5} more" if len(noisy) > 5 else ""
        yield Finding(
            "noisy layer",
            f"Nearly all weights of {listed}{more} are smaller than their standard deviation. Prune them, raise "
            "their precision at the start, or leave these layers deterministic by to_bayesian(exclude=...).",
        )


def of_predictions(means: Evaluation, samples: Evaluation) -> Iterator[Finding]:
    """Yield what predictions by means and by samples tell."""
    error = "accuracy" if "accuracy" in samples.metrics else "rmse"
    if guesses(means):
        yield Finding(
            "nothing learned",
            f"The means predict no better than guessing: accuracy {means.metrics['accuracy']:.4g} and NLL "
            f"{means.metrics['nll']:.4g} with {means.num_classes} classes. Check labels and inputs, train longer, "
            "lower prior_precision, or leave lr and precisions to the optimiser's defaults.",
        )
        return
    by_mean, by_samples = means.metrics[error], samples.metrics[error]
    loses = by_mean - by_samples > 0.01 if error == "accuracy" else by_samples > 1.05 * by_mean
    epistemic = samples.scores["epistemic"].double().mean()
    total = samples.scores["entropy" if error == "accuracy" else "variance"].double().mean()
    if total > 0 and epistemic / total < 1e-3:
        yield Finding(
            "no uncertainty",
            f"Epistemic uncertainty is {epistemic / total:.2g} of the total: samples agree, as means would. Train "
            "longer, as the precision takes about 1 / precision_lr steps to follow the data; lower the precision at "
            "the start, raise the temperature, or check dataset_size.",
        )
    elif loses and samples.metrics["nll"] > means.metrics["nll"]:
        yield Finding(
            "too wide",
            f"Samples are worse than means: {error} {by_samples:.4g} against {by_mean:.4g}, NLL "
            f"{samples.metrics['nll']:.4g} against {means.metrics['nll']:.4g}. Train longer, lower the temperature, or "
            "raise the precision at the start.",
        )
    if error == "accuracy":
        yield from _of_confidence(samples)


def guesses(evaluation: Evaluation) -> bool:
    """Return whether labels are predicted no better than by chance, within three standard errors."""
    if evaluation.num_classes is None:
        return False
    metrics, chance = evaluation.metrics, 1 / evaluation.num_classes
    noise = math.sqrt(chance * (1 - chance) / evaluation.num_examples)
    return metrics["accuracy"] < chance + 3 * noise and metrics["nll"] > -0.98 * math.log(chance)


def _of_confidence(samples: Evaluation) -> Iterator[Finding]:
    """Yield whether the confidence is above or below the accuracy, by more than three standard errors."""
    accuracy = samples.metrics["accuracy"]
    gap = float(samples.scores["confidence"].double().mean()) - accuracy
    noise = math.sqrt(accuracy * (1 - accuracy) / samples.num_examples)
    if abs(gap) < max(0.02, 3 * noise):
        return
    word, remedy = (
        ("overconfident", "Raise the temperature, or train for fewer epochs")
        if gap > 0
        else ("underconfident", "Train longer, or lower the temperature")
    )
    yield Finding(
        word,
        f"The mean confidence is {accuracy + gap:.1%} at an accuracy of {accuracy:.1%}. {remedy}; bl.recalibrate "
        "corrects it after training.",
    )
