"""Image classification: one configuration in, one run folder with a measured posterior out."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import bayeslayers as bl
import zoo
from bayeslayers.checkpoint import write_atomically
from bayeslayers.checks import at_least_one, near, positive
from bayeslayers.likelihoods import likelihood_of
from bayeslayers.metrics import classification_metrics, ood_auroc
from bayeslayers.prediction import Prediction, predict
from bayeslayers.prediction.predict import METHODS
from recipes.data import Split, load_split, num_batches, short_name
from recipes.methods import make_optimizer, method_of
from recipes.schedules import Schedule, make_schedulers
from recipes.training import CHECKPOINT, Training

METRICS, POSTERIOR = "metrics.json", "posterior"


@dataclass
class Evaluation:
    """How a run is measured.

    Attributes:
        num_samples: Draws of the final measurement.
        epoch_samples: Draws of the measurement after each epoch.
        seed: Of the draws.
        method: How to predict, as in `bl.predict`: "sample", "mean", "local", "dropout", "linearised". None
            for draws of a posterior, and one pass of a point estimate.
        ood: Data set of strangers, for the AUROC of total entropy, or None.
        batch_size: Examples per forward pass.
    """

    num_samples: int = 64
    epoch_samples: int = 8
    seed: int = 0
    method: str | None = None
    ood: str | None = None
    batch_size: int = 1000


@dataclass
class Laplace:
    """A diagonal Laplace approximation after the training.

    Attributes:
        prior_precision: Precision of the prior; None to maximise the marginal likelihood.
        last_layer: Give the last layer alone a posterior.
        temperature: T of the tempered posterior.
    """

    prior_precision: float | None = None
    last_layer: bool = False
    temperature: float = 1.0


@dataclass
class Config:
    """A training run.

    Attributes:
        name: Name of the run and its posterior.
        model: `name` in the zoo, and the arguments of its builder.
        data: Data set to train and test on.
        optimizer: `name` of a method of `recipes.methods`, and its arguments.
        batch_size: Examples per step.
        epochs: Passes over the training data.
        schedule: Learning rate and temperature over the run.
        seed: Of initial weights, order of the data, and draws.
        laplace: Fit a Laplace approximation after a point estimate is trained; None for none.
        evaluation: How the result is measured.
        baseline: Run folder of a twin, whose figures go into the card beside ours.
        output: Run folder; `runs/NAME` if None.
        data_root: Folder of data already there; downloaded to `data` if None.
        limit: Use the first so many examples of each split alone.
        notes: Text for the card.
    """

    name: str
    model: dict[str, Any]
    data: str
    optimizer: dict[str, Any]
    batch_size: int = 128
    epochs: int = 10
    schedule: Schedule = field(default_factory=Schedule)
    seed: int = 0
    laplace: Laplace | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)
    baseline: str | None = None
    output: str | None = None
    data_root: str | None = None
    limit: int | None = None
    notes: str = ""


def train(config: Config, resume: bool = False, command: str = "") -> dict[str, float] | None:
    """Train, measure and save one posterior.

    Args:
        config: The run.
        resume: Continue from the run folder's checkpoint.
        command: How this run was asked for, for the card.

    Returns:
        The metrics, or None if Ctrl-C stopped the run, which is then saved.
    """
    console = Console(stderr=True)
    folder = Path(config.output or f"runs/{config.name}")
    check(config)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output must be a folder, got {folder}, which is a file.")
    if not resume and (folder / CHECKPOINT).exists():
        raise FileExistsError(
            f"output must be a new run, got {folder} with a checkpoint. Add --resume or choose another."
        )
    baseline = read_baseline(config.baseline)
    train_data = load_split(config.data, config.data_root, train=True).head(config.limit)
    test_data = load_split(config.data, config.data_root, train=False).head(config.limit)
    strangers = config.evaluation.ood and load_split(config.evaluation.ood, config.data_root, train=False).head(
        config.limit
    )
    torch.manual_seed(config.seed)
    model = zoo.create(**config.model)
    optimizer = make_optimizer(config.optimizer, model, len(train_data), config.seed)
    how = config.evaluation
    method = how.method or method_of(config.optimizer).predict
    while_training = "mean" if config.laplace else method

    def measure() -> dict[str, float]:
        prediction = predict_split(model, test_data, how.epoch_samples, how, while_training)
        return {f"test_{key}": value for key, value in classification_metrics(prediction, test_data.labels).items()}

    run = Training(
        folder=folder,
        model=model,
        optimizer=optimizer,
        schedulers=make_schedulers(
            config.schedule, optimizer, num_batches(train_data, config.batch_size), config.epochs
        ),
        likelihood=likelihood_of(model),
        data=train_data,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        measure=measure,
        identity={key: value for key, value in dataclasses.asdict(config).items() if key in _IDENTITY}
        | {"training examples": len(train_data)},
    )
    if resume:
        run.resume()
    if not run.run():
        console.print(f"stopped and saved in epoch {run.epoch + 1}; continue with --resume")
        return None
    if config.laplace:
        model, method = fit_laplace(model, config, train_data), how.method or "sample"
    metrics = final_metrics(model, config, test_data, strangers or None, method)
    write_atomically(folder / METRICS, json.dumps(metrics, indent=2).encode())
    if method not in ("mean", "dropout"):
        save(model, config, folder / POSTERIOR, command, metrics, baseline, len(train_data), test_data)
    console.print_json(json.dumps(metrics))
    console.print(f"written to {folder}")
    return metrics


_IDENTITY = ("model", "data", "optimizer", "batch_size", "epochs", "schedule", "laplace", "seed", "limit")


def check(config: Config) -> None:
    """Refuse a configuration that would fail only after the training."""
    for name in ("epochs", "batch_size"):
        at_least_one(name, getattr(config, name))
    for name in ("num_samples", "epoch_samples", "batch_size"):
        at_least_one(f"evaluation.{name}", getattr(config.evaluation, name))
    if config.limit is not None:
        at_least_one("limit", config.limit)
    config.schedule.check()
    point = method_of(config.optimizer).point
    if config.laplace and not point:
        raise ValueError(
            f"laplace must follow the training of a point estimate, got optimizer {config.optimizer['name']!r}. Leave "
            "one of them out."
        )
    if config.laplace:
        positive("laplace.temperature", config.laplace.temperature)
        if config.laplace.prior_precision is not None:
            positive("laplace.prior_precision", config.laplace.prior_precision)
    methods = ("mean", "dropout") if point and not config.laplace else tuple(METHODS)
    if (method := config.evaluation.method) is not None and method not in methods:
        raise ValueError(
            f"evaluation.method must be one of {', '.join(methods)} after this training, got {method!r}."
            f"{near(method, methods)}"
        )


def fit_laplace(model: nn.Module, config: Config, data: Split) -> nn.Module:
    """Return the trained network with the precisions of its Laplace approximation."""
    assert config.laplace
    size = config.evaluation.batch_size
    return bl.laplace(
        model,
        [(data.inputs(rows), data.labels[rows]) for rows in (slice(i, i + size) for i in range(0, len(data), size))],
        prior_precision="marglik" if config.laplace.prior_precision is None else config.laplace.prior_precision,
        layers=bl.last_layer if config.laplace.last_layer else None,
        temperature=config.laplace.temperature,
    )


def predict_split(model: nn.Module, data: Split, num_samples: int, how: Evaluation, method: str) -> Prediction:
    """Return the prediction for a split."""
    return predict(
        model,
        data.inputs(slice(None)),
        num_samples,
        batch_size=how.batch_size,
        generator=torch.Generator().manual_seed(how.seed),
        method=method,  # pyright: ignore[reportArgumentType]
    )


def final_metrics(
    model: nn.Module, config: Config, test: Split, strangers: Split | None, method: str
) -> dict[str, float]:
    """Measure the trained model on the test split, and against strangers."""
    how = config.evaluation
    known = predict_split(model, test, how.num_samples, how, method)
    metrics = classification_metrics(known, test.labels)
    if strangers is not None:
        strange = predict_split(model, strangers, how.num_samples, how, method)
        name = short_name(str(how.ood))
        metrics[f"ood_auroc_{name}"] = ood_auroc(known.total, strange.total)
        if method != "mean":
            metrics[f"ood_auroc_{name}_epistemic"] = ood_auroc(known.epistemic, strange.epistemic)
    counts = {"num_samples": how.num_samples if method != "mean" else 1, "seed": how.seed}
    return metrics | {"test_examples": len(test)} | counts


def read_baseline(folder: str | None) -> dict[str, float | int | str]:
    """Return the figures of a twin's run, rounded, with the name of its optimiser."""
    if folder is None:
        return {}
    path = Path(folder) / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"baseline must be a finished run, got {folder} without {METRICS}. Train it first.")
    try:
        figures = {key: round(value, 5) for key, value in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(
            f"baseline must be a finished run, got {path}, which holds no figures. Train it anew."
        ) from None
    return {"optimizer": "adam"} | figures


def save(
    model: nn.Module,
    config: Config,
    folder: Path,
    command: str,
    metrics: dict[str, float],
    baseline: dict[str, float | int | str],
    dataset_size: int,
    test: Split,
) -> None:
    """Save the posterior with its card."""
    import torchvision

    bl.save_posterior(
        model,
        folder,
        name=config.name,
        class_names=test.classes,
        dataset=f"{short_name(config.data)} ({dataset_size} train, {len(test)} test)",
        dataset_size=dataset_size,
        temperature=config.laplace.temperature if config.laplace else float(config.optimizer.get("temperature", 1.0)),
        optimizer=config.optimizer
        | {"batch_size": config.batch_size, "epochs": config.epochs}
        | ({"laplace": dataclasses.asdict(config.laplace)} if config.laplace else {}),
        recipe=command,
        versions={"bayeslayers": bl.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__},
        metrics={key: round(value, 5) for key, value in metrics.items()},
        baseline=baseline,
        notes=config.notes,
    )
