"""Running means: over the draws of one step, and over steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn


class Recorded(NamedTuple):
    """What one scope left behind, beside the gradients.

    Attributes:
        statistics: The method's own quantity by parameter, or by another key.
        scale: Factor that makes the statistics means over examples; or what will return it, once the device is read.
        grad_scale: Factor that makes the gradients means over examples.
    """

    statistics: Mapping[Any, Tensor]
    scale: float | Callable[[], float] = 1.0
    grad_scale: float = 1.0


class Averages:
    """Means over the draws since the last step: of the gradients, kept in `.grad`, and of the statistics.

    Attributes:
        statistics: The means of what the scopes recorded, once multiplied by `scale`.
        draws: Number of draws so far.
        total: Their weights in the means, added up.
        weight: What their losses are divided by, added up: of plain means their elements.
        square_weight: That of their squares, the sum of the squared weights of the elements.
    """

    def __init__(self) -> None:
        self.statistics: dict[Any, Tensor] = {}
        self._scale: float | Callable[[], float] = 1.0
        self.draws = 0
        self.total = 0.0
        self.weight = self.square_weight = 0.0

    @property
    def scale(self) -> float:
        """Factor that makes the statistics means over examples; that of the first draw. It may read the device."""
        if not isinstance(self._scale, float):
            self._scale = _number(self._scale)
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._scale = scale

    def add_weight(self, elements: float, weight: float | None) -> None:
        """Count the loss of a draw.

        Args:
            elements: Elements that it is a mean over; of a weighted mean their effective number, see
                `curvature.counts.effective_number`.
            weight: Sum of the elements' weights, where they have any.
        """
        own = elements if weight is None else weight
        self.weight += own
        self.square_weight += own**2 / elements

    def add(self, recorded: Recorded, earlier: Mapping[nn.Parameter, Tensor | None], weight: float = 1.0) -> None:
        """Fold a draw into the means.

        Args:
            recorded: What its scope left.
            earlier: The means of the gradients before it, where `.grad` holds its own; `.grad` becomes the new means.
            weight: How much it counts beside the others: the examples of a sample group.
        """
        self.draws += 1
        self.total += weight
        if self.draws == 1:
            self._scale = recorded.scale
        scale = 1.0 if self.draws == 1 else _number(recorded.scale) / self.scale  # of a batch of another size
        for parameter, mean in earlier.items():
            grad = parameter.grad
            if grad is not None and recorded.grad_scale != 1:
                grad = grad * recorded.grad_scale
            parameter.grad = self._mean(mean if self.draws > 1 else None, grad, weight / self.total)
        for key in {**self.statistics, **recorded.statistics}:
            new = recorded.statistics.get(key)
            if new is not None and scale != 1:
                new = new * scale
            self.statistics[key] = self._mean(self.statistics.get(key), new, weight / self.total)

    def _mean(self, mean: Tensor | None, new: Tensor | None, share: float) -> Any:
        """Return the mean over all draws, from that of all but the last, which it overwrites, and the last's share."""
        if self.draws == 1 or (mean is None and new is None):
            return new
        if mean is None:
            return new * share  # pyright: ignore[reportOptionalOperand]
        return mean.mul_(1 - share) if new is None else mean.lerp_(new, share)

    def apply_scale(self) -> None:
        """Multiply the statistics by `scale`, which is 1 from there."""
        for key, mean in self.statistics.items():
            self.statistics[key] = mean * self.scale
        self.scale = 1.0


def _number(value: float | Callable[[], float]) -> float:
    return value() if callable(value) else value


def kept_gradients(
    parameters: Iterable[nn.Parameter], spent: Mapping[nn.Parameter, weakref.ref[Tensor]]
) -> dict[nn.Parameter, Tensor | None]:
    """Return gradients, but for those that a step has used: they would take memory while a scope is open.

    Args:
        parameters: Parameters.
        spent: The gradients that the last step has used.
    """
    used = {parameter: grad() for parameter, grad in spent.items()}
    return {p: None if p.grad is used.get(p) else p.grad for p in parameters}


def set_gradients(grads: Mapping[nn.Parameter, Tensor | None]) -> None:
    """Give parameters these gradients."""
    for parameter, grad in grads.items():
        parameter.grad = grad


def corrected_weight(weight: float, step: int) -> float:
    """Return the weight of the newest term in a moving average that starts from nothing.

        w_t = w / (1 - (1 - w)^t)

    The first term has weight 1, so nothing of the initial value is left: the bias correction of Adam.
    """
    return weight / (1 - (1 - weight) ** step)
