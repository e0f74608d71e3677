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


class Average:
    """Running mean and variance over samples (Chan et al. 1983), without the cancellation of a sum of squares.

    Small outputs are collected over several samples, because each operation costs more than the numbers in it.

    Args:
        likelihood: Meaning of the outputs.
        group: Consecutive samples that depend on each other, 2 for antithetic pairs; groups are independent.
        target: Real targets, whose log density under the mixture of all samples is wanted too; None for none.
    """

    mean: Tensor
    aleatoric: Tensor
    squares: Tensor  # sum over samples of squared deviations from the mean
    group_squares: Tensor  # the same sum over means of groups
    log_density: Tensor  # per example, log of the sum over samples of the target's density
    infinite: Tensor | bool = False  # per example, whether an output of any sample was infinite

    def __init__(self, likelihood: Likelihood, group: int = 1, target: Tensor | None = None):
        self.likelihood, self.group, self.target = likelihood, group, target
        self.count = self.draws = 0  # averaged samples, and all including those that wait
        self._waiting: list[Tensor] = []

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
        # A sigmoid would turn infinity into certainty. A logit of minus infinity legitimately excludes a class.
        infinite = outputs.isposinf() if isinstance(self.likelihood, Categorical) else outputs.isinf()
        self._add_density(outputs)
        self.infinite = self.infinite | infinite.reshape(*outputs.shape[:2], -1).any(2).any(0)
        parts = self.likelihood.per_draw(outputs.flatten(0, 1))
        means, noise = (part.unflatten(0, outputs.shape[:2]) for part in parts)
        mean, aleatoric = means.mean(0), noise.mean(0)
        squares = group_squares = (means - mean).square().sum(0)
        if self.group > 1:
            group_squares = (means.unflatten(0, (-1, self.group)).mean(1) - mean).square().sum(0)
        if self.count == 0:
            self.mean, self.aleatoric, self.squares, self.group_squares = mean, aleatoric, squares, group_squares
        else:
            share = len(outputs) / self.draws
            deviation = mean - self.mean
            between = share * self.count * deviation.square()
            self.mean += share * deviation
            self.aleatoric += share * (aleatoric - self.aleatoric)
            self.squares += squares + between
            if self.group > 1:
                self.group_squares += group_squares + between / self.group
        self.count = self.draws

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
        return (self.group_squares / (groups - 1) / groups).sqrt() if groups > 1 else self.mean * math.nan

    def result(self, readings: Readings, batch: int = 0) -> tuple[Prediction, Callable[[], None]]:
        """Return the prediction for one batch, and what raises if it is not finite.

        Args:
            readings: What is read from the device with that.
            batch: Number of the batch in messages.
        """
        error = self.error()
        total, epistemic = self.likelihood.split(self.mean, self.squares / self.count, self.aleatoric)
        check = self._finite_check(total, readings, batch)
        log_prob = None if self.target is None else self.log_density - math.log(self.count)
        found = Prediction(
            self.mean, total, self.aleatoric, epistemic, error, self.count, self.likelihood, (self.count,), log_prob
        )
        return found, check

    def _finite_check(self, total: Tensor, readings: Readings, batch: int) -> Callable[[], None]:
        values = [(~part.isfinite()).reshape(len(part), -1).sum(1) for part in (self.mean, total)]
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
