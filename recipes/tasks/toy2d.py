"""Five blobs in the plane folded into two classes: Adam and VOGN side by side, and a picture of what each is sure of.

As in the toy example of Osawa et al. 2019 (arXiv 1906.02506). `python -m recipes.tasks.toy2d` runs it in seconds.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import bayeslayers as bl
import zoo
from bayeslayers.checks import at_least_one, fraction, non_negative
from bayeslayers.display import printable
from bayeslayers.files import write_atomically
from bayeslayers.optim import TemperatureWarmup
from bayeslayers.plots import decision_boundary, training_gif
from bayeslayers.plots.canvas import finish
from recipes.data.blobs import CLASSES, OOD_NAME, Blobs
from recipes.data.names import expanded
from recipes.reports.measure import versions
from recipes.reports.verify import prediction_metrics
from recipes.training.config import check_seed
from recipes.training.interruption import interruption
from recipes.training.methods import check_options, make_optimizer
from recipes.training.run_folder import LOG, METRICS, POSTERIOR, check_folder, clear_leftovers, log_text
from recipes.training.run_lock import LOCK, locked, refuse_many_processes
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

    Args:
        config: The run.
        resume: Refused: the toy takes seconds.
        command: How this run was asked for, for the card.

    Returns:
        Metrics of each network after the last epoch, as "vogn_nll"; None if Ctrl-C or SIGTERM stopped the run, of
        which nothing is written then.

    Raises:
        ValueError: If the configuration breaks a rule.
        FileExistsError: If the run folder holds something.
    """
    if resume:
        raise ValueError("resume must be off for toy2d, which takes seconds and keeps no checkpoint. Start it again.")
    refuse_many_processes()
    folder = Path(config.output or f"runs/{config.name}")
    check_folder("output", folder)
    with locked(folder):
        check(config, folder)
        return _train(config, folder, command)


def _train(config: Config, folder: Path, command: str) -> dict[str, float] | None:
    experiment = ToyExperiment(config)
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        with interruption(at_once=True), Progress(*columns, console=console) as progress:
            frames = list(progress.track(experiment.run(), total=config.epochs + 1, description="training"))
            shown = [frame for frame in frames if frame is not None]
            found = experiment.measure()
            clear_leftovers(folder, _FILES)
            training_gif(progress.track(shown, description="animation"), folder / GIF, duration=0.25, last=3.0)
    except KeyboardInterrupt:
        console.print(f"stopped after {len(experiment.rows)} of {config.epochs} epochs; nothing is written")
        return None
    finish(shown[-1], folder / PNG)
    write_atomically(folder / LOG, log_text(experiment.rows).encode())
    save(experiment, found, folder / POSTERIOR, command)
    metrics = _flat(found)
    write_atomically(folder / METRICS, json.dumps(metrics, indent=2).encode())  # last: the run is finished
    console.print(Text(printable(f"written to {folder}: {GIF}, {PNG}, {LOG}, {METRICS}, {POSTERIOR}/")))
    return metrics


def check(config: Config, folder: Path) -> None:
    """Refuse a configuration that breaks a rule, and a folder that holds something."""
    for name in ("epochs", "batch_size", "num_samples", "frames"):
        at_least_one(name, getattr(config, name))
    for name in ("examples", "test_examples", "centres"):
        at_least_one(f"data.{name}", getattr(config.data, name))
    check_seed("seed", config.seed)
    non_negative("data.seed", config.data.seed)
    for name in NAMES:
        check_options(name, getattr(config, name))
    non_negative("temperature_steps", config.temperature_steps)
    fraction("temperature_start", config.temperature_start, one=True)
    if not 2 <= config.data.centres <= min(config.data.examples, config.data.test_examples):
        raise ValueError(f"data.centres must be from 2 to the number of examples, got {config.data.centres}.")
    check_folder("output", folder)
    if folder.is_dir() and not _unfinished(folder):
        raise FileExistsError(f"output must be a new folder, got {folder}, which holds something. Choose another.")


def _unfinished(folder: Path) -> bool:
    """Return whether a folder holds at most what a run of the toy that was killed while it wrote leaves."""
    held = {path.name for path in folder.iterdir()} - {LOCK}
    whole = {name for name in held if not name.startswith(tuple(f".{file}-" for file in _FILES))}
    return not whole or (GIF in whole and whole <= set(_FILES) - {METRICS})


class ToyExperiment:
    """Two equal networks in training, one by Adam, one by VOGN.

    Attributes:
        config: The run.
        models: By name of the optimiser. Adam trains and predicts with the means alone, a deterministic network.
        rows: The log so far, one row an epoch.
        temperature: VOGN's in the last step, in the first one before there is any.
    """

    def __init__(self, config: Config):
        self.config, self.rows = config, []
        self.data, self.test, self.ring = config.data.split(True), config.data.split(False), config.data.ood()
        torch.manual_seed(config.seed)
        net = zoo.create("mlp", num_classes=1, input_size=[2], widths=config.widths)
        net = describe(net, dataclasses.replace(zoo.card_of(net), likelihood=_BERNOULLI.name))
        self.models: dict[str, nn.Module] = {"adam": copy.deepcopy(net), "vogn": net}
        options = {"adam": config.adam, "vogn": config.vogn}
        self.optimizers: dict[str, Any] = {
            name: make_optimizer({"name": name, **options[name]}, model, len(self.data), config.seed)
            for name, model in self.models.items()
        }
        steps = config.temperature_steps
        self.warmup = TemperatureWarmup(self.optimizers["vogn"], steps, config.temperature_start) if steps else None
        self.temperature: float = self.optimizers["vogn"].param_groups[0]["temperature"]

    def run(self) -> Iterator[Figure | None]:
        """Train epoch by epoch; yield the frame of each, None where there is none, the initial one first."""
        config = self.config
        shown = {round(config.epochs * k / config.frames) for k in range(config.frames + 1)}
        order = torch.Generator().manual_seed(config.seed)
        yield self.frame()
        for epoch in range(1, config.epochs + 1):
            parts = torch.randperm(len(self.data), generator=order).split(config.batch_size)
            losses = [self._step(self.data.x[part], self.data.labels[part]) for part in parts]
            means = {f"{name}_train_loss": sum(loss[name] for loss in losses) / len(losses) for name in NAMES}
            self.rows.append({"epoch": epoch, "temperature": self.temperature} | means | _flat(self.measure()))
            yield self.frame() if epoch in shown else None

    def _step(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """Take one step of each; return their losses."""
        losses = {}
        for name, optimizer in self.optimizers.items():
            at_once = getattr(optimizer, "vectorise", False) and optimizer.num_samples > 1

            def closure(model: nn.Module = self.models[name], at_once: bool = at_once) -> Tensor:
                optimizer.zero_grad()  # noqa: B023 (called within this turn)
                loss = _BERNOULLI.loss(model(x), y)
                if not at_once:
                    loss.backward()
                return loss

            losses[name] = float(optimizer.step(closure).detach())
        self.temperature = self.optimizers["vogn"].param_groups[0]["temperature"]
        if self.warmup:
            self.warmup.step()
        return losses

    def measure(self) -> dict[str, dict[str, float]]:
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

    def frame(self) -> Figure:
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
            title=f"epoch {len(self.rows)} of {self.config.epochs}",
            grid=_GRID,
            generator=torch.Generator().manual_seed(self.config.seed),
        )


def save(experiment: ToyExperiment, found: Mapping[str, dict[str, float]], folder: Path, command: str) -> None:
    """Save VOGN's posterior with its card; Adam's metrics stand beside its own."""
    config = experiment.config
    counts = {"test_examples": len(experiment.test), "seed": config.seed}
    rounded = {name: {key: round(value, 5) for key, value in found[name].items()} | counts for name in NAMES}
    bl.save_posterior(
        experiment.models["vogn"],
        folder,
        name=config.name,
        class_names=CLASSES,
        dataset=f"{config.data.name} ({len(experiment.data)} train, {len(experiment.test)} test)",
        dataset_size=len(experiment.data),
        temperature=round(experiment.temperature, 5),
        optimizer={"name": "vogn"}
        | config.vogn
        | {key: getattr(config, key) for key in ("temperature_steps", "temperature_start", "batch_size", "epochs")},
        recipe=command,
        versions=versions(),
        metrics=rounded["vogn"] | {"num_samples": config.num_samples},
        baseline={"optimizer": "adam"} | rounded["adam"] | {"num_samples": 1},
        notes=config.notes,
    )


def _flat(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{name}_{key}": value for name, own in found.items() for key, value in own.items()}


def metrics_table(metrics: Mapping[str, float]) -> Table:
    """Return what `train` returned as a table."""
    table = Table("metric", caption=f"total: entropy in nats; ring: points around the data; pictures: {GIF}, {PNG}")
    for name in NAMES.values():
        table.add_column(name, justify="right")
    for key in (key.removeprefix("vogn_") for key in metrics if key.startswith("vogn_")):
        found = (metrics.get(f"{name}_{key}") for name in NAMES)
        table.add_row(key, *("" if value is None else f"{value:.4f}" for value in found))
    return table
