"""The average of one batch's predictions over posterior samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bayeslayers.dtypes import at_least_float32
from bayeslayers.likelihoods import Categorical, Gaussian, Likelihood
from bayeslayers.outputs import NonFiniteOutputError
from bayeslayers.prediction.result import Prediction
from bayeslayers.readings import Readings

_WAITING_DRAWS, _WAITING_VALUES = 16, 2**16  # samples and values that may wait in memory before they are averaged
_PART = 2**17  # values of a sample that are averaged together, so that they stay in a cache


class Moments:
    """Running moments of one part of the predictions over samples.

        sum_all (x - mean_new)^2 = sum_old (x - mean)^2 + sum_added (x - mean)^2 - count (mean_new - mean)^2

    The mean starts at that of the first group, so that the first deviation is 0. By the Cauchy-Schwarz inequality the
    last term is then at most (count - 1) / count of the one before it: nothing cancels.

    Args:
        group: Consecutive samples that depend on each other, see `Average`.
    """

    mean: Tensor
    aleatoric: Tensor
    squares: Tensor  # sum over samples of squared deviations from the mean
    group_squares: Tensor  # the same sum over means of groups

    def __init__(self, group: int):
        self.group, self.count = group, 0

    def add(self, means: Tensor, aleatoric: Tensor) -> None:
        """Add predictive means `(s, *)` and aleatoric uncertainties of some samples."""
        if self.count == 0:
            self.mean, self.aleatoric = means[: self.group].mean(0), torch.zeros_like(aleatoric[0])
            self.squares = torch.zeros_like(self.mean)
            self.group_squares = self.squares if self.group == 1 else torch.zeros_like(self.mean)
        self.count += len(means)
        deviations = means - self.mean
        change = deviations.sum(0) / self.count
        if self.group > 1:
            between = deviations.unflatten(0, (-1, self.group)).mean(1).square_().sum(0)
            self.group_squares += between.addcmul_(change, change, value=-self.count / self.group)
        self.squares += deviations.square_().sum(0).addcmul_(change, change, value=-self.count)
        self.mean += change
        self.aleatoric += (aleatoric - self.aleatoric).sum(0) / self.count


class Average:
    """Running mean and variance over samples, without the cancellation of a sum of squares.

    Small outputs are collected over several samples, because each operation costs more than the numbers in it. Large
    ones are averaged in parts, along their first dimension of positions or the examples.

    Args:
        likelihood: Meaning of the outputs.
        group: Consecutive samples that depend on each other, 2 for antithetic pairs; groups are independent.
        target: Real targets, whose log density under the mixture of all samples is wanted too; None for none.
    """

    log_density: Tensor  # per example, log of the sum over samples of the target's density
    infinite: Tensor | bool = False  # per example, whether an output of any sample was infinite

    def __init__(self, likelihood: Likelihood, group: int = 1, target: Tensor | None = None):
        self.likelihood, self.group, self.target = likelihood, group, target
        self.count = self.draws = 0  # averaged samples, and all including those that wait
        self._waiting: list[Tensor] = []
        self._parts: list[Moments] = []

    def add(self, outputs: Tensor) -> None:
        """Add the outputs of some samples, `(s, n, *)`."""
        self._waiting.append(outputs)
        self.draws += len(outputs)
        enough = min(_WAITING_DRAWS, _WAITING_VALUES / max(1, outputs[0].numel()))
        if self.draws - self.count >= enough and self.draws % self.group == 0:
            self._merge()

    def _merge(self) -> None:
        outputs = at_least_float32(self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting))
        self._waiting = []
        self._add_density(outputs)
        dim = 1 if outputs.dim() < 4 else 3
        extent = max(1, _PART * outputs.shape[dim] // max(1, outputs[0].numel()))
        parts = outputs.split(extent, dim) if outputs.device.type == "cpu" else [outputs]
        self._parts = self._parts or [Moments(self.group) for _ in parts]
        self._dim = 0 if dim == 1 else 3 - outputs.dim()  # from the end: uncertainties may have no classes
        for moments, part in zip(self._parts, parts, strict=True):
            found = self.likelihood.per_draw(part.flatten(0, 1))
            moments.add(*(value.unflatten(0, part.shape[:2]) for value in found))
        # A sigmoid would turn infinity into certainty. A logit of minus infinity legitimately excludes a class.
        extreme = outputs if isinstance(self.likelihood, Categorical) else outputs.abs()
        self.infinite = self.infinite | extreme.reshape(*outputs.shape[:2], -1).amax(2).isposinf().any(0)
        self.count = self.draws

    def _whole(self, name: str) -> Tensor:
        """Return a moment of all parts."""
        parts = [getattr(part, name) for part in self._parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self._dim)

    def _add_density(self, outputs: Tensor) -> None:
        """Add the targets' density under each sample of the outputs `(s, n, *)`, in log space."""
        if self.target is None:
            return
        assert isinstance(self.likelihood, Gaussian)
        densities = [self.likelihood.log_prob(output, self.target) for output in outputs]
        before = [self.log_density] if self.count else []
        self.log_density = torch.stack(before + densities).logsumexp(0)

    def error(self) -> Tensor:
        """Return the standard error of the mean; NaN from a single group."""
        if self._waiting:
            self._merge()
        groups = self.count // self.group
        squares = self._whole("group_squares")
        return (squares / (groups - 1) / groups).sqrt() if groups > 1 else squares * math.nan

    def result(self, readings: Readings, batch: int = 0) -> tuple[Prediction, Callable[[], None]]:
        """Return the prediction for one batch, and what raises if it is not finite.

        Args:
            readings: What is read from the device with that.
            batch: Number of the batch in messages.
        """
        error = self.error()
        mean, squares, aleatoric = (self._whole(name) for name in ("mean", "squares", "aleatoric"))
        total, epistemic = self.likelihood.split(mean, squares / self.count, aleatoric)
        check = self._finite_check(mean, total, readings, batch)
        log_prob = None if self.target is None else self.log_density - math.log(self.count)
        found = Prediction(
            mean, total, aleatoric, epistemic, error, self.count, self.likelihood, (self.count,), log_prob
        )
        return found, check

    def _finite_check(self, mean: Tensor, total: Tensor, readings: Readings, batch: int) -> Callable[[], None]:
        values = [(~part.isfinite()).reshape(len(part), -1).sum(1) for part in (mean, total)]
        bad = values[0] + values[1] + self.infinite
        number = readings.later([bad.sum()])

        def check() -> None:
            if not (values := int(number()[0])):
                return
            examples = bad.nonzero().flatten()
            raise NonFiniteOutputError(
                f"prediction must be finite, got {values} NaN or infinite values of mean and uncertainty, in "
                f"{len(examples)} of {len(bad)} examples of batch {batch}, the first of them {int(examples[0])}. "
                "Check the weights and the scale of the inputs."
            )

        return check
