"""Running means: over the draws of one step, and over steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

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


Gradients: TypeAlias = Sequence[Tensor | None]  # of parameters in their order: a dict would hash each in Python


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

    def add(
        self, recorded: Recorded, parameters: Iterable[nn.Parameter], earlier: Gradients, weight: float = 1.0
    ) -> None:
        """Fold a draw into the means.

        Args:
            recorded: What its scope left.
            parameters: Those with gradients.
            earlier: The means of the gradients before it, where `.grad` holds its own; `.grad` becomes the new means.
            weight: How much it counts beside the others: the examples of a sample group.
        """
        self.draws += 1
        self.total += weight
        if recorded.grad_scale != 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = parameter.grad * recorded.grad_scale
        if self.draws == 1:
            self.statistics, self._scale = dict(recorded.statistics), recorded.scale
            return
        share, scale = weight / self.total, _number(recorded.scale) / self.scale  # of a batch of another size
        for parameter, mean in zip(parameters, earlier, strict=True):
            parameter.grad = _mean(mean, parameter.grad, share)
        for key in {**self.statistics, **recorded.statistics}:
            new = recorded.statistics.get(key)
            if new is not None and scale != 1:
                new = new * scale
            self.statistics[key] = _mean(self.statistics.get(key), new, share)

    def apply_scale(self) -> None:
        """Multiply the statistics by `scale`, which is 1 from there."""
        for key, mean in self.statistics.items():
            self.statistics[key] = mean * self.scale
        self.scale = 1.0


def _mean(mean: Tensor | None, new: Tensor | None, share: float) -> Any:
    """Return the mean over all draws, from that of all but the last, which it overwrites, and the last's share."""
    if mean is None:
        return None if new is None else new * share
    return mean.mul_(1 - share) if new is None else mean.lerp_(new, share)


def _number(value: float | Callable[[], float]) -> float:
    return value() if callable(value) else value


def kept_gradients(parameters: Iterable[nn.Parameter], spent: Iterable[weakref.ref[Tensor]]) -> Gradients:
    """Return gradients, but for those that a step has used: they would take memory while a scope is open.

    Args:
        parameters: Parameters.
        spent: The gradients that the last step has used.
    """
    used = {id(ref()) for ref in spent}
    return [None if id(grad := p.grad) in used else grad for p in parameters]


def set_gradients(parameters: Iterable[nn.Parameter], grads: Iterable[Tensor | None]) -> None:
    """Give parameters these gradients."""
    for parameter, grad in zip(parameters, grads, strict=False):
        parameter.grad = grad


def corrected_weight(weight: float, step: int) -> float:
    """Return the weight of the newest term in a moving average that starts from nothing.

        w_t = w / (1 - (1 - w)^t)

    The first term has weight 1, so nothing of the initial value is left: the bias correction of Adam.
    """
    return weight / (1 - (1 - weight) ** step)
