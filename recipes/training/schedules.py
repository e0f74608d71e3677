"""Learning rate and temperature over a run, as functions of the step alone, so that a resumed run agrees."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch.optim.lr_scheduler import LambdaLR

from bayeslayers.checks import did_you_mean, fraction, non_negative, positive
from bayeslayers.optim import TemperatureWarmup

NAMES = ("cosine", "constant", "step", "exponential", "trapezoid")


@dataclass
class Schedule:
    """Learning rate and temperature over a run.

    Attributes:
        name: "cosine" to zero at the end, "constant", "step" (times `gamma` at each milestone),
            "exponential" (times `gamma` every epoch) or "trapezoid" (constant, then straight to zero at the
            end, Hägele et al. 2024, arXiv 2405.18392: until it falls, a longer run is the same).
        gamma: Factor of "step" and "exponential", > 0.
        milestones: Epochs after which "step" lowers the learning rate.
        decay_epochs: Epochs in which "trapezoid" falls, > 0.
        warmup_epochs: Epochs in which the learning rate rises linearly to its value.
        warmup_start: Factor at the first step of that, in (0, 1].
        temperature_steps: Steps in which the temperature (the weight of the KL term) rises linearly.
        temperature_start: Factor at the first step of that, in (0, 1].
    """

    name: str = "cosine"
    gamma: float = 0.1
    milestones: list[int] = field(default_factory=list)
    decay_epochs: float = 10.0
    warmup_epochs: float = 0.0
    warmup_start: float = 0.01
    temperature_steps: int = 0
    temperature_start: float = 0.01

    def check(self) -> None:
        """Refuse a schedule that breaks a rule, by name."""
        if self.name not in NAMES:
            raise ValueError(
                f"schedule.name must be one of {', '.join(NAMES)}, got {self.name!r}.{did_you_mean(self.name, NAMES)}"
            )
        positive("schedule.gamma", self.gamma)
        positive("schedule.decay_epochs", self.decay_epochs)
        non_negative("schedule.warmup_epochs", self.warmup_epochs)
        non_negative("schedule.temperature_steps", self.temperature_steps)
        fraction("schedule.warmup_start", self.warmup_start, one=True)
        fraction("schedule.temperature_start", self.temperature_start, one=True)

    def factor(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """Return the factor of the learning rate at a step, counted from 0."""
        epoch = step // steps_per_epoch
        rise = self.warmup_epochs * steps_per_epoch
        warmup = 1.0 if step >= rise else self.warmup_start + (1 - self.warmup_start) * step / rise
        if self.name == "cosine":
            return warmup * (1 + math.cos(math.pi * step / (steps_per_epoch * epochs))) / 2
        if self.name == "step":
            return warmup * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)
        if self.name == "trapezoid":
            return warmup * min(1.0, (epochs - step / steps_per_epoch) / self.decay_epochs)
        return warmup * (self.gamma**epoch if self.name == "exponential" else 1.0)


def make_schedulers(
    schedule: Schedule, optimizer: torch.optim.Optimizer, steps_per_epoch: int, epochs: int
) -> list[LambdaLR | TemperatureWarmup]:
    """Return the schedulers to step after every batch.

    Raises:
        ValueError: If a temperature is to be warmed up that the optimizer does not have.
    """
    rate = LambdaLR(optimizer, lambda step: schedule.factor(step, steps_per_epoch, epochs))
    if not schedule.temperature_steps:
        return [rate]
    return [rate, TemperatureWarmup(optimizer, schedule.temperature_steps, schedule.temperature_start)]
