"""Conformal prediction: sets and intervals whose coverage is guaranteed, on top of any prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayeslayers.batches import Labelled, labelled_batches
from bayeslayers.checks import at_least_one, fraction
from bayeslayers.likelihoods import Likelihood, likelihood_of
from bayeslayers.method import method_of
from bayeslayers.metrics.classification import class_probs
from bayeslayers.metrics.elements import check_finite, class_labels, residuals
from bayeslayers.prediction import Prediction, predict

_SCORES = {True: ("lac", "aps"), False: ("scaled", "cqr")}  # by likelihood.discrete


@dataclass(frozen=True)
class ConformalFit:
    """The threshold of a conformal score; it turns a prediction into sets or intervals of guaranteed coverage.

    A set, or an interval, holds each target whose score is at most `threshold`. If calibration data and new data are
    exchangeable, then it contains the true target with a probability from 1 - alpha to
    1 - alpha + 1 / (num_examples + 1), whatever the model. The probability is over calibration data and new
    example together: it does not hold for each class, or each input, by itself. Source: Vovk et al. 2005; Lei et al.
    2018 (arXiv 1604.04173), Theorem 2.2.

    Attributes:
        likelihood: Name of the likelihood whose predictions it is for.
        score: "lac", "aps", "scaled" or "cqr", see `conformal`.
        alpha: Greatest probability that the target is missed, in (0, 1).
        threshold: Greatest score that is kept.
        num_examples: Calibration examples.
    """

    likelihood: str
    score: str
    alpha: float
    threshold: float
    num_examples: int

    def __post_init__(self) -> None:
        _check_score(self.score, self.likelihood != "gaussian")
        _check_alpha(self.alpha)
        at_least_one("num_examples", self.num_examples)
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be finite, got {self.threshold}.")

    def sets(
        self, prediction: Prediction, *, nonempty: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the set of classes of each example, a mask `(n, c)`; two classes for binary labels.

        A set may be empty: where a model is right more often than 1 - alpha, some examples must be missed for the
        coverage to be 1 - alpha.

        Args:
            prediction: Prediction of n examples with one label each.
            nonempty: Whether to add the most probable class to empty sets; coverage is then higher.
            generator: Source of the uniform number that "aps" takes for each example.

        Raises:
            ValueError: If the prediction is of another likelihood, or has several labels per example.
        """
        self._check(prediction, "sets")
        scores = _class_scores(prediction, self.score, generator)
        kept = scores <= self.threshold
        if nonempty:
            kept |= ~kept.any(1, keepdim=True) & (scores == scores.amin(1, keepdim=True))
        return kept

    def intervals(self, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """Return the lower and upper end for each element of a real target, both of the shape of the mean.

        With several elements per example, all of them lie in their intervals with probability 1 - alpha.

        Raises:
            ValueError: If the prediction is of another likelihood.
        """
        self._check(prediction, "intervals")
        deviation = prediction.total.double().sqrt()
        if self.score == "cqr":
            half = _normal_half_width(self.alpha) * deviation + self.threshold
        else:
            half = self.threshold * deviation
        half = half.clamp_min(0)  # "cqr" may shorten a narrow interval beyond its middle
        mean = prediction.mean.double()
        return (mean - half).to(prediction.mean.dtype), (mean + half).to(prediction.mean.dtype)

    def measure(
        self, prediction: Prediction, target: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, float]:
        """Return "coverage", the share of targets that are contained, and "mean_size" of sets or "mean_width".

        Args:
            prediction: Prediction of examples that are not those of the calibration.
            target: Their labels `(n,)`, or real targets of the shape of the mean.
            generator: As for `sets`.
        """
        if prediction.likelihood.discrete:
            kept = self.sets(prediction, generator=generator)
            labels, _ = class_labels(prediction, target, None)
            covered = kept.gather(1, labels.unsqueeze(1))
            size = {"mean_size": float(kept.sum(1).double().mean())}
        else:
            low, high = self.intervals(prediction)
            residuals(prediction, target)  # checks the target
            covered = ((low <= target) & (target <= high)).reshape(len(target), -1).all(1)
            size = {"mean_width": float((high - low).double().mean())}
        return {"coverage": float(covered.double().mean())} | size

    def _check(self, prediction: Prediction, asked: str) -> None:
        if prediction.likelihood.name != self.likelihood:
            raise ValueError(
                f"prediction must be {self.likelihood}, as those of the calibration, got {prediction.likelihood.name}."
            )
        if asked != (right := "sets" if prediction.likelihood.discrete else "intervals"):
            raise ValueError(f"{asked} must not be asked of a {self.likelihood} prediction. It has {right}.")


def conformal(
    model: nn.Module,
    data: Labelled,
    *,
    alpha: float = 0.1,
    score: str | None = None,
    num_samples: int = 64,
    likelihood: Likelihood | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> ConformalFit:
    """Return the threshold at which sets, or intervals, contain the target with probability at least 1 - alpha.

    Split conformal prediction: the threshold is the ceil((n + 1) (1 - alpha))-th smallest score of n calibration
    examples. The scores of an example are, with class probabilities p, mean m and total variance v::

        "lac"     1 - p_y, which gives the smallest sets on average (Sadinle et al. 2019, arXiv 1609.00451)
        "aps"     sum of all p_c > p_y, plus u p_y with u uniform in (0, 1): sets grow where classes are hard to
                  tell apart (Romano et al. 2020, arXiv 2006.02544, Eq. 5)
        "scaled"  |y - m| / sqrt(v): intervals are stretched (Lei et al. 2018, arXiv 1604.04173, Sec. 5.2)
        "cqr"     max(low - y, y - high), with the quantiles alpha / 2 and 1 - alpha / 2 of N(m, v): intervals are
                  widened by a constant (Romano et al. 2019, arXiv 1905.03222, Eq. 6)

    Where an example has several real targets, its score is the greatest of theirs.

    Args:
        model: Model with Bayesian layers.
        data: Calibration data, neither training nor test data: batches (x, y) as for `evaluate`.
        alpha: Greatest probability that the target is missed, in (0, 1).
        score: "lac" (the default) or "aps" for classes, "scaled" (the default) or "cqr" for real targets.
        num_samples: Posterior samples per batch.
        likelihood: As for `predict`.
        generator: Source of the samples, and of the uniform numbers of "aps".
        **options: Further arguments of `predict`, such as `method`, `output` and `batch_size`.

    Raises:
        TypeError: If `data` yields no tensors.
        ValueError: If it is empty, does not fit the model, has several labels per example, or has fewer examples than
            1 / alpha - 1, too few for any finite threshold.

    Example:
        >>> import torch, bayeslayers as bl
        >>> model, x, y = bl.BayesLinear(4, 3), torch.randn(200, 4), torch.randint(3, (200,))
        >>> fit = bl.conformal(model, (x[:100], y[:100]), alpha=0.1)
        >>> fit.sets(bl.predict(model, x[100:])).shape
        torch.Size([100, 3])
    """
    likelihood = likelihood or likelihood_of(model)
    options["method"] = options.get("method") or method_of(model)  # every batch by whole networks
    score = score or _SCORES[likelihood.discrete][0]
    _check_score(score, likelihood.discrete)
    _check_alpha(alpha)
    parts = []
    for x, y in labelled_batches("data", data):
        prediction = predict(model, x, num_samples, likelihood=likelihood, generator=generator, **options)
        check_finite(prediction)
        parts.append(_scores(prediction, y, score, alpha, generator).cpu())
    scores = torch.cat(parts).sort().values
    rank = math.ceil((len(scores) + 1) * (1 - alpha) - 1e-9)  # 100 times 0.9 is a little more than 90
    if rank > len(scores):
        raise ValueError(
            f"data must hold at least {math.ceil(1 / alpha - 1e-9) - 1} examples for alpha={alpha}, got {len(scores)}. "
            "Give more calibration data, or a larger alpha."
        )
    return ConformalFit(likelihood.name, score, alpha, float(scores[rank - 1]), len(scores))


def _scores(
    prediction: Prediction, target: Tensor, score: str, alpha: float, generator: torch.Generator | None
) -> Tensor:
    """Return the score of each example's target, float64 `(n,)`."""
    if prediction.likelihood.discrete:
        labels, _ = class_labels(prediction, target, None)
        return _class_scores(prediction, score, generator).gather(1, labels.unsqueeze(1)).squeeze(1)
    residual, variance = residuals(prediction, target)
    distance, deviation = residual.abs(), variance.sqrt()
    found = distance / deviation if score == "scaled" else distance - _normal_half_width(alpha) * deviation
    return found.reshape(len(found), -1).amax(1)


def _class_scores(prediction: Prediction, score: str, generator: torch.Generator | None) -> Tensor:
    """Return the score that each class would have as the label, float64 `(n, c)`."""
    if prediction.total.dim() > 1:
        raise ValueError(
            f"prediction must have one label per example, got {tuple(prediction.total.shape)}: labels of one example "
            "are not exchangeable."
        )
    probs = class_probs(prediction.mean, prediction.likelihood)
    if score == "lac":
        return 1 - probs
    ordered, order = probs.sort(dim=1, descending=True)
    device = "cpu" if generator is None else generator.device
    u = torch.rand(len(probs), 1, dtype=torch.float64, generator=generator, device=device).to(probs.device)
    return torch.empty_like(probs).scatter(1, order, ordered.cumsum(1) - ordered + u * ordered)


def _normal_half_width(alpha: float) -> float:
    """Return half the width of the central interval of probability 1 - alpha of a standard normal variable."""
    return float(torch.special.ndtri(torch.tensor(1 - alpha / 2, dtype=torch.float64)))


def _check_score(score: str, discrete: bool) -> None:
    if score not in (known := _SCORES[discrete]):
        kind = "classes" if discrete else "real targets"
        raise ValueError(f"score must be {known[0]!r} or {known[1]!r} for {kind}, got {score!r}.")


def _check_alpha(alpha: float) -> None:
    if not fraction("alpha", alpha):
        raise ValueError(f"alpha must be in (0, 1), got {alpha}.")
