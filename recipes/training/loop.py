"""The training loop that all tasks share: progress, logs, checkpoints, exact resume, signals that save.

Every prefix of the writes of a run is a state that it goes on from. The checkpoint comes first; log, best posterior and
events of the epoch follow it, and are written again when a run goes on from the end of an epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from bayeslayers.files import write_atomically
from bayeslayers.storage.training_state import load_checkpoint, save_checkpoint
from bayeslayers.storage.weight_file import Weights
from recipes.training.interruption import interruption
from recipes.training.learner import Learner
from recipes.training.restore import check_optimizer, check_progress, in_a_sentence
from recipes.training.run_folder import CHECKPOINT, LOG, log_text
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
    """

    epochs: int
    micro_batch: int | None = None
    checkpoint_minutes: float = 10.0
    tensorboard: bool = False
    identity: dict[str, Any] = field(default_factory=dict)


class Training:
    """One run: what is trained, and how far it is.

    Attributes:
        task: What is trained.
        plan: How.
        folder: Where checkpoint and logs go; None to keep neither.
        epoch: Epochs done.
        step: Steps done in the current epoch.
        sums: Sums of the losses and seconds over these steps.
        tally: What the task adds up over them.
        settings: Learning rate of the last step, and its temperature where the optimizer has one.
        rows: The log so far, one row an epoch.
        saved: Epochs and steps done of the last checkpoint, and when it was written; None before the first.
    """

    def __init__(self, task: Trainable, plan: Plan, folder: Path | None = None):
        self.task, self.plan, self.folder = task, plan, folder
        self.epoch = self.step = 0
        self.settings: dict[str, float] = {}
        self.rows: list[dict[str, float]] = []
        self.saved: tuple[int, int, float] | None = None
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.sums = {_key(name, "loss"): 0.0 for name in self.task.learners} | {"seconds": 0.0}
        self.tally = self.task.tally()

    def run(self) -> bool:
        """Train to the end; return whether it came to it, or was stopped by Ctrl-C or SIGTERM and saved."""
        columns = (
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        epochs, per_epoch = self.plan.epochs, self.task.steps_per_epoch
        if not self._writes_posterior(epochs):
            raise ValueError(
                f"optimizer must have a posterior to write after {epochs} epochs of {per_epoch} steps, got one that "
                f"needs {self._steps_to_posterior()} steps. Train longer, or lower optimizer.start_step."
            )
        done = self.epoch * per_epoch + self.step
        bar = _Progress(*columns, console=Console(stderr=True))
        began = time.monotonic()
        with bar as progress, interruption() as interrupted, self._events() as write:
            shown = {"epochs": epochs, "epoch": min(self.epoch + 1, epochs), "metrics": ""}
            task = progress.add_task("", total=epochs * per_epoch, completed=done, **shown)
            if self._between_epochs:
                self._record(write)
            elif done == 0:
                self.task.on_epoch(0)
            while self.epoch < epochs:
                self.task.before_epoch(self.epoch, self.step)
                for x, y in self.task.batches(self.epoch, self.step):
                    self._step(x, y)
                    metrics = in_words(self.settings | self._means())
                    progress.update(task, advance=1, epoch=self.epoch + 1, metrics=metrics)
                    since = time.monotonic() - (self.saved[2] if self.saved else began)
                    if interrupted() or since >= 60 * self.plan.checkpoint_minutes:
                        self.save()
                    if interrupted() and self.step < per_epoch:
                        return False
                if not self._end_epoch(write):
                    return False
                if text := self.task.describe(self.rows[-1]):
                    progress.console.print(f"epoch {self.epoch}/{epochs}: {text}", highlight=False)
                if interrupted():
                    return False
        return True

    @property
    def _between_epochs(self) -> bool:
        return self.step == 0 and self.epoch > 0

    @property
    def _device(self) -> torch.device:
        return next(iter(self.task.learners.values())).device

    def _step(self, x: Tensor, y: Tensor) -> None:
        began = time.perf_counter()
        x, y = self.task.move(x, y, self._device)
        for name, learner in self.task.learners.items():
            self.settings |= {_key(name, key): value for key, value in learner.settings.items()}
            loss, output = learner.step(x, y, self.plan.micro_batch, self._check_loss)
            if bad := learner.bad_weight():  # nothing of it is to be saved
                raise self._not_finite(f"'{bad[0]}'", bad[1], f"after step {self.step + 1}")
            self.tally.add(output, y)
            self.sums[_key(name, "loss")] += loss.item()
        self.step += 1
        self.sums["seconds"] += time.perf_counter() - began

    def _check_loss(self, loss: Tensor) -> None:
        if not loss.isfinite():
            raise self._not_finite("the loss", loss, f"in step {self.step + 1}")

    def _not_finite(self, what: str, value: Tensor, when: str) -> FloatingPointError:
        kept = ""
        if self.saved:
            kept = f" The checkpoint after step {self.saved[1]} of epoch {self.saved[0] + 1} is kept."
        return FloatingPointError(
            f"{what} must be finite, got {value.item()} {when} of epoch {self.epoch + 1}, where the run stops. "
            f"Lower optimizer.lr.{kept}"
        )

    def _end_epoch(self, write: Callable[[dict[str, float]], None]) -> bool:
        """Measure the epoch, save it and record it; return whether no signal stopped the measurement."""
        seconds = {"epoch": self.epoch + 1, "seconds": self.sums["seconds"]}
        train = {f"train_{key}": value for key, value in self._means().items()}
        finalized = [
            learner
            for learner in self.task.learners.values()
            if self._writes_posterior(self.epoch + 1) and learner.finalize()  # the next step goes on from before
        ]
        try:
            with interruption(at_once=True):
                for learner in finalized:
                    learner.refresh_statistics(self.task.batches(self.epoch, 0))
                metrics = self.task.measure_epoch()
        except KeyboardInterrupt:
            self.save()
            return False
        self.rows.append(seconds | self.settings | train | metrics)
        self.epoch, self.step = self.epoch + 1, 0
        self._begin_epoch()
        self.save()
        self._record(write)
        self.task.on_epoch(self.epoch)
        return True

    def _record(self, write: Callable[[dict[str, float]], None]) -> None:
        """Write the log of the epochs done, and what the last of them leaves."""
        if self.folder is None:
            return
        write_atomically(self.folder / LOG, log_text(self.rows).encode())
        if (key := self.task.chosen_by) is not None:
            rows = [row for row in self.rows if self._writes_posterior(row["epoch"])]
            values = [row[key] for row in rows if not math.isnan(row[key])]
            if rows and rows[-1][key] <= min(values, default=-math.inf):
                self.task.on_best(self.rows[-1])
        write(self.rows[-1])

    def _writes_posterior(self, epochs: float) -> bool:
        """Whether there is something to save after so many epochs, which is not before a method's first posterior."""
        return epochs * self.task.steps_per_epoch >= self._steps_to_posterior()

    def _steps_to_posterior(self) -> int:
        return max(learner.steps_to_posterior for learner in self.task.learners.values())

    def _means(self) -> dict[str, float]:
        """Return the metrics of this epoch's steps so far, measured while the weights moved."""
        losses = {key: value / self.step for key, value in self.sums.items() if key != "seconds"}
        return losses | self.tally.means(self.step)

    def _all_sums(self) -> dict[str, float]:
        seconds = {"seconds": self.sums["seconds"]}
        return {key: value for key, value in self.sums.items() if key != "seconds"} | self.tally.sums | seconds

    def save(self) -> None:
        """Write the checkpoint."""
        if self.folder is None:
            return
        device = self._device
        states: dict[str, Any] = {
            _key(name, key): value
            for name, learner in self.task.learners.items()
            for key, value in learner.state().items()
        }
        states |= {key: getattr(self, key) for key in ("epoch", "step", "settings", "rows")}
        states |= {"sums": self._all_sums(), "identity": self.plan.identity} | self.tally.tensors
        states["rng"] = torch.get_rng_state()
        states["cuda_rng"] = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        save_checkpoint(self.folder / CHECKPOINT, states)
        self.saved = self.epoch, self.step, time.monotonic()

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint, exactly where it was saved.

        Raises:
            PosteriorError: If there is no checkpoint, or it is damaged.
            ValueError: If it is one of another configuration.
        """
        state = load_checkpoint(path)
        if not self.tally.tensors.keys() <= state.keys():
            raise ValueError(f"checkpoint must be of this release, got {path} of an older one. Start a new run.")
        self._check_identity(path, state)
        with in_a_sentence(path):
            check_progress(state, self._all_sums(), self.tally.tensors)
            self._check_extent(state)
            for name, learner in self.task.learners.items():
                own = {key: state[_key(name, key)] for key in ("model", "optimizer", "schedulers")}
                Weights(path, own["model"]).fill(learner.model)
                learner.load(own)
                check_optimizer(learner.optimizer)
            torch.set_rng_state(state["rng"])
            if self._device.type == "cuda" and state.get("cuda_rng") is not None:
                torch.cuda.set_rng_state(state["cuda_rng"], self._device)
        self.epoch, self.step, self.rows = (state[key] for key in ("epoch", "step", "rows"))
        self.sums = {key: state["sums"][key] for key in self.sums}
        self.tally.load({key: state["sums"][key] for key in self.tally.sums}, state)
        self.settings = state.get("settings", {})
        self.saved = self.epoch, self.step, time.monotonic()

    def _check_identity(self, path: Path, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another configuration."""
        with in_a_sentence(path):
            before = dict(state["identity"])
        for key, value in self.plan.identity.items():
            if before.get(key) != value:
                raise ValueError(
                    f"{key} must be as in the run to resume, {before.get(key)!r}, got {value!r}. "
                    "Choose another --output to start a new run."
                )

    def _check_extent(self, state: dict[str, Any]) -> None:
        """Refuse progress beyond the end of the run, and a log without what the best epoch is chosen by."""
        steps, chosen_by = self.task.steps_per_epoch, self.task.chosen_by
        if state["epoch"] > self.plan.epochs or state["step"] > steps:
            raise ValueError(
                f"it is at step {state['step']} of epoch {state['epoch'] + 1}, beyond {self.plan.epochs} epochs of "
                f"{steps}"
            )
        if any(row.keys() != state["rows"][0].keys() or chosen_by not in {None, *row} for row in state["rows"]):
            raise ValueError(f"rows must have the same columns, with {chosen_by}")

    @contextmanager
    def _events(self) -> Iterator[Callable[[dict[str, float]], None]]:
        if self.folder is None or not self.plan.tensorboard:
            yield lambda _: None
            return
        from torch.utils.tensorboard import SummaryWriter

        # Of a resumed run: the last epoch's events come again.
        writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.epoch + (not self._between_epochs))

        def write(row: dict[str, float]) -> None:
            for key, value in row.items():
                writer.add_scalar(key, value, int(row["epoch"]))

        try:
            yield write
        finally:
            writer.close()


def _key(name: str, key: str) -> str:
    """Return a key of one learner of several; of the only one, which has no name, the key itself."""
    return f"{name}_{key}" if name else key


class _Progress(Progress):
    """A progress bar with its metrics on a line below, where 80 columns hold them."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            yield Text(task.fields["metrics"])


def in_words(metrics: Mapping[str, float]) -> str:
    """Return metrics as a line, without what is said elsewhere.

    >>> in_words({"epoch": 1.0, "seconds": 2.0, "lr": 0.001, "train_loss": 0.5, "test_ece": 0.01})
    'lr 0.001  train loss 0.5000  test ece 0.0100'
    """
    shown = {key: value for key, value in metrics.items() if key not in ("epoch", "seconds")}
    return "  ".join(f"{key.replace('_', ' ')} {value:{_form(key)}}" for key, value in shown.items())


def _form(key: str) -> str:
    return ".2g" if key.endswith(("lr", "temperature")) else ".4f"
