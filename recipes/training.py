"""The training loop that the recipes share: progress, logs, checkpoints, exact resume, Ctrl-C that saves."""

from __future__ import annotations

import csv
import io
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from bayeslayers.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from bayeslayers.likelihoods import Likelihood
from bayeslayers.optim import TemperatureWarmup
from recipes.data import Split, batches, num_batches

CHECKPOINT, LOG = "checkpoint.safetensors", "log.csv"


@dataclass
class Training:
    """One run: what is trained, on what, and how far it is.

    Attributes:
        folder: Where checkpoint and logs go.
        model: The network.
        optimizer: Its optimiser; `step(closure)` returns `(loss, output)`.
        schedulers: Schedules of learning rate and temperature, stepped after every batch.
        likelihood: The loss.
        data: Training split.
        batch_size: Examples per step.
        epochs: Passes over the data.
        seed: Of the order of the data.
        measure: Returns figures to log at the end of an epoch.
        identity: What must be equal for a checkpoint to be resumed.
        epoch: Epochs done.
        step: Steps done in the current epoch.
        sums: Sums of loss and accuracy over these steps.
        rows: The log so far, one row an epoch.
    """

    folder: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedulers: Sequence[LambdaLR | TemperatureWarmup]
    likelihood: Likelihood
    data: Split
    batch_size: int
    epochs: int
    seed: int
    measure: Callable[[], dict[str, float]]
    identity: dict[str, Any]
    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=lambda: {"loss": 0.0, "accuracy": 0.0, "seconds": 0.0})
    rows: list[dict[str, float]] = field(default_factory=list)

    def run(self) -> bool:
        """Train to the end; return whether it came to it, or was stopped by Ctrl-C and saved."""
        columns = (
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  accuracy {task.fields[accuracy]:.4f}  lr {task.fields[lr]:.1e}"),
            TimeRemainingColumn(),
        )
        per_epoch = num_batches(self.data, self.batch_size)
        done = self.epoch * per_epoch + self.step
        bar = Progress(*columns, console=Console(stderr=True))
        with bar as progress, interruption() as interrupted, self._tensorboard() as write:
            shown = {"epochs": self.epochs, "loss": 0.0, "accuracy": 0.0, "lr": 0.0, "epoch": self.epoch + 1}
            task = progress.add_task("", total=self.epochs * per_epoch, completed=done, **shown)
            while self.epoch < self.epochs:
                for x, y in batches(self.data, self.batch_size, self.seed, self.epoch, self.step):
                    self._step(x, y)
                    progress.update(
                        task,
                        advance=1,
                        epoch=self.epoch + 1,
                        lr=self._lr(),
                        loss=self.sums["loss"] / self.step,
                        accuracy=self.sums["accuracy"] / self.step,
                    )
                    if interrupted() and self.step < per_epoch:
                        self.save()
                        return False
                self._end_epoch(write)
                if interrupted() and self.epoch < self.epochs:
                    return False
        return True

    def _step(self, x: Tensor, y: Tensor) -> None:
        began = time.perf_counter()

        def closure() -> tuple[Tensor, Tensor]:
            self.optimizer.zero_grad()
            output = self.model(x)
            loss = self.likelihood.loss(output, y)
            loss.backward()
            return loss, output

        loss, output = self.optimizer.step(closure)  # pyright: ignore
        for scheduler in self.schedulers:
            scheduler.step()
        self.step += 1
        self.sums["loss"] += loss.item()
        self.sums["accuracy"] += float((output.argmax(1) == y).float().mean())
        self.sums["seconds"] += time.perf_counter() - began

    def _end_epoch(self, write: Callable[[dict[str, float]], None]) -> None:
        means = {f"train_{key}": self.sums[key] / self.step for key in ("loss", "accuracy")}
        row = {"epoch": self.epoch + 1, "seconds": self.sums["seconds"], "lr": self._lr()} | means | self.measure()
        self.rows.append(row)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, dict.fromkeys(self.sums, 0.0)
        write(row)
        self.save()

    def _lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def save(self) -> None:
        """Write checkpoint and log."""
        parts = {"model": self.model, "optimizer": self.optimizer}
        own = {"epoch": self.epoch, "step": self.step, "sums": self.sums, "rows": self.rows, "identity": self.identity}
        states: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
        states["schedulers"] = [scheduler.state_dict() for scheduler in self.schedulers]
        save_checkpoint(self.folder / CHECKPOINT, states | own | {"rng": torch.get_rng_state()})
        if self.rows:
            text = io.StringIO()
            table = csv.DictWriter(text, self.rows[0])
            table.writeheader()
            table.writerows(self.rows)
            write_atomically(self.folder / LOG, text.getvalue().encode())

    def resume(self) -> None:
        """Continue from the folder's checkpoint, exactly where it was saved.

        Raises:
            PosteriorError: If there is no checkpoint, or it is damaged.
            ValueError: If it is one of another configuration.
        """
        state = load_checkpoint(self.folder / CHECKPOINT)
        for key, value in self.identity.items():
            if state["identity"].get(key) != value:
                raise ValueError(
                    f"{key} must be as in the run to resume, {state['identity'].get(key)!r}, got {value!r}. "
                    "Choose another --output to start anew."
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for scheduler, own in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(own)
        torch.set_rng_state(state["rng"])
        self.epoch, self.step, self.sums, self.rows = (state[key] for key in ("epoch", "step", "sums", "rows"))

    @contextmanager
    def _tensorboard(self) -> Iterator[Callable[[dict[str, float]], None]]:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.epoch + 1)

        def write(row: dict[str, float]) -> None:
            for key, value in row.items():
                writer.add_scalar(key, value, int(row["epoch"]))

        try:
            yield write
        finally:
            writer.close()


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C inside the scope into a flag, so that no step is cut in two; the second one raises."""
    pressed: list[int] = []

    def on_interrupt(number: int, _frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
