"""A task in one file: noisy points on a line, real targets, a Gaussian likelihood, and metrics of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import bayeslayers as bl
from recipes.data.examples import Points, shuffled
from recipes.reports.measure import Section
from recipes.tasks.posterior_task import PosteriorTask, Splits
from recipes.training.config import Evaluation, RunConfig
from recipes.training.run_folder import Column

SLOPE, NOISE = 2.0, 0.1


@dataclass(kw_only=True)
class Config(RunConfig):
    """A line.

    Attributes:
        slope: Of the line.
    """

    recipe: str = "line"
    name: str = "line"
    data: str = "line"
    model: dict[str, Any] = field(
        default_factory=lambda: {"name": "mlp", "input_size": [1], "widths": [8], "num_classes": 2}
    )
    optimizer: dict[str, Any] = field(default_factory=lambda: {"name": "ivon", "lr": 0.1, "hess_init": 1.0})
    batch_size: int = 8
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(num_samples=8, epoch_samples=2, ood=["far"]))
    slope: float = SLOPE


def points(slope: float, count: int, seed: int, shift: float = 0.0) -> Points:
    """Return points on the line, from -1 to 1 and moved by `shift`."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(count, 1, generator=generator) - 1 + shift
    return Points(x, slope * x + NOISE * torch.randn(count, 1, generator=generator))


class AbsoluteError:
    """The tally: the mean absolute error of the steps."""

    def __init__(self):
        self.sums, self.tensors = {"mae": 0.0}, {}

    def add(self, output, target):
        self.sums["mae"] += float((output[:, :1] - target).abs().mean())

    def means(self, steps):
        return {"mae": self.sums["mae"] / steps}

    def load(self, sums, tensors):
        self.sums = dict(sums)


class Line(PosteriorTask):
    """Regression of a line."""

    name = "line"
    Config = Config
    likelihood = bl.Gaussian()
    score = "variance"
    logged = ("rmse", "nll", "crps")
    columns = (Column("rmse", "RMSE", "lower", "m"), Column("nll", "NLL", "lower", "nats"))

    def read_splits(self) -> Splits:
        train, test = points(self.config.slope, 40, 0), points(self.config.slope, 30, 1)
        return Splits(train, test, "test", test, {"far": points(self.config.slope, 20, 2, shift=9.0)})

    def batches(self, epoch, start):
        train, config = self.splits.train, self.config
        for index, _ in shuffled(len(train), config.batch_size, config.seed, epoch, start):
            yield train.inputs(index), train.targets[index]

    def tally(self):
        return AbsoluteError()

    @classmethod
    def sections(cls, model, request, data, evaluation) -> list[Section]:
        worst = float(evaluation.scores["residual"].abs().max())
        return [Section("Residuals", f"The largest residual is {worst:.3f}.")]

    @classmethod
    def refusal(cls, card) -> str:
        return "" if card.likelihood == "gaussian" else "posterior must be of real targets."

    @classmethod
    def read_test_splits(cls, card, request, data_root) -> tuple[Points, Mapping[str, Points]]:
        return points(SLOPE, 30, 1), {name: points(SLOPE, 20, 2, shift=9.0) for name in request.ood}
