"""The training loop that all tasks share: progress, logs, checkpoints, exact resume, signals that save.

Every prefix of the writes of a run is a state that it goes on from. The checkpoint comes first; log, best posterior and
events of the epoch follow it, and are written again when a run goes on from the end of an epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayeslayers.distributed import World
from bayeslayers.files import write_atomically
from bayeslayers.storage.training_state import load_checkpoint, save_checkpoint
from bayeslayers.storage.weight_file import Weights
from recipes.training.interruption import interruption
from recipes.training.launch import Totals, any_rank, rank_states, restore_rank_state, share_of_ranks, stopping_by
from recipes.training.restore import check_extent, check_identity, check_optimizer, check_progress, in_a_sentence
from recipes.training.run_folder import CHECKPOINT, LOG, log_text
from recipes.training.shown import ProgressBar, events, in_words
from recipes.training.trainable import Plan, Trainable

UNKNOWN = -1  # examples of a step that other ranks too have left some out of


class Training:
    """One run: what is trained, and how far it is.

    Attributes:
        task: What is trained.
        plan: How.
        folder: Where checkpoint and logs go; None to keep neither.
        world: The ranks that train together, of which the first writes.
        epoch: Epochs done.
        step: Steps done in the current epoch.
        sums: Sums of the losses and seconds over these steps, of this rank's examples.
        tally: What the task adds up over them.
        share: This rank's part of the examples of a step.
        settings: Learning rate of the last step, and its temperature where the optimizer has one.
        rows: The log so far, one row an epoch.
        saved: Epochs and steps done of the last checkpoint, and when it was written; None before the first.
    """

    def __init__(self, task: Trainable, plan: Plan, folder: Path | None = None, world: World | None = None):
        self.task, self.plan, self.folder, self.world = task, plan, folder, world or World()
        self.epoch = self.step = 0
        self.share = 1.0
        self.settings: dict[str, float] = {}
        self.rows: list[dict[str, float]] = []
        self.saved: tuple[int, int, float] | None = None
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.sums = {_key(name, "loss"): 0.0 for name in self.task.learners} | {"seconds": 0.0}
        self.tally, self._weight = self.task.tally(), 0.0  # of the steps, in shares

    def run(self) -> bool:
        """Train to the end; return whether it came to it, or was stopped by Ctrl-C or SIGTERM and saved."""
        epochs, per_epoch = self.plan.epochs, self.task.steps_per_epoch
        if not self._writes_posterior(epochs):
            raise ValueError(
                f"optimizer must have a posterior to write after {epochs} epochs of {per_epoch} steps, got one that "
                f"needs {self._steps_to_posterior()} steps. Train longer, or lower optimizer.start_step."
            )
        done = self.epoch * per_epoch + self.step
        began = time.monotonic()
        leads, first = self.world.leads, self.epoch + (not self._between_epochs)
        folder = self.folder if leads and self.plan.tensorboard else None
        with ProgressBar(leads) as progress, interruption() as interrupted, events(folder, first) as write:
            shown = {"epochs": epochs, "epoch": min(self.epoch + 1, epochs), "metrics": ""}
            task = progress.add_task("", total=epochs * per_epoch, completed=done, **shown)
            if self._between_epochs:
                self._record(write)
            elif done == 0 and leads:
                self.task.on_epoch(0)
            while self.epoch < epochs:
                self.task.before_epoch(self.epoch, self.step)
                for x, y, examples in self.task.parts(self.epoch, self.step, self.world):
                    self.share = self._share_of(y, examples)
                    self._step(x, y)
                    metrics = in_words(self.settings | self._means())
                    progress.update(task, advance=1, epoch=self.epoch + 1, metrics=metrics)
                    since = time.monotonic() - (self.saved[2] if self.saved else began)
                    stops, due = any_rank(interrupted(), since >= 60 * self.plan.checkpoint_minutes)
                    if stops or due:
                        self.save()
                    if stops and self.step < per_epoch:
                        return False
                if not self._end_epoch(write):
                    return False
                if leads and (text := self.task.describe(self.rows[-1])):
                    progress.console.print(f"epoch {self.epoch}/{epochs}: {text}", highlight=False)
                if any_rank(interrupted())[0]:
                    return False
        return True

    def _share_of(self, y: Tensor, examples: int) -> float:
        """Return this rank's part of what the loss of a step is a mean over; ranks ask where it is not known."""
        weight = next(iter(self.task.learners.values())).weight(y)
        if weight is None and examples != UNKNOWN:
            return len(y) / examples
        return share_of_ranks(len(y) if weight is None else weight)

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
            self._add_to_tally(output, y)
            self.sums[_key(name, "loss")] += loss.item() * self.share
        self.step += 1
        self._weight += self.share
        self.sums["seconds"] += time.perf_counter() - began

    def _add_to_tally(self, output: Tensor | None, y: Tensor) -> None:
        """Add a step to the tally, whose sums are of means over this rank's examples."""
        before = dict(self.tally.sums)
        if len(y):
            self.tally.add(output, y)
        if self.share != 1:
            sums = {key: before[key] + (value - before[key]) * self.share for key, value in self.tally.sums.items()}
            self.tally.load(sums, self.tally.tensors)

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
        self._collect()
        train = {f"train_{key}": value for key, value in self._means().items()}
        finalized = [
            learner
            for learner in self.task.learners.values()
            if self._writes_posterior(self.epoch + 1) and learner.finalize()  # the next step goes on from before
        ]
        try:
            with interruption(at_once=self.world.size == 1) as stopped, stopping_by(stopped):
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
        if self.world.leads:
            self.task.on_epoch(self.epoch)
        return True

    def _collect(self) -> None:
        """Bring what all ranks have added up to the first; the others begin again from nothing."""
        total = Totals(self.sums, self.tally.sums, self.tally.tensors).of_all_ranks()
        self.sums, self._weight = dict(total.sums), float(self.step * self.world.leads)
        self.tally.load(total.tally, total.tensors)

    def _record(self, write: Callable[[dict[str, float]], None]) -> None:
        """Write the log of the epochs done, and what the last of them leaves."""
        if self.folder is None or not self.world.leads:
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
        steps = self._weight or 1.0
        losses = {key: value / steps for key, value in self.sums.items() if key != "seconds"}
        return losses | self.tally.means(steps)  # pyright: ignore[reportArgumentType]

    def _all_sums(self) -> dict[str, float]:
        seconds = {"seconds": self.sums["seconds"]}
        return {key: value for key, value in self.sums.items() if key != "seconds"} | self.tally.sums | seconds

    def save(self) -> None:
        """Write the checkpoint."""
        if self.folder is None:
            return
        self._collect()
        self.saved = self.epoch, self.step, time.monotonic()
        states_of_ranks = rank_states()
        states: dict[str, Any] = {
            _key(name, key): value
            for name, learner in self.task.learners.items()
            for key, value in learner.state().items()  # of all ranks, where it is in shards
        }
        if not self.world.leads:
            return
        device = self._device
        states |= {key: getattr(self, key) for key in ("epoch", "step", "settings", "rows")}
        states |= {"sums": self._all_sums(), "identity": self.plan.identity} | self.tally.tensors
        states["rng"], states["rank_rng"] = torch.get_rng_state(), states_of_ranks
        states["cuda_rng"] = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        save_checkpoint(self.folder / CHECKPOINT, states)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint, exactly where it was saved.

        Raises:
            PosteriorError: If there is no checkpoint, or it is damaged.
            ValueError: If it is one of another configuration.
        """
        state = load_checkpoint(path)
        if not self.tally.tensors.keys() <= state.keys():
            raise ValueError(f"checkpoint must be of this release, got {path} of an older one. Start a new run.")
        check_identity(path, state, self.plan.identity)
        with in_a_sentence(path):
            check_progress(state, self._all_sums(), self.tally.tensors)
            check_extent(state, self.task.steps_per_epoch, self.plan.epochs, self.task.chosen_by)
            for name, learner in self.task.learners.items():
                own = {key: state[_key(name, key)] for key in ("model", "optimizer", "schedulers")}
                Weights(path, own["model"]).fill(learner.model)
                learner.load(own)
                check_optimizer(learner.optimizer)
            torch.set_rng_state(state["rng"])
            restore_rank_state(self.world, state.get("rank_rng", []), self.plan.seed)
            if self._device.type == "cuda" and state.get("cuda_rng") is not None:
                torch.cuda.set_rng_state(state["cuda_rng"], self._device)
        self.epoch, self.step, self.rows = (state[key] for key in ("epoch", "step", "rows"))
        self.sums = {key: state["sums"][key] for key in self.sums}
        self.tally.load({key: state["sums"][key] for key in self.tally.sums}, state)
        self._weight = self.step
        if not self.world.leads:  # which has what all have added up
            self._begin_epoch()
        self.settings = state.get("settings", {})
        self.saved = self.epoch, self.step, time.monotonic()


def _key(name: str, key: str) -> str:
    """Return a key of one learner of several; of the only one, which has no name, the key itself."""
    return f"{name}_{key}" if name else key
