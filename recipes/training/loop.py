"""The training loop that the recipes share: progress, logs, checkpoints, exact resume, signals that save.

Every prefix of the writes of a run is a state that it goes on from. The checkpoint comes first; log, best posterior and
events of the epoch follow it, and are written again when a run goes on from the end of an epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn

from bayeslayers.files import write_atomically
from bayeslayers.likelihoods import Likelihood
from bayeslayers.metrics.calibration import CalibrationBins
from bayeslayers.optim import TemperatureWarmup
from bayeslayers.optim.base import VariationalOptimizer
from bayeslayers.storage.training_state import load_checkpoint, save_checkpoint
from bayeslayers.storage.weight_file import Weights
from recipes.data.augmentation import Augmentation
from recipes.data.split import Split, batches, num_batches
from recipes.training.interruption import interruption
from recipes.training.restore import check_optimizer, check_progress, in_a_sentence
from recipes.training.run_folder import CHECKPOINT, LOG, log_text


@dataclass
class Training:
    """One run: what is trained, on what, and how far it is.

    Attributes:
        folder: Where checkpoint and logs go.
        model: The network.
        forward: The network as it is called in training; compiled, say.
        optimizer: Its optimiser; `step(closure)` returns `(loss, output)`.
        schedulers: Schedules of learning rate and temperature, stepped after every batch.
        likelihood: The loss.
        data: Training split.
        augmentation: How its images are varied.
        batch_size: Examples per step.
        micro_batch: Examples per forward pass; a step adds up as many as it needs.
        epochs: Passes over the data.
        seed: Of the order of the data.
        measure: Returns metrics to log at the end of an epoch.
        chosen_by: The metric of the log whose lowest value marks the best epoch.
        on_best: Called with the row of an epoch that is the best so far.
        identity: What must be equal for a checkpoint to be resumed.
        checkpoint_minutes: Minutes between two checkpoints within an epoch.
        tensorboard: Whether events for TensorBoard are written.
        epoch: Epochs done.
        step: Steps done in the current epoch.
        sums: Sums of loss, accuracy and seconds over these steps.
        bins: Calibration over these steps.
        settings: Learning rate of the last step, and its temperature where the optimizer has one.
        rows: The log so far, one row an epoch.
        saved: Epochs and steps done of the last checkpoint, and when it was written; None before the first.
    """

    folder: Path
    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    schedulers: Sequence[LambdaLR | TemperatureWarmup]
    likelihood: Likelihood
    data: Split
    augmentation: Augmentation
    batch_size: int
    micro_batch: int
    epochs: int
    seed: int
    measure: Callable[[], dict[str, float]]
    chosen_by: str
    on_best: Callable[[dict[str, float]], None]
    identity: dict[str, Any]
    checkpoint_minutes: float = 10.0
    tensorboard: bool = False
    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=lambda: {"loss": 0.0, "accuracy": 0.0, "seconds": 0.0})
    bins: CalibrationBins = field(default_factory=CalibrationBins)
    settings: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    saved: tuple[int, int, float] | None = None

    def run(self) -> bool:
        """Train to the end; return whether it came to it, or was stopped by Ctrl-C or SIGTERM and saved."""
        columns = (
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        per_epoch = num_batches(self.data, self.batch_size)
        if not self._writes_posterior(self.epochs):
            raise ValueError(
                f"optimizer must have a posterior to write after {self.epochs} epochs of {per_epoch} steps, got one "
                f"that needs {steps_to_posterior(self.optimizer)} steps. Train longer, or lower optimizer.start_step."
            )
        done = self.epoch * per_epoch + self.step
        bar = _Progress(*columns, console=Console(stderr=True))
        began = time.monotonic()
        with bar as progress, interruption() as interrupted, self._events() as write:
            shown = {"epochs": self.epochs, "epoch": min(self.epoch + 1, self.epochs), "metrics": ""}
            task = progress.add_task("", total=self.epochs * per_epoch, completed=done, **shown)
            if self._between_epochs:
                self._record(write)
            while self.epoch < self.epochs:
                for x, y in batches(
                    self.data, self.batch_size, self.seed, self.epoch, self.step, augmentation=self.augmentation
                ):
                    self._step(x, y)
                    metrics = in_words(self.settings | self._means())
                    progress.update(task, advance=1, epoch=self.epoch + 1, metrics=metrics)
                    since = time.monotonic() - (self.saved[2] if self.saved else began)
                    if interrupted() or since >= 60 * self.checkpoint_minutes:
                        self.save()
                    if interrupted() and self.step < per_epoch:
                        return False
                if not self._end_epoch(write):
                    return False
                progress.console.print(f"epoch {self.epoch}/{self.epochs}: {in_words(self.rows[-1])}", highlight=False)
                if interrupted():
                    return False
        return True

    @property
    def _between_epochs(self) -> bool:
        return self.step == 0 and self.epoch > 0

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _step(self, x: Tensor, y: Tensor) -> None:
        began = time.perf_counter()

        x, y = x.to(self._device), y.to(self._device)

        def closure() -> tuple[Tensor, Tensor]:
            self.optimizer.zero_grad()
            losses, outputs = [], []
            for part, labels in zip(x.split(self.micro_batch), y.split(self.micro_batch), strict=True):
                outputs.append(self.forward(part))
                losses.append(self.likelihood.loss(outputs[-1], labels) * (len(part) / len(x)))
                losses[-1].backward()
            loss = torch.stack(losses).sum().detach()
            if not loss.isfinite():
                raise self._not_finite("the loss", loss, f"in step {self.step + 1}")
            return loss, torch.cat(outputs).detach()

        group = self.optimizer.param_groups[0]
        self.settings = {key: float(group[key]) for key in ("lr", "temperature") if key in group}
        loss, output = self.optimizer.step(closure)  # pyright: ignore
        self._check_weights()
        for scheduler in self.schedulers:
            scheduler.step()
        confidence, labels = self.likelihood.per_draw(output.double())[0].max(1)
        self.bins.add(confidence[:, None], (labels == y)[:, None])
        self.step += 1
        self.sums["loss"] += loss.item()
        self.sums["accuracy"] += float((labels == y).float().mean())
        self.sums["seconds"] += time.perf_counter() - began

    def _check_weights(self) -> None:
        """Refuse weights that the step has made infinite or NaN: nothing of them is to be saved."""
        weights = {name: weight.detach() for name, weight in self.model.named_parameters()}
        if torch.stack([weight.sum() for weight in weights.values()]).isfinite().all():  # one pass, one synchronisation
            return
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise self._not_finite(f"'{name}'", weight[~weight.isfinite()][0], f"after step {self.step + 1}")

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
        averaged = self._finalize()
        try:
            with interruption(at_once=True):
                if averaged:  # weights whose batch statistics no step has seen
                    images = batches(self.data, self.batch_size, self.seed, self.epoch, augmentation=self.augmentation)
                    update_bn(images, self.model, self._device)
                metrics = self.measure()
        except KeyboardInterrupt:
            self.save()
            return False
        self.rows.append(seconds | self.settings | train | metrics)
        self.epoch, self.step = self.epoch + 1, 0
        self.sums, self.bins = dict.fromkeys(self.sums, 0.0), CalibrationBins()
        self.save()
        self._record(write)
        return True

    def _record(self, write: Callable[[dict[str, float]], None]) -> None:
        """Write the log of the epochs done, and what the last of them leaves."""
        write_atomically(self.folder / LOG, log_text(self.rows).encode())
        rows = [row for row in self.rows if self._writes_posterior(row["epoch"])]
        values = [row[self.chosen_by] for row in rows if not math.isnan(row[self.chosen_by])]
        if rows and rows[-1][self.chosen_by] <= min(values, default=-math.inf):
            self.on_best(self.rows[-1])
        write(self.rows[-1])

    def _finalize(self) -> bool:
        """Let the optimizer write its posterior, if it has one yet; return whether it is of averaged weights.

        The next step takes training up from before.
        """
        if not isinstance(self.optimizer, VariationalOptimizer) or not self._writes_posterior(self.epoch + 1):
            return False
        self.optimizer.finalize()
        return self.optimizer.steps_to_posterior > 0

    def _writes_posterior(self, epochs: float) -> bool:
        """Whether there is something to save after so many epochs, which is not before a method's first posterior."""
        return epochs * num_batches(self.data, self.batch_size) >= steps_to_posterior(self.optimizer)

    def _means(self) -> dict[str, float]:
        """Return the metrics of this epoch's steps so far, measured while the weights moved."""
        means = {key: self.sums[key] / self.step for key in ("loss", "accuracy")}
        return means | {"ece": float(self.bins.errors())}

    def save(self) -> None:
        """Write the checkpoint."""
        parts = {"model": self.model, "optimizer": self.optimizer}
        own = {key: getattr(self, key) for key in ("epoch", "step", "sums", "settings", "rows", "identity")}
        own["bins"] = self.bins.sums
        states: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
        states["schedulers"] = [scheduler.state_dict() for scheduler in self.schedulers]
        device = self._device
        states["rng"] = torch.get_rng_state()
        states["cuda_rng"] = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        save_checkpoint(self.folder / CHECKPOINT, states | own)
        self.saved = self.epoch, self.step, time.monotonic()

    def resume(self) -> None:
        """Continue from the folder's checkpoint, exactly where it was saved.

        Raises:
            PosteriorError: If there is no checkpoint, or it is damaged.
            ValueError: If it is one of another configuration.
        """
        path = self.folder / CHECKPOINT
        state = load_checkpoint(path)
        if "bins" not in state:
            raise ValueError(f"checkpoint must be of this release, got {path} of an older one. Start a new run.")
        with in_a_sentence(path):
            before = dict(state["identity"])
        for key, value in self.identity.items():
            if before.get(key) != value:
                raise ValueError(
                    f"{key} must be as in the run to resume, {before.get(key)!r}, got {value!r}. "
                    "Choose another --output to start a new run."
                )
        with in_a_sentence(path):
            check_progress(state, self.sums, self.bins.sums)
            self._check_extent(state)
            Weights(path, state["model"]).fill(self.model)
            self.optimizer.load_state_dict(state["optimizer"])
            check_optimizer(self.optimizer)
            for scheduler, own in zip(self.schedulers, state["schedulers"], strict=True):
                scheduler.load_state_dict(own)
            torch.set_rng_state(state["rng"])
            if self._device.type == "cuda" and state.get("cuda_rng") is not None:
                torch.cuda.set_rng_state(state["cuda_rng"], self._device)
        self.epoch, self.step, self.sums, self.rows = (state[key] for key in ("epoch", "step", "sums", "rows"))
        self.bins.sums, self.settings = state["bins"], state.get("settings", {})
        self.saved = self.epoch, self.step, time.monotonic()

    def _check_extent(self, state: dict[str, Any]) -> None:
        """Refuse progress beyond the end of the run, and a log without what the best epoch is chosen by."""
        steps = num_batches(self.data, self.batch_size)
        if state["epoch"] > self.epochs or state["step"] > steps:
            raise ValueError(
                f"it is at step {state['step']} of epoch {state['epoch'] + 1}, beyond {self.epochs} epochs of {steps}"
            )
        if any(row.keys() != state["rows"][0].keys() or self.chosen_by not in row for row in state["rows"]):
            raise ValueError(f"rows must have the same columns, with {self.chosen_by}")

    @contextmanager
    def _events(self) -> Iterator[Callable[[dict[str, float]], None]]:
        if not self.tensorboard:
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


def steps_to_posterior(optimizer: torch.optim.Optimizer) -> int:
    """Return after how many steps an optimizer has a posterior to write; torch's own leave the means alone at once."""
    return optimizer.steps_to_posterior if isinstance(optimizer, VariationalOptimizer) else 0


class _Progress(Progress):
    """A progress bar with its metrics on a line below, where 80 columns hold them."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            yield Text(task.fields["metrics"])


def in_words(metrics: dict[str, float]) -> str:
    """Return metrics as a line, without what is said elsewhere.

    >>> in_words({"epoch": 1.0, "seconds": 2.0, "lr": 0.001, "train_loss": 0.5, "test_ece": 0.01})
    'lr 0.001  train loss 0.5000  test ece 0.0100'
    """
    form = {"lr": ".2g", "temperature": ".2g"}
    shown = {key: value for key, value in metrics.items() if key not in ("epoch", "seconds")}
    return "  ".join(f"{key.replace('_', ' ')} {value:{form.get(key, '.4f')}}" for key, value in shown.items())
