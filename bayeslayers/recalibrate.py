"""Recalibration: one temperature of the predictive distribution, fitted to held-out data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayeslayers.batches import Labelled, labelled_batches
from bayeslayers.checks import positive
from bayeslayers.likelihoods import Bernoulli, Likelihood, likelihood_of
from bayeslayers.method import method_of
from bayeslayers.metrics.classification import class_probs, log_probs
from bayeslayers.metrics.elements import check_finite, class_labels, residuals
from bayeslayers.metrics.regression import gaussian_nll
from bayeslayers.prediction import Prediction, predict

_CHUNK = 2**17  # elements whose probabilities are scaled at once
_TOLERANCE = 1e-10  # of the temperature, relative


@dataclass(frozen=True)
class Recalibration:
    """A temperature for predictive distributions: p^(1 / temperature), renormalised.

    A temperature above 1 makes predictions less confident, one below 1 more; the predicted class stays.
    N(mean, variance) becomes N(mean, temperature variance).

    Attributes:
        likelihood: Name of the likelihood whose predictions it is for.
        temperature: > 0.
        nll_before: Negative log-likelihood of the held-out data, in nats per label, or per example if it is Gaussian.
        nll_after: The same at this temperature, never more.
    """

    likelihood: str
    temperature: float
    nll_before: float = math.nan
    nll_after: float = math.nan

    def __post_init__(self) -> None:
        positive("temperature", self.temperature)

    def apply(self, prediction: Prediction) -> Prediction:
        """Return the prediction at this temperature.

        `total` is that of the new distribution. That distribution has no samples to decompose, so aleatoric and
        epistemic uncertainty keep their shares of the total. The standard error of probabilities becomes NaN,
        because it is unknown after rescaling.

        Raises:
            ValueError: If the prediction is of another likelihood.
        """
        if prediction.likelihood.name != self.likelihood:
            raise ValueError(
                f"prediction must be {self.likelihood}, as those that the temperature was fitted to, got "
                f"{prediction.likelihood.name}."
            )
        mean, error = prediction.mean, prediction.standard_error
        if prediction.likelihood.discrete:
            logits = log_probs(class_probs(mean, prediction.likelihood)) / self.temperature
            # One logit of yes against no.
            output = logits[:, 1] - logits[:, 0] if isinstance(prediction.likelihood, Bernoulli) else logits
            mean, total = (part.to(mean.dtype) for part in prediction.likelihood.per_draw(output))
            error = torch.full_like(error, math.nan)
        else:
            total = self.temperature * prediction.total
        share = torch.where(prediction.total > 0, prediction.epistemic / prediction.total, 0).clamp_max(1)
        epistemic = share * total
        return dataclasses.replace(
            prediction,
            mean=mean,
            total=total,
            aleatoric=total - epistemic,
            epistemic=epistemic,
            standard_error=error,
            log_prob=None,
        )


def recalibrate(
    model: nn.Module,
    data: Labelled,
    *,
    num_samples: int = 64,
    likelihood: Likelihood | None = None,
    generator: torch.Generator | None = None,
    ignore_index: int | None = None,
    **options: Any,
) -> Recalibration:
    """Return the temperature that minimises the negative log-likelihood of held-out data.

    For classes with averaged probabilities p, b = 1 / temperature and the label y, it minimises

        mean over labels of log sum_c p_c^b - b log p_y,

    whose slope in b is mean(E_b[log p] - log p_y) and whose curvature is mean(Var_b[log p]), under p^b normalised.
    The objective is convex, strictly so unless every p is uniform. Its only minimum is where the slope vanishes;
    Newton's method finds it within a bracket, in float64. For regression it is the mean of residual^2 / variance.
    Source: Guo et al. 2017 (arXiv 1706.04599), Sec. 4.2, which scales the logits of a single network.

    The log probabilities of all held-out labels are kept in memory, 4 bytes per class and label.

    Args:
        model: Model with Bayesian layers.
        data: Held-out data, not the training data: batches (x, y) as for `evaluate`.
        num_samples: Posterior samples per batch.
        likelihood: As for `predict`.
        generator: Source of the samples; every batch has its own.
        ignore_index: Label that is left out.
        **options: Further arguments of `predict`, such as `method`, `output` and `batch_size`.

    Raises:
        TypeError: If `data` yields no tensors.
        ValueError: If it is empty or does not fit the model, or no temperature is optimal: every label is the
            predicted one (more confidence is always better), or labels are less probable than chance.

    Example:
        >>> import torch, bayeslayers as bl
        >>> model, x = bl.BayesLinear(4, 3), torch.randn(100, 4)
        >>> y = torch.where(torch.arange(100) < 90, model(x).argmax(1), 0)  # mostly right
        >>> recalibration = bl.recalibrate(model, (x, y))
        >>> recalibration.nll_after <= recalibration.nll_before
        True
    """
    likelihood = likelihood or likelihood_of(model)
    options["method"] = options.get("method") or method_of(model)  # every batch by whole networks
    fit = _Classes(ignore_index) if likelihood.discrete else _Gaussians()
    for x, y in labelled_batches("data", data):
        prediction = predict(model, x, num_samples, likelihood=likelihood, generator=generator, **options)
        check_finite(prediction)
        fit.add(prediction, y)
    temperature = fit.temperature()
    return Recalibration(likelihood.name, temperature, fit.nll(1.0), fit.nll(temperature))


class _Gaussians:
    """Residuals and variances of held-out targets."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, prediction: Prediction, target: Tensor) -> None:
        residual, variance = residuals(prediction, target)
        self._parts.append((residual.cpu(), variance.cpu()))

    def nll(self, temperature: float) -> float:
        examples = sum(len(residual) for residual, _ in self._parts)
        return sum(float(gaussian_nll(r, temperature * v).sum()) for r, v in self._parts) / examples

    def temperature(self) -> float:
        ratios = torch.cat([(residual.square() / variance).flatten() for residual, variance in self._parts])
        if not ratios.any():
            raise ValueError("target must differ from the predictions, got none that does: no variance is too small.")
        return float(ratios.mean())


class _Classes:
    """Log probabilities and labels of held-out elements."""

    def __init__(self, ignore_index: int | None):
        self.ignore_index = ignore_index
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, prediction: Prediction, target: Tensor) -> None:
        labels, counted = class_labels(prediction, target, self.ignore_index)
        probs = class_probs(prediction.probs, prediction.likelihood).movedim(1, -1)[counted]
        for part in zip(log_probs(probs).float().cpu().split(_CHUNK), labels[counted].cpu().split(_CHUNK), strict=True):
            self._parts.append(part)

    def _mean(self, function: Callable[[Tensor, Tensor], list[Tensor]]) -> list[float]:
        """Return means over elements of functions of log probabilities, and of the label's."""
        sums = torch.zeros(())
        for log_p, label in self._parts:
            log_p = log_p.double()
            values = function(log_p, log_p.gather(1, label.unsqueeze(1)).squeeze(1))
            sums = sums + torch.stack([value.sum() for value in values])
        return (sums / sum(len(label) for _, label in self._parts)).tolist()

    def nll(self, temperature: float) -> float:
        b = 1 / temperature
        return self._mean(lambda log_p, of_label: [(b * log_p).logsumexp(1) - b * of_label])[0]

    def slope(self, b: float) -> tuple[float, float]:
        """Return the first and the second derivative of the negative log-likelihood by b."""

        def derivatives(log_p: Tensor, of_label: Tensor) -> list[Tensor]:
            p = (b * log_p).softmax(1)
            expected = (p * log_p).sum(1)
            return [expected - of_label, (p * (log_p - expected.unsqueeze(1)).square()).sum(1)]

        slope, curvature = self._mean(derivatives)
        return slope, curvature

    def temperature(self) -> float:
        if not any(len(label) for _, label in self._parts):
            raise ValueError(f"target must hold labels that count, got ignore_index={self.ignore_index} alone.")
        if self.slope(1.0)[0] == 0:
            return 1.0
        at_zero, at_infinity = self._mean(lambda log_p, label: [log_p.mean(1) - label, log_p.amax(1) - label])
        if at_infinity == 0:
            raise ValueError(
                "target must hold a label that is not the predicted one, got none: the lower the temperature, the "
                "better. Give more held-out data."
            )
        if at_zero >= 0:
            raise ValueError(
                "target must be more probable than chance, got labels that are not: the higher the temperature, the "
                "better. Check that labels and classes are in the same order."
            )
        return 1 / root_of_increasing(self.slope)


def root_of_increasing(function: Callable[[float], tuple[float, float]]) -> float:
    """Return the root of an increasing function of a number > 0.

    Takes Newton's steps, and the middle of the bracket where a step would leave it.

    Args:
        function: Gives value and derivative; it is negative near 0 and positive far from it.
    """
    low = high = 1.0
    while function(low)[0] > 0:
        low /= 2
    while function(high)[0] < 0:
        high *= 2
    x = 1.0
    while True:
        value, derivative = function(x)
        if value == 0:
            return x
        low, high = (x, high) if value < 0 else (low, x)
        newton = x - value / derivative if derivative > 0 else math.inf
        before, x = x, newton if low < newton < high else (low + high) / 2
        if abs(x - before) <= _TOLERANCE * x:
            return x
