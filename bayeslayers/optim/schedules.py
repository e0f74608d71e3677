"""Schedules over the steps: the temperature's, as torch has them for the learning rate, and warm-ups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import ConstantLR, LinearLR, LRScheduler, SequentialLR

from bayeslayers.checks import at_least_one, fraction, positive


class TemperatureSchedule:
    """Multiplies the temperature of every group by a factor that depends on the step.

    It is used as torch's learning-rate schedulers are: made after the optimizer, `step()` after each
    `optimizer.step()`, and its state saved with theirs.

    Args:
        optimizer: Optimizer whose groups have a `temperature`.
        factor: Function from the number of steps taken to a factor > 0.

    Raises:
        ValueError: If a group has no temperature, or a factor is not > 0.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]):
        if any("temperature" not in group for group in optimizer.param_groups):
            raise ValueError(f"optimizer must have a temperature, got {type(optimizer).__name__}, which has none.")
        self.optimizer, self.factor, self.last_step = optimizer, factor, 0
        for group in optimizer.param_groups:
            group.setdefault("initial_temperature", group["temperature"])
        self._set()

    def step(self) -> None:
        """Move on by one step."""
        self.last_step += 1
        self._set()

    def _set(self) -> None:
        factor = positive("factor", self.factor(self.last_step))
        for group in self.optimizer.param_groups:
            group.setdefault("initial_temperature", group["temperature"])  # of a group added since
            group["temperature"] = group["initial_temperature"] * factor

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps; the temperatures are in the optimizer's state."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state; the optimizer's is loaded too."""
        self.last_step = state_dict["last_step"]
        self._set()


class TemperatureWarmup(TemperatureSchedule):
    """Raises the temperature linearly from `start` times its value to its value.

    The KL term, whose weight is T, is warmed up so: the first steps fit the data, and the posterior
    spreads out to the prior's pull later. Source: Osawa et al. 2019 (arXiv 1906.02506), section 3.

    Args:
        optimizer: Optimizer whose groups have a `temperature`.
        steps: Steps until the full temperature, >= 1.
        start: First factor, in (0, 1].
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, start: float = 0.01):
        at_least_one("steps", steps)
        fraction("start", start, one=True)
        super().__init__(optimizer, lambda step: start + (1 - start) * min(1.0, step / steps))


def lr_warmup(
    optimizer: torch.optim.Optimizer,
    steps: int,
    start: float = 0.01,
    then: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
) -> SequentialLR:
    """Return a schedule of the learning rate: linear from `start` times its value, then another one.

    Args:
        optimizer: The optimizer.
        steps: Steps until the full learning rate, >= 1.
        start: First factor, in (0, 1].
        then: Makes the schedule that follows, which counts its steps from the end of the warm-up; a
            constant one if None.

    Example:
        >>> import torch, bayeslayers as bl
        >>> optimizer = bl.VOGN(bl.BayesLinear(2, 1), dataset_size=100, lr=0.1)
        >>> cosine = lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90)
        >>> schedule = lr_warmup(optimizer, 10, then=cosine)
    """
    at_least_one("steps", steps)
    fraction("start", start, one=True)
    after = ConstantLR(optimizer, factor=1.0) if then is None else then(optimizer)
    return SequentialLR(optimizer, [LinearLR(optimizer, start, total_iters=steps), after], milestones=[steps])
