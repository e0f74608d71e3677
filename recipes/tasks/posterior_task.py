"""A task of one network: its posterior is trained, measured and saved with a card."""

from __future__ import annotations

import dataclasses
import json
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import bayeslayers as bl
import zoo
from bayeslayers.files import write_atomically
from bayeslayers.likelihoods import Likelihood, likelihood_of
from bayeslayers.storage.card import likelihood_fields
from recipes.data.examples import Examples, digest, num_batches
from recipes.data.names import short_name, without_folders
from recipes.reports.html import write_report
from recipes.reports.measure import (
    EvaluationRequest,
    EvaluationResult,
    Section,
    evaluate_network,
    measure,
    versions,
)
from recipes.tasks.task import Task
from recipes.training.config import RunConfig, check, check_groups, device_of, make_model
from recipes.training.laplace_fit import fit_laplace
from recipes.training.launch import leader_first
from recipes.training.learner import Learner
from recipes.training.loop import Plan, Training
from recipes.training.methods import make_optimizer, method_of
from recipes.training.run_folder import BEST, CONFIG, CURVES, METRICS, OOD, POSTERIOR, Column, config_text
from recipes.training.schedules import make_schedulers
from recipes.training.start import go_on_from, read_baseline
from zoo.registry import describe

_MAY_DIFFER = (
    "name",
    "evaluation",
    "baseline",
    "output",
    "data_root",
    "device",
    "compile",
    "checkpoint_minutes",
    "workers",
    "prefetch",
    "tensorboard",
    "notes",
    "recipe",
)


@dataclass(frozen=True)
class Splits:
    """The data of a run.

    Attributes:
        train: Examples to train on.
        held_out: Examples to measure on after each epoch.
        split: Which these are, "val" or "test".
        test: Examples to measure the result on.
        ood: Examples of other data, by name.
    """

    train: Examples
    held_out: Examples
    split: str
    test: Examples
    ood: Mapping[str, Examples]


class PosteriorTask(Task):
    """A task of one network, whose posterior a run leaves.

    A subclass says what its data is (`read_splits`, `batches`) and how its metrics read; the rest has defaults.

    Attributes:
        columns: Metrics by which runs are compared, the most telling first.
        logged: Metrics of `bl.evaluate` that are logged after each epoch, with "nll", which chooses the best one.
        reported: Further metrics of the card.
        likelihood: That of the network; None for what its card says.
        score: The uncertainty whose AUROC on OOD data the card records: "entropy", or "variance" of real targets.
        largest_batch: Most examples that are measured at once; None for as many as a run asks for.
    """

    columns: ClassVar[tuple[Column, ...]]
    logged: ClassVar[tuple[str, ...]]
    reported: ClassVar[tuple[str, ...]] = ()
    likelihood: ClassVar[Likelihood | None] = None
    score: ClassVar[str] = "entropy"
    largest_batch: ClassVar[int | None] = None
    config: RunConfig
    model: nn.Module
    splits: Splits

    def make_network(self) -> nn.Module:
        """Return the untrained network, which has a card."""
        return make_model(self.config)

    @abstractmethod
    def read_splits(self) -> Splits:
        """Return the data for `self.model`, whose card says what its inputs are; refuse what does not fit."""

    def check_model(self) -> None:
        """Refuse a network whose outputs are not what the targets need; whatever it draws is to be its own."""

    @classmethod
    def as_measured(cls, model: nn.Module) -> nn.Module:
        """Return a network as it predicts what is measured, such as window by window."""
        return model

    @classmethod
    def batch_size(cls, asked: int) -> int:
        """Return how many examples are measured at once."""
        return min(asked, cls.largest_batch or asked)

    @classmethod
    def sections(
        cls, model: nn.Module, request: EvaluationRequest, data: Examples, evaluation: bl.Evaluation
    ) -> Sequence[Section]:
        """Return what a report shows beside metrics, calibration and curves."""
        return ()

    @classmethod
    def refusal(cls, card: bl.Card) -> str:
        """Return why `evaluate` cannot measure a posterior of such a card as this task, nothing if it can."""
        return f"posterior must be of a task that evaluate knows, got one of {cls.name}."

    @classmethod
    def read_test_splits(
        cls, card: bl.Card, request: EvaluationRequest, data_root: str | Path | None
    ) -> tuple[Examples, Mapping[str, Examples]]:
        """Return the test split that a request names, and those of OOD data by name, as a posterior takes them."""
        raise ValueError(cls.refusal(card))

    def run_sections(self, rows: Sequence[Mapping[str, float]]) -> Sequence[Section]:
        """Return what the report of a run shows beside these; the log is `rows`."""
        return self.sections(self.model, self.result.request, self.splits.test, self.result.evaluation)

    def card_fields(self) -> dict[str, Any]:
        """Return what the card records of the data, and how it is stored: arguments of `bl.save_posterior`."""
        return {}

    # What follows from what a task of this kind says.

    def check(self) -> None:
        check(self.config)

    def prepare(self, resume: bool, command: str) -> None:
        config = self.config
        self.command, self.baseline = command, read_baseline(config.baseline)
        torch.manual_seed(config.seed)
        self.model = self.make_network().to(device_of(config))
        if self.likelihood is not None:
            describe(self.model, dataclasses.replace(zoo.card_of(self.model), **likelihood_fields(self.likelihood)))
        if config.start is not None and not resume:
            go_on_from(config.start, self.model)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        with leader_first(self.world):  # it may download them
            self.splits = self.read_splits()
        if len(self.splits.train) < config.batch_size:
            check_groups(config.optimizer, len(self.splits.train), "the training examples, which are one batch,")
        self.chosen_by = f"{self.splits.split}_nll"
        self.check_model()
        self.learners = {"": self.make_learner()}

    def make_learner(self) -> Learner:
        """Return the network in training, with its optimiser and schedules."""
        config = self.config
        optimizer = make_optimizer(config.optimizer, self.model, len(self.splits.train), config.seed)
        forward = torch.compile(self.model, dynamic=False) if config.compile else None
        schedulers = make_schedulers(config.schedule, optimizer, self.steps_per_epoch, config.epochs)
        return Learner(self.model, optimizer, likelihood_of(self.model), schedulers, forward, config.precision)

    @property
    def steps_per_epoch(self) -> int:
        return num_batches(len(self.splits.train), self.config.batch_size)

    def plan(self) -> Plan:
        config, train = self.config, self.splits.train
        identity = {key: value for key, value in dataclasses.asdict(config).items() if key not in _MAY_DIFFER}
        identity |= {"data": short_name(config.data)}
        identity |= {"training examples": len(train), "training labels": digest(train)}
        times = config.epochs, config.micro_batch, config.checkpoint_minutes
        return Plan(*times, config.tensorboard, identity, config.seed)

    def begin(self) -> None:
        config = dataclasses.asdict(self.config) | {"processes": self.world.size}
        write_atomically(self.folder / CONFIG, config_text(config, self.columns).encode())

    def run_loop(self, loop: Training) -> bool:
        try:
            return loop.run()
        except RuntimeError as error:
            if self.config.compile and type(error).__module__.startswith("torch._"):
                reason = str(error).strip().partition("\n")[0]
                raise RuntimeError(
                    f"compile must be false where torch cannot compile, got {reason}. Add --compile false."
                ) from error
            raise

    def measure_epoch(self) -> dict[str, float]:
        network = self.as_measured(self.model)
        found = evaluate_network(network, self.epoch_request(), self.splits.held_out).metrics
        return {f"{self.splits.split}_{name}": found[name] for name in self.logged}

    def measure(self, rows: Sequence[Mapping[str, float]], progress: bool) -> dict[str, float]:
        if self.config.laplace:
            self.model = fit_laplace(self.model, self.config, self.splits.train)
        request, splits = self._request(self.config.evaluation.num_samples, trained=True), self.splits
        self.result = measure(self.as_measured(self.model), request, splits.test, splits.ood, self.command, progress)
        return self.card_metrics(self.result)

    def write(self, rows: Sequence[Mapping[str, float]], metrics: Mapping[str, float]) -> str:
        self._save(POSTERIOR, rows[-1], metrics, self.config.notes)
        sections, request = self.run_sections(rows), self.epoch_request()
        told = dataclasses.replace(self.result, sections=sections, log=rows, epoch_request=request)
        write_report(told, self.folder)
        write_atomically(self.folder / METRICS, json.dumps(metrics, indent=2).encode())
        return f", with {CURVES} and report.html"

    def on_best(self, row: Mapping[str, float]) -> None:
        config, split, how = self.config, self.splits.split, self.config.evaluation
        found = {name: row[f"{split}_{name}"] for name in self.logged}
        notes = f"Epoch {row['epoch']} of {config.epochs}, that of the lowest {split}_nll, {found['nll']:.4f}."
        counts = {"num_samples": how.epoch_samples, "seed": how.seed, "test_examples": len(self.splits.test)}
        if not config.laplace:
            self._save(BEST, row, found | counts if split == "test" else {}, f"{notes} {config.notes}".strip())

    def epoch_request(self) -> EvaluationRequest:
        """Return how the held-out examples are measured after each epoch."""
        return self._request(self.config.evaluation.epoch_samples)

    def _request(self, num_samples: int, trained: bool = False) -> EvaluationRequest:
        config, how = self.config, self.config.evaluation
        return EvaluationRequest(
            posterior=config.name,
            data=short_name(config.data),
            ood=list(self.splits.ood),
            num_samples=num_samples,
            seed=how.seed,
            method=self.method(trained),
            limit=config.limit,
            batch_size=self.batch_size(how.batch_size),
        )

    def method(self, trained: bool) -> str:
        """Return how to predict: until a Laplace approximation is fitted, by the means."""
        if self.config.laplace:
            return (self.config.evaluation.method or "sample") if trained else "mean"
        return self.config.evaluation.method or method_of(self.config.optimizer).predict

    @classmethod
    def card_metrics(cls, result: EvaluationResult) -> dict[str, float]:
        """Return the metrics of a card, which `verify` measures again."""
        found, point = result.evaluation.metrics, result.request.method == "mean"
        metrics = {key: found[key] for key in (*cls.logged, *cls.reported)}
        for name in result.request.ood:
            metrics[f"{OOD}{name}"] = found[f"{name}/auroc_{cls.score}"]
            if not point:
                metrics[f"{OOD}{name}_epistemic"] = found[f"{name}/auroc_epistemic"]
        counts = {"num_samples": result.evaluation.num_samples, "seed": result.request.seed}
        metrics = {name: value for name, value in metrics.items() if not math.isnan(value)}  # an AUROC without errors
        return metrics | {"test_examples": result.evaluation.num_examples} | counts

    def _save(self, name: str, row: Mapping[str, float], metrics: Mapping[str, float], notes: str) -> None:
        """Save the posterior of the log's `row` with its card, where training leaves one."""
        config, optimizer = self.config, self.config.optimizer
        if not config.laplace and method_of(optimizer).predict == "mean":
            return
        train, test = len(self.splits.train), len(self.splits.test)
        bl.save_posterior(
            self.model,
            self.folder / name,
            name=config.name,
            dataset_size=train,
            temperature=config.laplace.temperature if config.laplace else row.get("temperature", 1.0),
            optimizer=optimizer
            | {"batch_size": config.batch_size, "epochs": config.epochs}
            | ({"start": without_folders(config.start)} if config.start else {})
            | ({"laplace": dataclasses.asdict(config.laplace)} if config.laplace else {}),
            recipe=self.command,
            versions=versions("torchvision"),
            method=self.method(trained=True),
            metrics={name: round(value, 5) for name, value in metrics.items()},
            baseline=self.baseline,
            notes=notes,
            **{"dataset": f"{short_name(config.data)} ({train} train, {test} test)", **self.card_fields()},
        )
