"""The configuration of a run that trains one network: what a YAML file says of any task, and its rules.

A file writes all settings side by side; here they stand in three groups. A task's own `Config` adds to `RunConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import nn

import bayeslayers as bl
import zoo
from bayeslayers.checks import at_least_one, did_you_mean, non_negative, positive
from bayeslayers.prediction.predict import METHODS
from recipes.data.names import expanded
from recipes.training.devices import device_named
from recipes.training.methods import check_options, make_optimizer, method_of
from recipes.training.schedules import Schedule

_LARGEST_SEED = 2**46  # torch takes 64 bits, and the order of an epoch is drawn by 100,003 times the seed
_PATHS = ("start", "baseline", "output", "data_root")


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

    def check(self) -> None:
        """Refuse a count that is none, and a seed that torch would not take."""
        for name in ("num_samples", "epoch_samples", "batch_size"):
            at_least_one(f"evaluation.{name}", getattr(self, name))
        check_seed("evaluation.seed", self.seed)


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

    def check(self) -> None:
        """Refuse a precision or a temperature that is not positive."""
        positive("laplace.temperature", self.temperature)
        if self.prior_precision is not None:
            positive("laplace.prior_precision", self.prior_precision)


@dataclass(kw_only=True)
class Data:
    """What is trained on.

    Attributes:
        data: Data set to train and test on.
        data_root: Folder of data already there; downloaded to `data` if None.
        limit: Use so many examples of each split alone.
        validation: Training examples to hold out. The best epoch is the one of the lowest negative
            log-likelihood on them; 0: on the test split, whose metrics are then optimistic.
    """

    data: str
    data_root: str | None = None
    limit: int | None = None
    validation: int = 0


@dataclass(kw_only=True)
class Learning:
    """What is trained, and how.

    Attributes:
        model: `name` in the zoo, and the arguments of its builder.
        optimizer: `name` of a method of `recipes.training.methods`, and its arguments.
        batch_size: Examples per step.
        micro_batch: Examples per forward pass, where memory does not hold a step's; None for all of them.
        epochs: Passes over the training data.
        schedule: Learning rate and temperature over the run.
        seed: Of initial weights, order of the data, and draws.
        start: Run folder, or posterior as for `zoo.load`, whose network the run goes on from, with its precisions where
            the optimizer keeps them; None for a network that has learned nothing.
        laplace: Fit a Laplace approximation after a point estimate is trained; None for none.
        device: Where to train, as torch names it: "cuda:1"; None for the first GPU, or the CPU if there is none.
        compile: Run training steps through torch.compile, at the cost of a minute at the start.
        precision: "bfloat16" for training steps under autocast; measurements are in float32.
        channels_last: Keep colours innermost in the memory of convolutions, which GPUs are faster for.
    """

    model: dict[str, Any]
    optimizer: dict[str, Any]
    batch_size: int = 128
    micro_batch: int | None = None
    epochs: int = 10
    schedule: Schedule = field(default_factory=Schedule)
    seed: int = 0
    start: str | None = None
    laplace: Laplace | None = None
    device: str | None = None
    compile: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = False


@dataclass(kw_only=True)
class Outcome:
    """What comes of it.

    Attributes:
        name: Name of the run and its posterior.
        evaluation: How the result is measured.
        baseline: Run folder of a deterministic baseline, whose metrics go into the card beside ours.
        output: Run folder; `runs/NAME` if None.
        checkpoint_minutes: Minutes between two checkpoints within an epoch, > 0; one is also saved after each epoch.
        tensorboard: Write events for TensorBoard too, whose package is the extra `tensorboard`.
        notes: Text for the card.
    """

    name: str
    evaluation: Evaluation = field(default_factory=Evaluation)
    baseline: str | None = None
    output: str | None = None
    checkpoint_minutes: float = 10.0
    tensorboard: bool = False
    notes: str = ""


@dataclass(kw_only=True)
class RunConfig(Outcome, Learning, Data):
    """A run of one network. A `~` that a path begins with is the home folder.

    Attributes:
        recipe: Name of the task, which reads this configuration.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    recipe: str

    def __post_init__(self):
        self.data = expanded(self.data)
        for name in _PATHS:
            if (path := getattr(self, name)) is not None:
                setattr(self, name, expanded(path))


def make_model(learning: Learning) -> nn.Module:
    """Return the network of a configuration.

    Raises:
        ValueError: If there is no such network, or its arguments are not what it takes.
        TypeError: Likewise.
    """
    try:
        return zoo.create(**learning.model)
    except (TypeError, ValueError, LookupError, AttributeError) as error:  # of whatever a builder does with a value
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"model {learning.model['name']!r} cannot be made: {error}") from None


def device_of(learning: Learning) -> torch.device:
    """Return where to train.

    Raises:
        ValueError: If there is no such device.
    """
    if learning.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device_named(learning.device)


def check(config: RunConfig) -> None:
    """Refuse a configuration that would fail only after the training."""
    config.evaluation.check()
    _check_learning(config)
    if config.limit is not None:
        at_least_one("limit", config.limit)
    non_negative("validation", config.validation)
    positive("checkpoint_minutes", config.checkpoint_minutes)
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ValueError(
            "tensorboard must be installed for its events to be written, got no such package. "
            "Run pip install 'bayeslayers[tensorboard]', or leave tensorboard: true out."
        )
    _check_prediction(config)


def _check_learning(learning: Learning) -> None:
    for name in ("epochs", "batch_size"):
        at_least_one(name, getattr(learning, name))
    if learning.micro_batch is not None:
        at_least_one("micro_batch", learning.micro_batch)
    check_seed("seed", learning.seed)
    _check_model(learning.model)
    _check_optimizer(learning.optimizer, device_of(learning))
    check_groups(learning.optimizer, learning.batch_size)
    learning.schedule.check()
    point = method_of(learning.optimizer).point
    if learning.optimizer.get("vectorise"):
        raise ValueError("optimizer.vectorise must be false here, for a step may come in several backward passes.")
    if point and (steps := learning.schedule.temperature_steps):
        raise ValueError(
            f"schedule.temperature_steps must be 0 for {learning.optimizer['name']}, which has no temperature, got "
            f"{steps}. Leave it out."
        )
    sampled = learning.optimizer.get("fisher", "sampled") == "sampled" and "kfac" in learning.optimizer["name"]
    if learning.compile and sampled:
        raise ValueError(
            "compile must be false under fisher: sampled, which draws labels from the output. Use empirical."
        )


def _check_prediction(config: RunConfig) -> None:
    """Refuse a Laplace approximation of a posterior, and a way to predict that is not one after this training."""
    point = method_of(config.optimizer).point
    if config.laplace and not point:
        raise ValueError(
            f"laplace must follow the training of a point estimate, got optimizer {config.optimizer['name']!r}. Leave "
            "one of them out."
        )
    if config.laplace:
        config.laplace.check()
    methods = ("mean", "dropout") if point and not config.laplace else tuple(METHODS)
    if (how := config.evaluation.method) is not None and how not in methods:
        raise ValueError(
            f"evaluation.method must be one of {', '.join(methods)} after this training, got {how!r}."
            f"{did_you_mean(how, methods)}"
        )


def check_groups(optimizer: Mapping[str, Any], examples: int, what: str = "batch_size") -> None:
    """Refuse sample groups that would see unequal parts of a step's examples, whose means count alike."""
    if examples % (groups := optimizer.get("num_mc_groups", 1)):
        raise ValueError(
            f"{what} must be a multiple of optimizer.num_mc_groups, {groups}, got {examples}. Change one of them."
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
