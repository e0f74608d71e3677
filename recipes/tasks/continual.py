"""Continual learning: a list of tasks, of which each one's posterior is the prior of the next.

The epochs of a run are shared out equally among its tasks. At the first step of a task the posterior becomes the prior
(`bl.posterior_to_prior`) and an optimiser is made again; no example of an earlier task is seen again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

import bayeslayers as bl
import zoo
from bayeslayers.checks import did_you_mean, positive
from bayeslayers.likelihoods import Likelihood, likelihood_of
from bayeslayers.metrics.continual import average_accuracy, backward_transfer
from bayeslayers.plots import accuracy_matrix, forgetting_curves
from recipes.data.examples import Examples, shuffled
from recipes.data.task_sequence import NAMES, Joined, TaskExamples, load_sequence, number_of_tasks
from recipes.reports.measure import EvaluationRequest, Picture, Section, evaluate_network
from recipes.tasks.classification import AccuracyTally
from recipes.tasks.penalty import PENALTIES, Penalised, remember
from recipes.tasks.posterior_task import PosteriorTask, Splits
from recipes.training.config import RunConfig, device_of
from recipes.training.learner import Learner
from recipes.training.methods import make_optimizer, method_of
from recipes.training.run_folder import Column
from recipes.training.schedules import make_schedulers
from recipes.training.tally import Tally

DURING_A_TASK = 1000  # examples of each task that are measured after an epoch which is not its task's last
_FIRST_TASK_ONLY = ("init_precision", "hess_init")  # later tasks start from the posterior before them
_FIRST = re.compile(r", first (\d{1,2}) tasks\)$")  # in the dataset of a card, where not all tasks were learned


@dataclass(kw_only=True)
class Config(RunConfig):
    """A run over a sequence of tasks. `epochs` are those of all tasks together, `limit` is of each task.

    Attributes:
        tasks: Use the first so many tasks of the sequence; None for all.
        strength: How often the evidence of a task counts in the prior of the next, see `bl.posterior_to_prior`; the
            weight of the penalty, where there is one.
        penalty: How a point estimate is held near that of the task before: "l2", "ewc", or None for nothing.
        recipe: Which recipe reads this configuration.
    """

    tasks: int | None = None
    strength: float = 1.0
    penalty: str | None = None
    recipe: str = "continual"


class Continual(PosteriorTask):
    """A sequence of classification tasks.

    Attributes:
        train_tasks: Training examples of each task.
        held_out_tasks: Examples of each task to measure on after each epoch.
        current: Number of the task in training.
        ends_task: Whether the epoch in training is its task's last.
    """

    name = "continual"
    Config = Config
    columns: ClassVar[tuple[Column, ...]] = (
        Column("accuracy", "average accuracy", "higher", percent=True),
        Column("nll", "NLL", unit="nats"),
        Column("ece", "ECE"),
        Column("backward_transfer", "backward transfer", "higher", percent=True),
    )
    logged = ("accuracy", "nll", "ece")
    reported = ("misclassification_auroc_confidence",)
    config: Config
    current: int = 0
    ends_task: bool = False

    # The data.

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return self.config.tasks or number_of_tasks(self.config.data)

    @property
    def epochs_per_task(self) -> int:
        """Passes over the examples of one task."""
        return self.config.epochs // self.tasks

    def check(self) -> None:
        super().check()
        check(self.config)

    def read_splits(self) -> Splits:
        config = self.config
        size = zoo.card_of(self.model).input_size
        features = size[0] if len(size) == 1 else 0
        train, test = (
            load_sequence(config.data, config.data_root, train=part, features=features, limit=config.limit)[
                : self.tasks
            ]
            for part in (True, False)
        )
        held_out, split = test, "test"
        if config.validation:
            pairs = [task.held_out(config.validation) for task in train]
            train, held_out, split = [pair[0] for pair in pairs], [pair[1] for pair in pairs], "val"
        self.train_tasks, self.held_out_tasks = train, held_out
        return Splits(Joined(train), Joined(held_out), split, Joined(test), {})

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, as many as the smallest task has."""
        return max(1, min(map(len, self.train_tasks)) // self.config.batch_size)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        config, examples = self.config, self.train_tasks[epoch // self.epochs_per_task]
        order = shuffled(len(examples), config.batch_size, config.seed, epoch, start)
        for (index, _), _ in zip(order, range(start, self.steps_per_epoch), strict=False):
            yield examples.inputs(index), examples.targets[index]

    def tally(self) -> Tally:
        return AccuracyTally(likelihood_of(self.model))

    # From one task to the next.

    def prepare(self, resume: bool, command: str) -> None:
        super().prepare(resume, command)
        self.chosen_by = None  # the last epoch is the result: an earlier one has not seen all tasks

    def make_learner(self) -> Learner:
        """Return a learner of the task in training, whose optimiser has no past."""
        config, model, examples = self.config, self.model, self.train_tasks[self.current]
        options = {k: v for k, v in config.optimizer.items() if self.current == 0 or k not in _FIRST_TASK_ONLY}
        optimizer = make_optimizer(options, model, len(examples), config.seed + self.current)
        schedulers = make_schedulers(config.schedule, optimizer, self.steps_per_epoch, self.epochs_per_task)
        likelihood = likelihood_of(model)
        if config.penalty:
            likelihood = cast(Likelihood, Penalised(likelihood, model, len(examples)))  # a step needs its loss alone
        return Learner(model, optimizer, likelihood, schedulers, precision=config.precision)

    def before_epoch(self, epoch: int, step: int) -> None:
        """Begin the task of an epoch: the posterior becomes the prior, where no step of the task is done yet."""
        before, self.current = self.current, epoch // self.epochs_per_task
        self.ends_task = (epoch + 1) % self.epochs_per_task == 0
        if step == 0 and self.current > 0 and epoch % self.epochs_per_task == 0:
            self.consolidate(self.train_tasks[self.current - 1])
            self.learners = {"": self.make_learner()}
        elif before != self.current:  # resumed within a task, whose state was loaded into the first one's optimiser
            state = self.learners[""].state()
            self.learners = {"": self.make_learner()}
            self.learners[""].load(state)

    def consolidate(self, examples: TaskExamples) -> None:
        """Make what was learned from a task's examples the prior of the next task."""
        config = self.config
        if not method_of(config.optimizer).point:
            bl.posterior_to_prior(self.model, config.strength)
        elif config.penalty:
            generator = torch.Generator(device_of(config)).manual_seed(config.seed + self.current)
            remember(self.model, examples, config.penalty, config.strength, generator)

    # What is measured and shown.

    def measure_epoch(self) -> dict[str, float]:
        seen = self.held_out_tasks[: self.current + 1]
        seen = seen if self.ends_task else [task.limited(DURING_A_TASK) for task in seen]
        found = [evaluate_network(self.model, self.epoch_request(), task).metrics for task in seen]
        split = self.splits.split
        means = {f"{split}_{name}": sum(each[name] for each in found) / len(found) for name in self.logged}
        accuracies = [each["accuracy"] for each in found] + [math.nan] * (self.tasks - len(found))
        return means | {f"{split}_task{number}_accuracy": value for number, value in enumerate(accuracies)}

    def describe(self, row: Mapping[str, float]) -> str:
        """Return the row without the accuracies of single tasks, and with the number of the task."""
        shown = {key: value for key, value in row.items() if not re.search(r"_task\d+_", key)}
        return f"task {self.current + 1} of {self.tasks}  {super().describe(shown)}"

    def measure(self, rows: Sequence[Mapping[str, float]], progress: bool) -> dict[str, float]:
        metrics = super().measure(rows, progress)
        return metrics | {"backward_transfer": backward_transfer(self.accuracies(rows))}

    def accuracies(self, rows: Sequence[Mapping[str, float]]) -> Tensor:
        """Return the accuracy matrix of a run's log: row i after task i, column j of task j."""
        return curves_of(rows)[self.epochs_per_task - 1 :: self.epochs_per_task]

    def run_sections(self, rows: Sequence[Mapping[str, float]]) -> Sequence[Section]:
        matrix = self.accuracies(rows)
        text = (
            f"Average accuracy after the last task {average_accuracy(matrix):.2%}, backward transfer "
            f"{100 * backward_transfer(matrix):+.2f} points, on the {self.splits.split} examples after each epoch."
        )
        pictures = [
            Picture(accuracy_matrix(matrix), "accuracy of each task after each task"),
            Picture(forgetting_curves({self.config.name: curves_of(rows)}), "accuracy of each task over the epochs"),
        ]
        own = self.sections(self.model, self.result.request, self.splits.test, self.result.evaluation)
        return [Section("Tasks", text, pictures, "wide"), *own]

    @classmethod
    def sections(
        cls, model: nn.Module, request: EvaluationRequest, data: Examples, evaluation: bl.Evaluation
    ) -> Sequence[Section]:
        correct, task = evaluation.scores["correct"].double(), cast(Joined, data).task
        shares = [f"{number}: {float(correct[task == number].mean()):.2%}" for number in task.unique().tolist()]
        return [Section("Accuracy by task", ", ".join(shares))]

    def card_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"class_names": self.train_tasks[0].split.classes}
        if self.tasks < number_of_tasks(self.config.data):
            numbers = f"{len(self.splits.train)} train, {len(self.splits.test)} test, first {self.tasks} tasks"
            fields["dataset"] = f"{self.config.data} ({numbers})"
        return fields

    def _save(self, name: str, row: Mapping[str, float], metrics: Mapping[str, float], notes: str) -> None:
        """Save the posterior; the card tells backward transfer in words, for no test set measures it again."""
        claims = {key: value for key, value in metrics.items() if key != "backward_transfer"}
        told = (
            f"{self.tasks} tasks one after another, backward transfer {100 * metrics['backward_transfer']:+.2f} points."
        )
        super()._save(name, row, claims, f"{told} {notes}".strip())

    @classmethod
    def refusal(cls, card: bl.Card) -> str:
        name = card.dataset.partition(" ")[0]
        return "" if name in NAMES else f"posterior must be of a sequence of tasks, got one of {name or 'no data'}."

    @classmethod
    def read_test_splits(
        cls, card: bl.Card, request: EvaluationRequest, data_root: str | Path | None
    ) -> tuple[Joined, Mapping[str, Examples]]:
        assert request.data is not None
        if request.ood:
            raise ValueError(f"ood must be empty for a sequence of tasks, got {request.ood[0]}.")
        features, first = card.input_size[0], _FIRST.search(card.dataset)
        tasks = load_sequence(request.data, data_root, train=False, features=features, limit=request.limit)
        return Joined(tasks[: int(first[1])] if first else tasks), {}


def curves_of(rows: Sequence[Mapping[str, float]]) -> Tensor:
    """Return the accuracies of a log, `(epochs, tasks)`; NaN before a task is seen."""
    keys = [key for key in rows[0] if re.search(r"_task\d+_accuracy$", key)]
    return torch.tensor([[float(row[key]) for key in keys] for row in rows], dtype=torch.float64)


def check(config: Config) -> None:
    """Refuse a configuration that breaks a rule of continual runs."""
    most = number_of_tasks(config.data)
    if config.tasks is not None and not 1 <= config.tasks <= most:
        raise ValueError(f"tasks must be from 1 to the {most} of {config.data}, got {config.tasks}.")
    tasks = config.tasks or most
    if config.epochs % tasks:
        raise ValueError(f"epochs must be a multiple of the {tasks} tasks, which share them, got {config.epochs}.")
    positive("strength", config.strength)
    if config.penalty is not None and config.penalty not in PENALTIES:
        raise ValueError(
            f"penalty must be one of {', '.join(PENALTIES)}, got {config.penalty!r}."
            f"{did_you_mean(config.penalty, PENALTIES)}"
        )
    if config.penalty and not method_of(config.optimizer).point:
        raise ValueError(
            f"penalty must be left out for optimizer {config.optimizer['name']!r}, whose posterior becomes the prior, "
            f"got {config.penalty!r}."
        )
    for name in ("laplace", "compile"):
        if getattr(config, name):
            raise ValueError(f"{name} must be left out of a sequence of tasks.")
    if config.evaluation.ood:
        raise ValueError(f"evaluation.ood must be empty for a sequence of tasks, got {config.evaluation.ood[0]}.")
