"""Regression: error, likelihood and interval coverage of a Gaussian prediction."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayeslayers.metrics.elements import per_example, residuals, uncertainties
from bayeslayers.prediction import Prediction

INTERVALS = (0.5, 0.9, 0.95)


def gaussian_nll(residual: Tensor, variance: Tensor) -> Tensor:
    """Return the negative log density of N(0, variance) at `residual`, elementwise, in nats."""
    return 0.5 * (residual.square() / variance + (2 * math.pi * variance).log())


def gaussian_crps(residual: Tensor, variance: Tensor) -> Tensor:
    """Return the continuous ranked probability score of N(0, variance) at `residual`, elementwise.

        integral (F(t) - [t >= residual])^2 dt = s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)),   z = residual / s

    in the units of the residual. Source: Gneiting & Raftery 2007 (doi 10.1198/016214506000001437), Eq. 21.
    """
    deviation = variance.sqrt()
    z = residual / deviation
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return deviation * (z * torch.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))


class RegressionRecord:
    """Running metrics of real targets under N(mean, total), the Gaussian of the predictive mean and variance.

    The predictive distribution is a mixture over posterior samples; `Prediction` keeps its first two moments, and the
    log density of targets that `predict` was given.
    """

    def __init__(self) -> None:
        self.num_examples = 0
        self._count = 0
        self._sums = torch.zeros(3 + len(INTERVALS), dtype=torch.float64)  # squares, nll, crps, inside each interval
        self._scores: list[dict[str, Tensor]] = []
        self._log_prob: float | None = 0.0  # summed over examples; None once a prediction has none

    def add(self, prediction: Prediction, target: Tensor) -> None:
        """Add a batch.

        Raises:
            TypeError: If the target is not a tensor.
            ValueError: If its shape or values do not fit, or a variance is not > 0.
        """
        scores = {name: per_example(score) for name, score in uncertainties(prediction).items()}
        residual, variance = residuals(prediction, target)
        z = residual.abs() / variance.sqrt()
        inside = [z <= math.sqrt(2) * float(torch.erfinv(torch.tensor(level).double())) for level in INTERVALS]
        columns = residual.square(), gaussian_nll(residual, variance), gaussian_crps(residual, variance), *inside
        self._sums += torch.stack([column.double().sum() for column in columns]).cpu()
        self._count += residual.numel()
        if self._log_prob is not None and prediction.log_prob is not None:
            self._log_prob += float(prediction.log_prob.double().sum())
        else:
            self._log_prob = None
        self.num_examples += len(residual)
        each = residual.reshape(len(residual), -1)
        size = each[:, 0] if each.shape[1] == 1 else each.square().mean(1).sqrt()
        self._scores.append({"residual": size.float().cpu()} | scores)

    def scores(self) -> dict[str, Tensor]:
        """Return the residual (root mean square if an example has several) and the variances, per example."""
        return {key: torch.cat([batch[key] for batch in self._scores]) for key in self._scores[0]}

    def metrics(self) -> dict[str, float]:
        """Return the metrics; the likelihood of an example is that of all its elements, as in `Gaussian.loss`.

        "mixture_nll" is that of the mixture, where the predictions have a log density, "nll" that of the Gaussian.
        """
        squares, nll, crps, *inside = self._sums.tolist()
        mixture = {} if self._log_prob is None else {"mixture_nll": -self._log_prob / self.num_examples}
        return {
            "rmse": math.sqrt(squares / self._count),
            "nll": nll / self.num_examples,
            **mixture,
            "crps": crps / self._count,
        } | {f"coverage_{level}": count / self._count for level, count in zip(INTERVALS, inside, strict=True)}
