"""What the steps of an epoch add up to beside loss and time, which a task shows while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Tally(Protocol):
    """A running measurement of the steps of one epoch; a checkpoint holds it, so that a resumed epoch adds to it.

    Attributes:
        sums: Numbers by name.
        tensors: Tensors by name, of a fixed shape, float64 on the CPU.
    """

    @property
    def sums(self) -> dict[str, float]: ...

    @property
    def tensors(self) -> dict[str, Tensor]: ...

    def add(self, output: Tensor | None, target: Tensor) -> None:
        """Add a step: what a learner put out, None where its optimiser tells nothing of it, and the targets."""
        ...

    def means(self, steps: int) -> dict[str, float]:
        """Return what is shown after so many steps."""
        ...

    def load(self, sums: Mapping[str, float], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what a checkpoint held; of `tensors`, which may hold more, by the own names."""
        ...


class LossAlone:
    """The tally of a task that shows the loss and nothing else."""

    sums: dict[str, float]
    tensors: dict[str, Tensor]

    def __init__(self):
        self.sums, self.tensors = {}, {}

    def add(self, output: Tensor | None, target: Tensor) -> None:
        """Leave it at the loss."""

    def means(self, steps: int) -> dict[str, float]:
        return {}

    def load(self, sums: Mapping[str, float], tensors: Mapping[str, Tensor]) -> None:
        """Leave it at the loss."""
