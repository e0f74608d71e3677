"""What a task is, and the run that every task makes of itself.

A task says what its splits are and how a batch is moved, which likelihood its networks have, what it shows while it
trains, how it is measured, what its report shows and what its card records. `Task` is what the training loop and a run
need of any task; `recipes.tasks.posterior_task.PosteriorTask` is the one that most extend: one network, whose posterior
is trained, measured and saved. A new task is one file, its configurations, and a line in `recipes.tasks.table`.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from bayeslayers.display import printable
from bayeslayers.distributed import World, agree, start, telling_failures
from bayeslayers.plots import training_curves
from bayeslayers.storage.training_state import load_checkpoint
from recipes.training.devices import device_in_place
from recipes.training.interruption import interruption
from recipes.training.launch import decided_by_leader, restore_rank_state, stopping_by
from recipes.training.learner import Learner
from recipes.training.loop import Plan, Training
from recipes.training.run_folder import CHECKPOINT, CURVES, WRITTEN, check_folder, clear_leftovers, has_checkpoint, kept
from recipes.training.run_lock import locked, refuse_many_processes
from recipes.training.shown import in_words
from recipes.training.tally import LossAlone, Tally


class Task(ABC):
    """A task, of one configuration.

    Attributes:
        name: What a configuration calls it, as its `recipe`.
        Config: Class of its configurations, a dataclass with at least `name`, `output`, `seed` and `epochs`.
        resumable: Whether a run keeps checkpoint, log and curves while it trains, and can be resumed.
        leaves: What a run writes to its folder.
        config: The configuration.
        learners: The networks in training by name, after `prepare`; that of a task of one network is "".
        chosen_by: The metric of the log whose lowest value marks the best epoch; None to mark none.
        world: The processes that train it.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    resumable: ClassVar[bool] = True
    leaves: ClassVar[Sequence[str]] = WRITTEN
    learners: dict[str, Learner]
    chosen_by: str | None = None
    world: World = World()

    def __init__(self, config: Any):
        self.config = config

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.output or f"runs/{self.config.name}")

    # A run, in the order in which it asks.

    @abstractmethod
    def check(self) -> None:
        """Refuse a configuration that would fail only after the training."""

    def goes_on(self, resume: bool) -> bool:
        """Return whether the run folder holds a run to go on with; refuse one that would be written over."""
        return has_checkpoint(self.folder, resume)

    @abstractmethod
    def prepare(self, resume: bool, command: str) -> None:
        """Read the data and make the learners; refuse data and networks that do not fit.

        Args:
            resume: Whether their state comes from a checkpoint.
            command: How this run was asked for, for the card.
        """

    @abstractmethod
    def plan(self) -> Plan:
        """Return how the run goes through its epochs."""

    def begin(self) -> None:  # noqa: B027 (a hook)
        """Write what the folder of a run holds from its beginning on."""

    def run_loop(self, loop: Training) -> bool:
        """Run the training loop; return whether it came to its end."""
        return loop.run()

    @abstractmethod
    def measure(self, rows: Sequence[Mapping[str, float]], progress: bool) -> dict[str, float]:
        """Return the metrics of the trained networks, those of the card.

        Args:
            rows: The training's log.
            progress: Whether to show a progress bar.
        """

    @abstractmethod
    def write(self, rows: Sequence[Mapping[str, float]], metrics: Mapping[str, float]) -> str:
        """Write what a finished run leaves, the metrics last, for they say that it is; return its names, in words."""

    def stopped(self, epochs: int, measured: bool) -> str:
        """Return what is said of a run that a signal has stopped.

        Args:
            epochs: Epochs done.
            measured: Whether it was measured.
        """
        late = "before its report was written" if measured else "before it was measured"
        where = f"in epoch {epochs + 1}" if epochs < self.config.epochs else late
        return f"stopped and saved {where}; continue with --resume"

    @classmethod
    def metrics_table(cls, metrics: Mapping[str, float]) -> Table:
        """Return what `train` returned as a table."""
        table = Table("metric")
        table.add_column("value", justify="right")
        for key, value in metrics.items():
            table.add_row(Text(printable(key)), f"{value:.4f}" if isinstance(value, float) else str(value))
        return table

    # What the training loop asks, see `recipes.training.loop.Trainable`.

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""

    def before_epoch(self, epoch: int, step: int) -> None:  # noqa: B027 (a hook)
        """Prepare for the steps of an epoch from one on; its first, unless a run is resumed within it."""

    @abstractmethod
    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets of an epoch from a step on; a function of the two alone."""

    def parts(self, epoch: int, start: int, world: World) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield a rank's parts of the batches, with the examples of all ranks. A task of files reads its own alone."""
        for x, y in self.batches(epoch, start):
            own = world.part(len(x))
            yield x[own], y[own], len(x)

    def move(self, x: Tensor, y: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return a batch on a device."""
        return x.to(device), y.to(device)

    def tally(self) -> Tally:
        """Return an empty tally of what is shown of an epoch's steps beside the loss."""
        return LossAlone()

    @abstractmethod
    def measure_epoch(self) -> dict[str, float]:
        """Return metrics to log at the end of an epoch."""

    def on_epoch(self, epoch: int) -> None:  # noqa: B027 (a hook)
        """Show something after so many epochs, 0 before the first."""

    def on_best(self, row: Mapping[str, float]) -> None:  # noqa: B027 (a hook)
        """Keep the networks of an epoch that is the best so far, whose row of the log this is."""

    def describe(self, row: Mapping[str, float]) -> str:
        """Return what is printed of an epoch's row of the log; nothing if it is empty."""
        return in_words(row)

    def train(self, resume: bool = False, command: str = "") -> dict[str, float] | None:
        """Train, measure and save.

        Args:
            resume: Continue from the run folder's checkpoint.
            command: How this run was asked for, for the card.

        Returns:
            The metrics, or None if Ctrl-C or SIGTERM stopped the run.

        Raises:
            ValueError: If the configuration breaks a rule.
            FileExistsError: If the run folder holds another run.
            BlockingIOError: If another training writes to the same folder.
        """
        if resume and not self.resumable:
            raise ValueError(f"resume must be off for {self.name}, which keeps no checkpoint. Start it again.")
        with start(device_in_place(getattr(self.config, "device", None))) as self.world, telling_failures():
            if self.world.size == 1:
                refuse_many_processes()  # of a launcher that has not said which one this is
            return self._train(resume or self.world.restarts > 0, command)

    def _train(self, resume: bool, command: str) -> dict[str, float] | None:
        agree({"configuration": dataclasses.asdict(self.config)})
        self.check()
        if self.world.leads:
            check_folder("output", self.folder)
            if resume and not self.folder.exists() and self.world.restarts == 0:
                load_checkpoint(self.folder / CHECKPOINT)  # raises
        with locked(self.folder) if self.world.leads else nullcontext():
            goes_on = decided_by_leader(self.world, lambda: self.goes_on(resume))
            if resume and not goes_on and self.world.leads:
                Console(stderr=True).print("no checkpoint yet: the run starts from the beginning")
            return _run(self, goes_on, command)


def _run(task: Task, resume: bool, command: str) -> dict[str, float] | None:
    console, folder, world = Console(stderr=True), task.folder, task.world
    task.prepare(resume, command)
    plan = task.plan()
    loop = Training(task, plan, folder if task.resumable else None, world)
    restore_rank_state(world, [], plan.seed)
    if resume:
        loop.resume(folder / CHECKPOINT)
    metrics = left = None
    with kept(folder):
        if world.leads:
            clear_leftovers(folder, task.leaves)
            task.begin()
        finished = task.run_loop(loop)
        # All is saved. Ranks stop together, between two batches of the measurement.
        with suppress(KeyboardInterrupt), interruption(at_once=world.size == 1) as stopped, stopping_by(stopped):
            if loop.rows and task.resumable and world.leads:
                training_curves(loop.rows, folder / CURVES)
            if finished:
                metrics = task.measure(loop.rows, progress=console.is_terminal and world.size == 1)
                if not world.leads:
                    return metrics
                with _shown_on_error(metrics, console):
                    left = task.write(loop.rows, metrics)
    if not world.leads:
        return None
    if left is None:
        console.print(task.stopped(loop.epoch, measured=metrics is not None))
        return None
    console.print(Text(printable(f"written to {folder}{left}")))
    return metrics


@contextmanager
def _shown_on_error(metrics: Mapping[str, float], console: Console) -> Iterator[None]:
    """Print metrics that could not be written."""
    try:
        yield
    except BaseException:
        console.print_json(json.dumps(metrics))
        raise
