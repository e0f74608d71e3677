"""What the training loop asks of a task, and how a run goes through its epochs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from bayeslayers.distributed import World
from recipes.training.learner import Learner
from recipes.training.tally import Tally


class Trainable(Protocol):
    """What the loop asks of a task, see `recipes.tasks.task.Task`.

    Attributes:
        learners: The networks in training, by name; a task of one network calls it "".
        steps_per_epoch: Batches of an epoch.
        chosen_by: The metric of the log whose lowest value marks the best epoch; None to mark none.
    """

    learners: dict[str, Learner]
    chosen_by: str | None

    @property
    def steps_per_epoch(self) -> int: ...

    def before_epoch(self, epoch: int, step: int) -> None:
        """Prepare for the steps of an epoch from one on; its first, unless a run is resumed within it."""
        ...

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets of an epoch from a step on; a function of the two alone."""
        ...

    def parts(self, epoch: int, start: int, world: World) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield a rank's parts of these batches, with the examples of all ranks."""
        ...

    def move(self, x: Tensor, y: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return a batch on a device."""
        ...

    def tally(self) -> Tally:
        """Return an empty tally of an epoch."""
        ...

    def measure_epoch(self) -> dict[str, float]:
        """Return metrics to log at the end of an epoch."""
        ...

    def on_epoch(self, epoch: int) -> None:
        """Show something after so many epochs, 0 before the first."""
        ...

    def on_best(self, row: Mapping[str, float]) -> None:
        """Keep the networks of an epoch that is the best so far, whose row of the log this is."""
        ...

    def describe(self, row: Mapping[str, float]) -> str:
        """Return what is printed of an epoch's row of the log; nothing if it is empty."""
        ...


@dataclass(frozen=True)
class Plan:
    """How a run goes through its epochs.

    Attributes:
        epochs: Passes over the data.
        micro_batch: Examples per forward pass; None for all of a batch.
        checkpoint_minutes: Minutes between two checkpoints within an epoch.
        tensorboard: Whether events for TensorBoard are written.
        identity: What must be equal for a checkpoint to be resumed.
        seed: Of what torch's default generator draws, as for dropout.
    """

    epochs: int
    micro_batch: int | None = None
    checkpoint_minutes: float = 10.0
    tensorboard: bool = False
    identity: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
