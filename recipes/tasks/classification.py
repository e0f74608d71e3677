"""Image classification: one configuration in, one run folder with a measured posterior out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

import bayeslayers as bl
import zoo
from bayeslayers.display import printable
from bayeslayers.files import write_atomically
from bayeslayers.likelihoods import likelihood_of
from bayeslayers.plots import training_curves
from bayeslayers.storage.training_state import load_checkpoint
from bayeslayers.storage.weight_file import Weights
from recipes.data.names import short_name, without_folders
from recipes.data.split import Split, num_batches
from recipes.reports.html import write_report
from recipes.reports.measure import EvaluationRequest, EvaluationResult, evaluate_network, measure, versions
from recipes.tasks.image_sets import Sets, check_classes, read_sets
from recipes.training.config import Config, check, device_of, make_model
from recipes.training.interruption import interruption
from recipes.training.loop import Training
from recipes.training.methods import make_optimizer, method_of
from recipes.training.run_folder import (
    BEST,
    CHECKPOINT,
    CONFIG,
    CURVES,
    METRICS,
    OOD,
    POSTERIOR,
    check_folder,
    clear_leftovers,
    has_checkpoint,
    kept,
    plan_of,
)
from recipes.training.run_lock import locked, refuse_many_processes
from recipes.training.schedules import make_schedulers


def train(config: Config, resume: bool = False, command: str = "") -> dict[str, float] | None:
    """Train, measure and save one posterior.

    Args:
        config: The run.
        resume: Continue from the run folder's checkpoint.
        command: How this run was asked for, for the card.

    Returns:
        The metrics, or None if Ctrl-C or SIGTERM stopped the run, which is then saved.

    Raises:
        BlockingIOError: If another training writes to the same folder.
    """
    refuse_many_processes()
    check(config)
    folder = Path(config.output or f"runs/{config.name}")
    check_folder("output", folder)
    if resume and not folder.exists():
        load_checkpoint(folder / CHECKPOINT)  # raises
    with locked(folder):
        goes_on = has_checkpoint(folder, resume)
        if resume and not goes_on:
            Console(stderr=True).print("no checkpoint yet: the run starts from the beginning")
        return _train(config, folder, goes_on, command)


def _train(config: Config, folder: Path, resume: bool, command: str) -> dict[str, float] | None:
    console = Console(stderr=True)
    baseline = read_baseline(config.baseline)
    torch.manual_seed(config.seed)
    model = make_model(config).to(device_of(config))
    if config.start is not None and not resume:
        go_on_from(config.start, model)
    sets = read_sets(config, zoo.card_of(model).input_size)
    experiment = Experiment(config, folder, model, sets, baseline, command)
    check_classes(model, sets, experiment.method(trained=True))
    run = experiment.training()
    if resume:
        run.resume()
    clear_leftovers(folder)
    with kept(folder):
        write_atomically(folder / CONFIG, json.dumps(dataclasses.asdict(config), indent=2).encode())
        finished, metrics, written = _run(run, config), None, False
        with suppress(KeyboardInterrupt), interruption(at_once=True):  # all is saved
            if run.rows:
                training_curves(run.rows, folder / CURVES)
            if finished:
                result = experiment.measure(progress=console.is_terminal)
                metrics = card_metrics(result)
                with shown_on_error(metrics, console):
                    experiment.write(result, run.rows, metrics)
                written = True
    if not written:
        late = "before it was measured" if metrics is None else "before its report was written"
        where = f"in epoch {run.epoch + 1}" if run.epoch < config.epochs else late
        console.print(f"stopped and saved {where}; continue with --resume")
        return None
    console.print(Text(printable(f"written to {folder}, with {CURVES} and report.html")))
    return metrics


@contextmanager
def shown_on_error(metrics: Mapping[str, float], console: Console) -> Iterator[None]:
    """Print metrics that could not be written."""
    try:
        yield
    except BaseException:
        console.print_json(json.dumps(metrics))
        raise


def _run(run: Training, config: Config) -> bool:
    """Run the training; return whether it came to its end."""
    try:
        return run.run()
    except RuntimeError as error:
        if config.compile and type(error).__module__.startswith("torch._"):
            reason = str(error).strip().partition("\n")[0]
            raise RuntimeError(
                f"compile must be false where torch cannot compile, got {reason}. Add --compile false."
            ) from error
        raise


def go_on_from(start: str, model: nn.Module) -> None:
    """Give a network the state of a run's, or of a posterior."""
    folder = Path(os.path.expanduser(start))
    run = folder / CHECKPOINT
    try:
        state = load_checkpoint(run).get("model") if run.is_file() else zoo.load(start).state_dict()
    except (OSError, ValueError) as error:
        if folder.exists():
            raise
        reason = f"no folder has this name, and {error} Train that run first, or name another."
        raise FileNotFoundError(f"start must be a run's folder, or a posterior, got {start}: {reason}") from None
    try:
        Weights(run if run.is_file() else folder, state or {}).fill(model)
    except ValueError as error:
        name = zoo.card_of(model).name
        raise ValueError(f"start must be of the run's model, {name}, got {start}: {error}") from None


@dataclass
class Experiment:
    """A run, and what it leaves in its folder.

    Attributes:
        config: How it was asked for.
        folder: Where its files go.
        model: The network.
        sets: Its data.
        baseline: Metrics of the baseline.
        command: What was typed.
    """

    config: Config
    folder: Path
    model: nn.Module
    sets: Sets
    baseline: dict[str, float | int | str]
    command: str

    def training(self) -> Training:
        """Return the training to run."""
        config, train = self.config, self.sets.train
        optimizer = make_optimizer(config.optimizer, self.model, len(train), config.seed)
        steps = num_batches(train, config.batch_size)
        return Training(
            folder=self.folder,
            model=self.model,
            forward=torch.compile(self.model, dynamic=False) if config.compile else self.model,
            optimizer=optimizer,
            schedulers=make_schedulers(config.schedule, optimizer, steps, config.epochs),
            likelihood=likelihood_of(self.model),
            data=train,
            augmentation=config.augmentation,
            batch_size=config.batch_size,
            micro_batch=config.micro_batch or config.batch_size,
            epochs=config.epochs,
            seed=config.seed,
            measure=self._measure,
            chosen_by=f"{self.sets.split}_nll",
            on_best=self._save_best,
            checkpoint_minutes=config.checkpoint_minutes,
            tensorboard=config.tensorboard,
            identity={name: value for name, value in dataclasses.asdict(config).items() if name not in _MAY_DIFFER}
            | {"data": short_name(config.data), "training examples": len(train), "training labels": _digest(train)},
        )

    def measure(self, progress: bool) -> EvaluationResult:
        """Return what the trained network is worth.

        Args:
            progress: Whether to show a progress bar.
        """
        config = self.config
        if config.laplace:
            self.model = fit_laplace(self.model, config, self.sets.train)
        request = self._request(config.evaluation.num_samples, trained=True)
        return measure(self.model, request, self.sets.test, self.sets.ood, self.command, progress)

    def write(
        self, result: EvaluationResult, rows: Sequence[Mapping[str, float]], metrics: Mapping[str, float]
    ) -> None:
        """Write posterior, report and metrics; these come last, for they say that the run is finished.

        Args:
            result: What `measure` returned.
            rows: The training's log.
            metrics: Metrics of the card.
        """
        self._save(POSTERIOR, rows[-1], metrics, self.config.notes)
        write_report(dataclasses.replace(result, log=rows, epoch_request=self._epoch_request()), self.folder)
        write_atomically(self.folder / METRICS, json.dumps(metrics, indent=2).encode())

    def _measure(self) -> dict[str, float]:
        found = evaluate_network(self.model, self._epoch_request(), self.sets.held_out).metrics
        return {f"{self.sets.split}_{name}": found[name] for name in LOGGED}

    def _epoch_request(self) -> EvaluationRequest:
        return self._request(self.config.evaluation.epoch_samples)

    def _request(self, num_samples: int, trained: bool = False) -> EvaluationRequest:
        config, how = self.config, self.config.evaluation
        return EvaluationRequest(
            posterior=config.name,
            data=short_name(config.data),
            ood=list(self.sets.ood),
            num_samples=num_samples,
            seed=how.seed,
            method=self.method(trained),
            limit=config.limit,
            batch_size=how.batch_size,
        )

    def method(self, trained: bool) -> str:
        """Return how to predict: until a Laplace approximation is fitted, by the means."""
        if self.config.laplace:
            return (self.config.evaluation.method or "sample") if trained else "mean"
        return self.config.evaluation.method or method_of(self.config.optimizer).predict

    def _save_best(self, row: Mapping[str, float]) -> None:
        split, config, how = self.sets.split, self.config, self.config.evaluation
        found = {name: row[f"{split}_{name}"] for name in LOGGED}
        notes = f"Epoch {row['epoch']} of {config.epochs}, that of the lowest {split}_nll, {found['nll']:.4f}."
        counts = {"num_samples": how.epoch_samples, "seed": how.seed, "test_examples": len(self.sets.test)}
        if not config.laplace:
            metrics = found | counts if split == "test" else {}
            self._save(BEST, row, metrics, f"{notes} {config.notes}".strip())

    def _save(self, name: str, row: Mapping[str, float], metrics: Mapping[str, float], notes: str) -> None:
        """Save the posterior of the log's `row` with its card, where training leaves one."""
        config, optimizer = self.config, self.config.optimizer
        if not config.laplace and method_of(optimizer).predict == "mean":
            return
        train, test = len(self.sets.train), len(self.sets.test)
        bl.save_posterior(
            self.model,
            self.folder / name,
            name=config.name,
            class_names=self.sets.test.classes,
            resize=config.augmentation.resize,
            dataset=f"{short_name(config.data)} ({train} train, {test} test)",
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
        )


LOGGED = ("accuracy", "nll", "brier", "ece")
_MAY_DIFFER = (
    "name",
    "evaluation",
    "baseline",
    "output",
    "data_root",
    "device",
    "compile",
    "checkpoint_minutes",
    "tensorboard",
    "notes",
    "recipe",
)


def _digest(data: Split) -> str:
    """Return a word for the labels of a split, which tells data sets of one name apart."""
    return hashlib.sha256(data.labels.numpy().tobytes()).hexdigest()[:16]


def fit_laplace(model: nn.Module, config: Config, data: Split) -> nn.Module:
    """Return the trained network with the precisions of its Laplace approximation."""
    assert config.laplace
    return bl.laplace(
        model,
        data.in_order(config.evaluation.batch_size, device_of(config)),
        prior_precision="marglik" if config.laplace.prior_precision is None else config.laplace.prior_precision,
        layers=bl.last_layer if config.laplace.last_layer else None,
        temperature=config.laplace.temperature,
    )


def card_metrics(result: EvaluationResult) -> dict[str, float]:
    """Return the metrics of a card, which `verify` measures again."""
    found, point = result.evaluation.metrics, result.request.method == "mean"
    metrics = {key: found[key] for key in (*LOGGED, "misclassification_auroc_confidence")}
    for name in result.request.ood:
        metrics[f"{OOD}{name}"] = found[f"{name}/auroc_entropy"]
        if not point:
            metrics[f"{OOD}{name}_epistemic"] = found[f"{name}/auroc_epistemic"]
    counts = {"num_samples": result.evaluation.num_samples, "seed": result.request.seed}
    metrics = {name: value for name, value in metrics.items() if not math.isnan(value)}  # an AUROC without errors
    return metrics | {"test_examples": result.evaluation.num_examples} | counts


def metrics_table(metrics: Mapping[str, float]) -> Table:
    """Return what `train` returned as a table."""
    table = Table("metric")
    table.add_column("value", justify="right")
    for key, value in metrics.items():
        table.add_row(Text(printable(key)), f"{value:.4f}" if isinstance(value, float) else str(value))
    return table


def read_baseline(folder: str | None) -> dict[str, float | int | str]:
    """Return the metrics of a baseline's run, rounded, with its method."""
    if folder is None:
        return {}
    for name in (METRICS, CONFIG):
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(f"baseline must be a finished run, got {folder} without {name}. Train it first.")
    try:
        metrics = {key: round(value, 5) for key, value in json.loads((Path(folder) / METRICS).read_text()).items()}
        plan = plan_of((Path(folder) / CONFIG).read_text())
    except (ValueError, TypeError, AttributeError, KeyError):
        raise ValueError(
            f"baseline must be a finished run, got {folder}, whose {METRICS} or {CONFIG} is damaged. Train it again."
        ) from None
    return {"optimizer": plan.method} | metrics
