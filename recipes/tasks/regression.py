"""Regression of a table: real targets in their own units, on one of its splits or on several."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from rich.console import Console
from rich.table import Table as Shown
from torch import Tensor, nn

import bayeslayers as bl
import zoo
from bayeslayers.checks import at_least_one, positive
from bayeslayers.display import printable
from bayeslayers.distributed import World, start, telling_failures
from bayeslayers.files import write_atomically
from bayeslayers.likelihoods import Gaussian
from bayeslayers.storage.card import likelihood_fields
from recipes.data.examples import Examples, Points, num_batches, shuffled
from recipes.data.names import by_short_name, short_name, with_split, without_split
from recipes.data.tables import Table, load_table
from recipes.reports.measure import EvaluationRequest, Section
from recipes.reports.regression_figures import regression_sections
from recipes.tasks.posterior_task import PosteriorTask, Splits
from recipes.training.config import RunConfig, make_model
from recipes.training.devices import device_in_place
from recipes.training.launch import any_rank, decided_by_leader
from recipes.training.run_folder import METRICS, POSTERIOR, Column, check_folder
from zoo.registry import describe

NETWORK = "regressor"


@dataclass(kw_only=True)
class Config(RunConfig):
    """A run on a table. A `~` that a path begins with is the home folder.

    Attributes:
        target: Names of the target columns of a CSV file; none for the last column.
        splits: Train so many splits of the table, one after the other from that of `data` on, each in a folder of its
            own. The result is the mean of their metrics, with its standard error.
        passes: Passes over the training rows that make an epoch. A small table has short epochs, and each of them is
            measured and saved.
        variance: Known variance of the noise, in the squared units of the target; None to learn it, or to predict it.
        model: The network, a `regressor`, and its arguments but for what the table says: sizes, scales and names.
        recipe: Which recipe reads this configuration.
    """

    target: list[str] = field(default_factory=list)
    splits: int = 1
    passes: int = 1
    variance: float | None = None
    model: dict[str, Any] = field(default_factory=lambda: {"name": NETWORK})
    recipe: str = "regression"


class Regression(PosteriorTask):
    """Real targets of the rows of a table."""

    name = "regression"
    Config = Config
    columns: ClassVar[tuple[Column, ...]] = (
        Column("rmse", "RMSE"),
        Column("mixture_nll", "mixture NLL", unit="nats"),
        Column("nll", "NLL", unit="nats"),
        Column("crps", "CRPS"),
    )
    logged = ("rmse", "nll", "mixture_nll", "crps", "coverage_0.9")
    score = "variance"
    config: Config
    scaled: Splits

    def check(self) -> None:
        super().check()
        for name in ("splits", "passes"):
            at_least_one(name, getattr(self.config, name))
        if self.config.variance is not None:
            positive("variance", self.config.variance)
        if self.config.model["name"] != NETWORK:
            raise ValueError(f"model must be {NETWORK} for a table, got {self.config.model['name']!r}.")

    def make_network(self) -> nn.Module:
        """Return the network for the rows of the table, scaled by those of the training split."""
        config = self.config
        name, number = without_split(config.data)
        table = load_table(name, config.data_root, config.target)
        self.scaled = parts(config, table, number)
        noise = {} if config.variance is None else {"noise": "known"}
        model = make_model(
            dataclasses.replace(config, model=config.model | noise | scales(cast(Points, self.scaled.train), table))
        )
        likelihood = Gaussian(config.variance)
        return describe(model, dataclasses.replace(zoo.card_of(model), **likelihood_fields(likelihood)))

    def read_splits(self) -> Splits:
        return self.scaled

    @property
    def steps_per_epoch(self) -> int:
        return self.config.passes * num_batches(len(self.splits.train), self.config.batch_size)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        config, train = self.config, self.splits.train
        per_pass = num_batches(len(train), config.batch_size)
        for number in range(start // per_pass, config.passes):
            first = max(0, start - number * per_pass)
            for index, _ in shuffled(len(train), config.batch_size, config.seed, epoch * config.passes + number, first):
                yield train.inputs(index), train.targets[index]

    @classmethod
    def sections(
        cls, model: nn.Module, request: EvaluationRequest, data: Examples, evaluation: bl.Evaluation
    ) -> Sequence[Section]:
        return regression_sections(model, request, data)

    @classmethod
    def refusal(cls, card: bl.Card) -> str:
        if card.likelihood != "gaussian":
            return f"posterior must be one of real targets, got a {card.likelihood} one."
        if card.builder != NETWORK:
            return f"posterior must be one of a table, got one of the network {card.builder!r}."
        return ""

    @classmethod
    def read_test_splits(
        cls, card: bl.Card, request: EvaluationRequest, data_root: str | Path | None
    ) -> tuple[Points, Mapping[str, Points]]:
        """Return the test rows of a split, or all rows of a file of another name; and all rows of OOD tables."""
        assert request.data is not None
        name, number = without_split(request.data)

        def load(full: str) -> Table:
            return load_table(full, data_root).with_features(card.kwargs.get("features", ()), full)

        table = load(name)
        own = re.match(rf"{re.escape(short_name(name))}(@\d+)?( \(|$)", card.dataset)
        test = table.split(number)[1] if own or number or table.tests is not None else table.points()
        ood = {short: load(full).points() for short, full in by_short_name(request.ood).items()}
        for points in (test, *ood.values()):
            check_columns(points, card)
        return limited(test, request.limit), {key: limited(points, request.limit) for key, points in ood.items()}

    def train(self, resume: bool = False, command: str = "") -> dict[str, float] | None:
        if self.config.splits == 1:
            return super().train(resume, command)
        with start(device_in_place(self.config.device)) as self.world, telling_failures():
            self.check()
            check_folder("output", self.folder)
            return train_splits(self.config, self.folder, resume or self.world.restarts > 0, command, self.world)

    @classmethod
    def metrics_table(cls, metrics: Mapping[str, float]) -> Shown:
        if "splits" not in metrics:
            return super().metrics_table(metrics)
        shown = Shown("metric", caption=f"mean over {int(metrics['splits'])} splits, and its standard error")
        for title in ("mean", "standard error"):
            shown.add_column(title, justify="right")
        for key in (key for key in metrics if f"{key}_se" in metrics):
            shown.add_row(printable(key), f"{metrics[key]:.4f}", f"{metrics[f'{key}_se']:.4f}")
        return shown


class OneOfMany(Regression):
    """A run on one of many splits: it leaves its posterior and its metrics, and no checkpoint, log or report."""

    resumable = False

    def goes_on(self, resume: bool) -> bool:
        if (self.folder / METRICS).exists():
            raise FileExistsError(
                f"output must be new, got {self.folder} with {METRICS}. Add --resume or choose another."
            )
        return False

    def write(self, rows: Sequence[Mapping[str, float]], metrics: Mapping[str, float]) -> str:
        self._save(POSTERIOR, rows[-1], metrics, self.config.notes)
        write_atomically(self.folder / METRICS, json.dumps(metrics, indent=2).encode())
        return ""

    def stopped(self, epochs: int, measured: bool) -> str:
        return f"stopped in {self.folder}; finished splits are kept, continue with --resume"


def train(config: Config, resume: bool = False, command: str = "") -> dict[str, float] | None:
    """Train, measure and save one posterior or those of several splits, see `recipes.tasks.task.Task.train`."""
    return Regression(config).train(resume, command)


def train_splits(
    config: Config, folder: Path, resume: bool, command: str, world: World | None = None
) -> dict[str, float] | None:
    """Train several splits, and write the mean and the standard error of their metrics.

    Args:
        config: Configuration of the first of them, with their number.
        folder: Folder of all; each run has one in it, `split-K`.
        resume: Go on where a run was stopped. Finished splits are read.
        command: How this run was asked for.
        world: The processes that train each of them together; None for this one alone.

    Returns:
        The metrics, those of a standard error as "NAME_se"; None if Ctrl-C or SIGTERM stopped the run.
    """
    name, first = without_split(config.data)
    found: list[dict[str, float]] = []
    for number in range(first, first + config.splits):
        own = folder / f"split-{number}"
        if resume and decided_by_leader(world or World(), (own / METRICS).is_file):
            found.append(json.loads((own / METRICS).read_text()))
            continue
        part = dataclasses.replace(config, data=with_split(name, number), splits=1, output=str(own))
        metrics = OneOfMany(part).train(command=command)
        if any_rank(metrics is None)[0]:
            return None
        found.append(metrics or {})
    summary = mean_and_error(found)
    if world is None or world.leads:
        write_atomically(folder / METRICS, json.dumps(summary, indent=2).encode())
        Console(stderr=True).print(printable(f"written to {folder / METRICS}"))
    return summary


def mean_and_error(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over splits, and its standard error as "NAME_se".

    >>> mean_and_error([{"rmse": 1.0, "seed": 0}, {"rmse": 3.0, "seed": 0}])
    {'rmse': 2.0, 'rmse_se': 1.0, 'splits': 2}
    """
    counts = ("num_samples", "seed", "test_examples")
    values = {key: torch.tensor([run[key] for run in found], dtype=torch.float64) for key in found[0]}
    summary: dict[str, float] = {}
    for key, value in values.items():
        if key not in counts:
            summary |= {key: float(value.mean()), f"{key}_se": float(value.std()) / math.sqrt(len(value))}
    return summary | {"splits": len(found)}


def parts(config: Config, table: Table, number: int) -> Splits:
    """Return the rows of a run."""
    train, test = (limited(part, config.limit) for part in table.split(number))
    names = by_short_name(config.evaluation.ood)
    ood = {short: load_table(full, config.data_root).points() for short, full in names.items()}
    if not config.validation:
        return Splits(train, test, "test", test, ood)
    if config.validation >= len(train):
        raise ValueError(f"validation must leave training rows, got {config.validation} of {len(train)}.")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held_out, kept = order[: config.validation].sort().values, order[config.validation :].sort().values
    return Splits(taken(train, kept), taken(train, held_out), "val", test, ood)


def scales(train: Points, table: Table) -> dict[str, Any]:
    """Return the arguments of the network that the training rows say: sizes, scales and names.

    A feature that does not vary is left at its scale.
    """
    found: dict[str, Any] = {"input_size": [train.x.shape[1]], "num_targets": train.labels.shape[1]}
    for prefix, values in (("", train.x), ("target_", train.labels)):
        mean, std = values.double().mean(0), values.double().std(0, correction=0)
        std = torch.where(std > 1e-6 * mean.abs() + 1e-30, std, 1.0)
        found |= {f"{prefix}mean": rounded(mean), f"{prefix}std": rounded(std)}
    return found | {"features": list(table.features)}


def rounded(values: Tensor) -> list[float]:
    """Return numbers to 8 digits, as a card has them."""
    return [float(f"{value:.8g}") for value in values.tolist()]


def check_columns(points: Points, card: bl.Card) -> None:
    """Refuse rows of another number of features or targets than a posterior's."""
    expected = (*card.input_size, card.kwargs.get("num_targets", 1))
    if (found := (points.x.shape[1], points.labels.shape[1])) != expected:
        raise ValueError(
            f"data must have the posterior's {expected[0]} features and {expected[1]} targets, got {found[0]} and "
            f"{found[1]}."
        )


def taken(points: Points, index: Tensor) -> Points:
    """Return the rows of these numbers."""
    return Points(points.x[index], points.labels[index])


def limited(points: Points, limit: int | None) -> Points:
    """Return at most so many rows, the first ones."""
    return points if limit is None else taken(points, torch.arange(min(limit, len(points))))
