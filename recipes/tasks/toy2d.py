"""Five blobs in the plane folded into two classes: Adam and VOGN side by side, and a picture of what each is sure of.

As in the toy example of Osawa et al. 2019 (arXiv 1906.02506). `python -m recipes.tasks.toy2d` runs it in seconds.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import bayeslayers as bl
import zoo
from bayeslayers.checks import at_least_one, fraction, non_negative
from bayeslayers.files import write_atomically
from bayeslayers.optim import TemperatureWarmup
from bayeslayers.plots import decision_boundary, training_gif
from bayeslayers.plots.canvas import finish
from recipes.data.blobs import CLASSES, OOD_NAME, Blobs
from recipes.data.names import expanded
from recipes.reports.measure import versions
from recipes.reports.prediction_metrics import prediction_metrics
from recipes.tasks.task import Task
from recipes.training.config import check_groups, check_seed
from recipes.training.interruption import interruption
from recipes.training.learner import Learner
from recipes.training.loop import Plan
from recipes.training.methods import check_options, make_optimizer
from recipes.training.run_folder import LOG, METRICS, POSTERIOR, log_text
from recipes.training.run_lock import LOCK
from zoo.registry import describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"adam": "Adam", "vogn": "VOGN"}
GIF, PNG = "boundary.gif", "boundary.png"
_FILES = (GIF, PNG, LOG, POSTERIOR, METRICS)  # in the order in which they are written
_BERNOULLI = bl.Bernoulli()
_GRID = 80  # points along each side of a frame
_DRAWS = 20  # boundaries of single draws in a frame


@dataclass
class Config:
    """A run of the toy. Its defaults are those of `configs/toy2d.yaml`, which says where they come from.

    Attributes:
        recipe: "toy2d".
        name: Name of the run and its posterior.
        data: The blobs.
        widths: Units of each hidden layer.
        adam: Options of Adam.
        vogn: Options of `bl.VOGN`.
        batch_size: Examples per step.
        epochs: Passes over the training data.
        temperature_steps: Steps in which VOGN's temperature (the weight of the KL term) rises to its value; 0 for none.
        temperature_start: Its factor at the first step, in (0, 1].
        num_samples: Draws of a prediction.
        seed: Of initial weights, order of the data, and draws.
        frames: Frames of the animation after the first one, which shows the initial networks.
        output: Run folder; `runs/NAME` if None.
        notes: Text for the card.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    recipe: str = "toy2d"
    name: str = "mlp-blobs"
    data: Blobs = field(default_factory=Blobs)
    widths: list[int] = field(default_factory=lambda: [128])
    adam: dict[str, Any] = field(default_factory=lambda: {"lr": 1e-3})
    vogn: dict[str, Any] = field(
        default_factory=lambda: {
            "lr": 1e-2,
            "beta1": 0.9,
            "precision_lr": 0.01,
            "prior_precision": 1.0,
            "init_precision": 100.0,
            "damping": 1e-7,
            "num_samples": 50,
            "vectorise": True,
        }
    )
    batch_size: int = 10
    epochs: int = 50
    temperature_steps: int = 1000
    temperature_start: float = 0.01
    num_samples: int = 100
    seed: int = 0
    frames: int = 15
    output: str | None = None
    notes: str = ""

    def __post_init__(self):
        self.output = self.output and expanded(self.output)


def train(config: Config, resume: bool = False, command: str = "") -> dict[str, float] | None:
    """Train both networks, draw them as they learn, and write the run folder once all is done.

    See `recipes.tasks.task.Task.train`; the metrics are those of each network after the last epoch, as "vogn_nll", and
    nothing is written of a run that Ctrl-C or SIGTERM stopped.
    """
    return ToyExperiment(config).train(resume, command)


def check(config: Config) -> None:
    """Refuse a configuration that breaks a rule."""
    for name in ("epochs", "batch_size", "num_samples", "frames"):
        at_least_one(name, getattr(config, name))
    for name in ("examples", "test_examples", "centres"):
        at_least_one(f"data.{name}", getattr(config.data, name))
    check_seed("seed", config.seed)
    non_negative("data.seed", config.data.seed)
    for name in NAMES:
        check_options(name, getattr(config, name))
    check_groups(config.vogn, math.gcd(config.batch_size, config.data.examples), "batch_size and data.examples")
    non_negative("temperature_steps", config.temperature_steps)
    fraction("temperature_start", config.temperature_start, one=True)
    if not 2 <= config.data.centres <= min(config.data.examples, config.data.test_examples):
        raise ValueError(f"data.centres must be from 2 to the number of examples, got {config.data.centres}.")


def _unfinished(folder: Path) -> bool:
    """Return whether a folder holds at most what a run of the toy that was killed while it wrote leaves."""
    held = {path.name for path in folder.iterdir()} - {LOCK}
    whole = {name for name in held if not name.startswith(tuple(f".{file}-" for file in _FILES))}
    return not whole or (GIF in whole and whole <= set(_FILES) - {METRICS})


class ToyExperiment(Task):
    """Two equal networks in training, one by Adam, one by VOGN, and pictures of both as they learn.

    Attributes:
        models: By name of the optimiser. Adam trains and predicts with the means alone, a deterministic network.
        frames: The pictures so far, the first one of the initial networks.
    """

    name = "toy2d"
    Config = Config
    resumable = False
    leaves = _FILES
    config: Config

    def check(self) -> None:
        check(self.config)

    def goes_on(self, resume: bool) -> bool:
        if self.folder.is_dir() and not _unfinished(self.folder):
            raise FileExistsError(
                f"output must be a new folder, got {self.folder}, which holds something. Choose another."
            )
        return False

    def prepare(self, resume: bool, command: str) -> None:
        config = self.config
        self.command, self.frames = command, []
        self.data, self.test, self.ring = config.data.split(True), config.data.split(False), config.data.ood()
        torch.manual_seed(config.seed)
        net = zoo.create("mlp", num_classes=1, input_size=[2], widths=config.widths)
        net = describe(net, dataclasses.replace(zoo.card_of(net), likelihood=_BERNOULLI.name))
        self.models: dict[str, nn.Module] = {"adam": copy.deepcopy(net), "vogn": net}
        self.learners = {name: self._learner(name, model) for name, model in self.models.items()}

    def _learner(self, name: str, model: nn.Module) -> Learner:
        config = self.config
        optimizer: Any = make_optimizer({"name": name, **getattr(config, name)}, model, len(self.data), config.seed)
        warms_up = name == "vogn" and config.temperature_steps > 0
        warmup = TemperatureWarmup(optimizer, config.temperature_steps, config.temperature_start) if warms_up else None
        return Learner(model, optimizer, _BERNOULLI, [warmup] if warmup else [])

    def plan(self) -> Plan:
        return Plan(self.config.epochs)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.data) // self.config.batch_size)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all examples in an order that follows those of the epochs before in one stream of random numbers."""
        generator = torch.Generator().manual_seed(self.config.seed)
        *_, order = (torch.randperm(len(self.data), generator=generator) for _ in range(epoch + 1))
        for index in order.split(self.config.batch_size)[start:]:
            yield self.data.x[index], self.data.labels[index]

    def describe(self, row: Mapping[str, float]) -> str:
        """Print nothing after an epoch, of which there are many."""
        return ""

    def on_epoch(self, epoch: int) -> None:
        config = self.config
        if epoch in {round(config.epochs * k / config.frames) for k in range(config.frames + 1)}:
            self.frames.append(self.frame(epoch))

    def measure_epoch(self) -> dict[str, float]:
        return _flat(self.measure_networks())

    def measure(self, rows: Sequence[Mapping[str, float]], progress: bool) -> dict[str, float]:
        return self.measure_epoch()

    def measure_networks(self) -> dict[str, dict[str, float]]:
        """Return the metrics of each network on the test examples and on the ring around them."""
        return {name: self._measure(name) for name in NAMES}

    def _measure(self, name: str) -> dict[str, float]:
        draws = name == "vogn"
        parts = {
            key: bl.predict(
                self.models[name],
                points.x,
                self.config.num_samples,
                likelihood=_BERNOULLI,
                method="sample" if draws else "mean",
                generator=torch.Generator().manual_seed(self.config.seed),
            )
            for key, points in (("", self.test), (OOD_NAME, self.ring))
        }
        found = prediction_metrics(parts, self.test.labels)
        return found if draws else {key: value for key, value in found.items() if "epistemic" not in key}

    def frame(self, epoch: int) -> Figure:
        """Return the picture of both networks as they are; its draws are those of every frame, so that none jumps."""
        return decision_boundary(
            self.models["vogn"],
            self.data.x,
            self.data.labels,
            draws=_DRAWS,
            baseline=self.models["adam"],
            likelihood=_BERNOULLI,
            num_samples=self.config.num_samples,
            class_names=CLASSES,
            names=(NAMES["vogn"], NAMES["adam"]),
            title=f"epoch {epoch} of {self.config.epochs}",
            grid=_GRID,
            generator=torch.Generator().manual_seed(self.config.seed),
        )

    def write(self, rows: Sequence[Mapping[str, float]], metrics: Mapping[str, float]) -> str:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True)) as progress:
            frames = progress.track(self.frames, description="animation")
            training_gif(frames, self.folder / GIF, duration=0.25, last=3.0)
        with interruption():  # what begins is written whole
            finish(self.frames[-1], self.folder / PNG)
            write_atomically(self.folder / LOG, log_text(log_rows(rows)).encode())
            save(self, rows[-1]["vogn_temperature"])
            write_atomically(self.folder / METRICS, json.dumps(metrics, indent=2).encode())  # last: the run is finished
        return f": {GIF}, {PNG}, {LOG}, {METRICS}, {POSTERIOR}/"

    def stopped(self, epochs: int, measured: bool) -> str:
        return f"stopped after {epochs} of {self.config.epochs} epochs; nothing is written"

    @classmethod
    def metrics_table(cls, metrics: Mapping[str, float]) -> Table:
        table = Table("metric", caption=f"total: entropy in nats; ring: points around the data; pictures: {GIF}, {PNG}")
        for name in NAMES.values():
            table.add_column(name, justify="right")
        for key in (key.removeprefix("vogn_") for key in metrics if key.startswith("vogn_")):
            found = (metrics.get(f"{name}_{key}") for name in NAMES)
            table.add_row(key, *("" if value is None else f"{value:.4f}" for value in found))
        return table


def log_rows(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return the rows of the toy's log: of all epochs the temperature of VOGN, the losses and the metrics."""
    metrics = tuple(f"{name}_" for name in NAMES)
    settings = [f"{name}_{key}" for name in NAMES for key in ("lr", "temperature")]
    return [
        {"epoch": row["epoch"], "temperature": row["vogn_temperature"]}
        | {f"{name}_train_loss": row[f"train_{name}_loss"] for name in NAMES}
        | {key: value for key, value in row.items() if key.startswith(metrics) and key not in settings}
        for row in rows
    ]


def save(experiment: ToyExperiment, temperature: float) -> None:
    """Save VOGN's posterior with its card; Adam's metrics stand beside its own."""
    config, found = experiment.config, experiment.measure_networks()
    counts = {"test_examples": len(experiment.test), "seed": config.seed}
    rounded = {name: {key: round(value, 5) for key, value in found[name].items()} | counts for name in NAMES}
    bl.save_posterior(
        experiment.models["vogn"],
        experiment.folder / POSTERIOR,
        name=config.name,
        class_names=CLASSES,
        dataset=f"{config.data.name} ({len(experiment.data)} train, {len(experiment.test)} test)",
        dataset_size=len(experiment.data),
        temperature=round(temperature, 5),
        optimizer={"name": "vogn"}
        | config.vogn
        | {key: getattr(config, key) for key in ("temperature_steps", "temperature_start", "batch_size", "epochs")},
        recipe=experiment.command,
        versions=versions(),
        metrics=rounded["vogn"] | {"num_samples": config.num_samples},
        baseline={"optimizer": "adam"} | rounded["adam"] | {"num_samples": 1},
        notes=config.notes,
    )


def _flat(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{name}_{key}": value for name, own in found.items() for key, value in own.items()}
