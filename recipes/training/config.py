"""The configuration of a training run of classes: what a YAML file says, and its rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from torch import nn

import bayeslayers as bl
import zoo
from bayeslayers.checks import at_least_one, did_you_mean, non_negative, positive
from bayeslayers.prediction.predict import METHODS
from recipes.data.augmentation import Augmentation
from recipes.data.names import expanded
from recipes.training.devices import device_named
from recipes.training.methods import check_options, make_optimizer, method_of
from recipes.training.schedules import Schedule

_LARGEST_SEED = 2**46  # torch takes 64 bits, and the order of an epoch is drawn by 100,003 times the seed


@dataclass
class Evaluation:
    """How a run is measured.

    Attributes:
        num_samples: Draws of the final measurement.
        epoch_samples: Draws of the measurement after each epoch.
        seed: Of the draws.
        method: How to predict, as in `bl.predict`: "sample", "mean", "local", "moments", "dropout", "linearised". None
            for draws of a posterior, and one pass of a point estimate.
        ood: Out-of-distribution data sets, for the AUROC of total entropy.
        batch_size: Examples per forward pass.
    """

    num_samples: int = 64
    epoch_samples: int = 8
    seed: int = 0
    method: str | None = None
    ood: list[str] = field(default_factory=list)
    batch_size: int = 250

    def __post_init__(self):
        self.ood = [expanded(name) for name in self.ood]


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
    """A training run. A `~` that a path begins with is the home folder.

    Attributes:
        name: Name of the run and its posterior.
        model: `name` in the zoo, and the arguments of its builder.
        data: Data set to train and test on.
        optimizer: `name` of a method of `recipes.training.methods`, and its arguments.
        batch_size: Examples per step.
        micro_batch: Examples per forward pass, where memory does not hold a step's; None for all of them.
        epochs: Passes over the training data.
        augmentation: How training images are varied.
        schedule: Learning rate and temperature over the run.
        seed: Of initial weights, order of the data, and draws.
        laplace: Fit a Laplace approximation after a point estimate is trained; None for none.
        evaluation: How the result is measured.
        start: Run folder, or posterior as for `zoo.load`, whose network the run goes on from, with its precisions where
            the optimizer keeps them; None for a network that has learned nothing.
        baseline: Run folder of a deterministic baseline, whose metrics go into the card beside ours.
        output: Run folder; `runs/NAME` if None.
        data_root: Folder of data already there; downloaded to `data` if None.
        limit: Use so many examples of each split alone.
        validation: Training examples to hold out. The best epoch is the one of the lowest negative
            log-likelihood on them; 0: on the test split, whose metrics are then optimistic.
        device: Where to train, as torch names it: "cuda:1"; None for the first GPU, or the CPU if there is none.
        compile: Run training steps through torch.compile, at the cost of a minute at the start.
        checkpoint_minutes: Minutes between two checkpoints within an epoch, > 0; one is also saved after each epoch.
        tensorboard: Write events for TensorBoard too, whose package is the extra `tensorboard`.
        notes: Text for the card.
        recipe: Which recipe reads this configuration.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    name: str
    model: dict[str, Any]
    data: str
    optimizer: dict[str, Any]
    batch_size: int = 128
    micro_batch: int | None = None
    epochs: int = 10
    augmentation: Augmentation = field(default_factory=Augmentation)
    schedule: Schedule = field(default_factory=Schedule)
    seed: int = 0
    laplace: Laplace | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)
    start: str | None = None
    baseline: str | None = None
    output: str | None = None
    data_root: str | None = None
    limit: int | None = None
    validation: int = 0
    device: str | None = None
    compile: bool = False
    checkpoint_minutes: float = 10.0
    tensorboard: bool = False
    notes: str = ""
    recipe: str = "classification"

    def __post_init__(self):
        self.data = expanded(self.data)
        for name in ("start", "baseline", "output", "data_root"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, expanded(path))


def make_model(config: Config) -> nn.Module:
    """Return the network of a configuration.

    Raises:
        ValueError: If there is no such network, or its arguments are not what it takes.
        TypeError: Likewise.
    """
    try:
        return zoo.create(**config.model)
    except (TypeError, ValueError, LookupError, AttributeError) as error:  # of whatever a builder does with a value
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"model {config.model['name']!r} cannot be made: {error}") from None


def device_of(config: Config) -> torch.device:
    """Return where to train.

    Raises:
        ValueError: If there is no such device.
    """
    if config.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device_named(config.device)


def check(config: Config) -> None:
    """Refuse a configuration that would fail only after the training."""
    for name in ("epochs", "batch_size"):
        at_least_one(name, getattr(config, name))
    for name in ("num_samples", "epoch_samples", "batch_size"):
        at_least_one(f"evaluation.{name}", getattr(config.evaluation, name))
    for name in ("limit", "micro_batch"):
        if getattr(config, name) is not None:
            at_least_one(name, getattr(config, name))
    check_seed("seed", config.seed)
    check_seed("evaluation.seed", config.evaluation.seed)
    _check_model(config.model)
    _check_optimizer(config.optimizer, device_of(config))
    non_negative("validation", config.validation)
    positive("checkpoint_minutes", config.checkpoint_minutes)
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ValueError(
            "tensorboard must be installed for its events to be written, got no such package. "
            "Run pip install 'bayeslayers[tensorboard]', or leave tensorboard: true out."
        )
    config.schedule.check()
    point = method_of(config.optimizer).point
    if config.optimizer.get("vectorise"):
        raise ValueError("optimizer.vectorise must be false here, for a step may come in several backward passes.")
    if point and (steps := config.schedule.temperature_steps):
        raise ValueError(
            f"schedule.temperature_steps must be 0 for {config.optimizer['name']}, which has no temperature, got "
            f"{steps}. Leave it out."
        )
    if config.compile and config.optimizer.get("fisher", "sampled") == "sampled" and "kfac" in config.optimizer["name"]:
        raise ValueError(
            "compile must be false under fisher: sampled, which draws labels from the output. Use empirical."
        )
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
    if (how := config.evaluation.method) is not None and how not in methods:
        raise ValueError(
            f"evaluation.method must be one of {', '.join(methods)} after this training, got {how!r}."
            f"{did_you_mean(how, methods)}"
        )


def check_seed(name: str, seed: int) -> None:
    """Refuse a seed that torch would not take."""
    if abs(seed) > _LARGEST_SEED:
        raise ValueError(f"{name} must be an integer from -2**46 to 2**46, got {seed}.")


def _check_model(model: Mapping[str, Any]) -> None:
    """Refuse a model without a name."""
    if not isinstance(model.get("name"), str):
        raise ValueError(f"model must have a name, as lenet5, got {model}. zoo.list_models() has them all.")


def _check_optimizer(optimizer: Mapping[str, Any], device: torch.device) -> None:
    """Refuse an optimizer that the run could not make."""
    method_of(optimizer)
    name, options = optimizer["name"], [key for key in optimizer if key != "name"]
    advice = f" To drop the options of another optimizer, give it whole: --optimizer '{{name: {name}, lr: 0.001}}'."
    check_options(name, options, advice)
    make_optimizer(optimizer, bl.BayesLinear(1, 1).to(device), dataset_size=1, seed=0)  # which checks the values
