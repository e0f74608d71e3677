"""Running means over the draws of one step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Recorded(NamedTuple):
    """What one scope left behind, beside the gradients.

    Attributes:
        statistics: The method's own quantity by parameter, or by another key.
        scale: Factor that makes the statistics means over examples.
        grad_scale: Factor that makes the gradients means over examples.
    """

    statistics: Mapping[Any, Tensor]
    scale: float = 1.0
    grad_scale: float = 1.0


class Averages:
    """Means over the draws since the last step: of the gradients, kept in `.grad`, and of the statistics.

    Attributes:
        statistics: The means of what the scopes recorded, once multiplied by `scale`.
        scale: Factor that makes them means over examples; that of the first draw.
        draws: Number of draws so far.
        weight: Elements of their losses, added up.
    """

    def __init__(self) -> None:
        self.statistics: dict[Any, Tensor] = {}
        self.scale = 1.0
        self.draws = 0
        self.weight = 0.0

    def add(self, recorded: Recorded, earlier: Mapping[nn.Parameter, Tensor | None]) -> None:
        """Fold a draw into the means.

        Args:
            recorded: What its scope left.
            earlier: The means of the gradients before it, where `.grad` holds its own; `.grad` becomes the new means.
        """
        self.draws += 1
        if self.draws == 1:
            self.scale = recorded.scale
        for parameter, mean in earlier.items():
            grad = parameter.grad
            if grad is not None and recorded.grad_scale != 1:
                grad = grad * recorded.grad_scale
            parameter.grad = self._mean(mean if self.draws > 1 else None, grad)
        for key in {**self.statistics, **recorded.statistics}:
            new = recorded.statistics.get(key)
            if new is not None and recorded.scale != self.scale:  # a draw on a batch of another size
                new = new * (recorded.scale / self.scale)
            self.statistics[key] = self._mean(self.statistics.get(key), new)

    def _mean(self, mean: Tensor | None, new: Tensor | None) -> Any:
        """Return the mean over all draws, from that of all but the last and the last."""
        if self.draws == 1 or (mean is None and new is None):
            return new
        if mean is None:
            return new / self.draws  # pyright: ignore[reportOptionalOperand]
        return torch.lerp(mean, torch.zeros_like(mean) if new is None else new, 1 / self.draws)

    def apply_scale(self) -> None:
        """Multiply the statistics by `scale`, which is 1 from there."""
        for key, mean in self.statistics.items():
            self.statistics[key] = mean * self.scale
        self.scale = 1.0
