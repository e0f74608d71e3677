"""How the cost of a training step beside Adam's grows with batch, width, depth and samples, on an MLP."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

import bayeslayers as bl
from bayeslayers.checks import at_least_one
from bayeslayers.plots.canvas import finish, new_figure
from recipes.reports.benchmark import LR, interleaved_medians, steps
from recipes.training.methods import make_optimizer

_TURN = 3  # steps


@dataclass(frozen=True)
class Size:
    """An MLP with hidden layers of one width, its batch, and the samples of a step."""

    batch: int = 128
    width: int = 256
    depth: int = 2
    samples: int = 1


AXES: Mapping[str, Sequence[int]] = {
    "batch": (16, 64, 256, 1024),
    "width": (64, 256, 1024),
    "depth": (1, 2, 8, 32),
    "samples": (1, 2, 5, 10),
}


@dataclass(frozen=True)
class GrowthRow:
    """One measurement: the median steps for one value on an axis, the others being those of `Size()`."""

    axis: str
    value: int
    optimizer: str
    adam_ms: float
    median_ms: float
    ratio_to_adam: float


def benchmark_growth(
    rounds: int = 100,
    optimizers: Sequence[str] = ("vogn", "ivon"),
    axes: Mapping[str, Sequence[int]] = AXES,
    cpu: bool = True,
    chart: Path | None = None,
) -> list[GrowthRow]:
    """Time steps beside those of Adam, one axis after the other.

    Args:
        rounds: Steps of each, a third of them in turn with the others'.
        optimizers: Names of `recipes.training.methods`.
        axes: Values by the names of `Size`'s numbers.
        cpu: Measure the time of the process in place of that of the clock.
        chart: File for a picture, or None.
    """
    at_least_one("rounds", rounds)
    rows = []
    for axis, values in axes.items():
        for value in values:
            rows += _measured(axis, value, optimizers, max(1, rounds // _TURN), cpu)
    if chart is not None:
        draw_growth(rows, chart)
    return rows


def _measured(axis: str, value: int, optimizers: Sequence[str], turns: int, cpu: bool) -> list[GrowthRow]:
    size = replace(Size(), **{axis: value})
    torch.manual_seed(0)
    x, y = torch.rand(size.batch, 784), torch.randint(10, (size.batch,))
    actions = {}
    for name in ("adam", *optimizers):
        widths = [784, *[size.width] * size.depth]
        hidden = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
        net: nn.Module = nn.Sequential(*hidden, nn.Linear(size.width, 10))
        options = {"foreach": True} if name == "adam" else {"num_samples": size.samples}
        net = net if name == "adam" else bl.to_bayesian(net)[0]
        actions[name] = steps(
            net, make_optimizer({"name": name, "lr": LR, **options}, net, 60_000, seed=0), x, y, _TURN
        )
    medians = interleaved_medians(actions, turns, time.process_time if cpu else time.perf_counter)
    adam = medians.pop("adam")
    each = 1e3 / _TURN
    return [
        GrowthRow(axis, value, name, round(each * adam, 3), round(each * median, 3), round(median / adam, 3))
        for name, median in medians.items()
    ]


def draw_growth(rows: Sequence[GrowthRow], path: Path) -> None:
    """Draw the ratios over each axis.

    Args:
        rows: Measurements.
        path: File to write.
    """
    names = list(dict.fromkeys(row.axis for row in rows))
    figure = new_figure(3.2 * len(names), 3.2)
    for axis, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        for optimizer in dict.fromkeys(row.optimizer for row in rows):
            own = [row for row in rows if (row.axis, row.optimizer) == (name, optimizer)]
            axis.plot([row.value for row in own], [row.ratio_to_adam for row in own], "o-", label=optimizer)
        axis.set_xscale("log", base=2)
        axis.set_xlabel(name)
        axis.axhline(1, color="grey", lw=0.8)
        others = ", ".join(f"{key} {value}" for key, value in asdict(Size()).items() if key != name)
        axis.set_title(others, fontsize=7)
    figure.axes[0].set_ylabel("step / step of Adam")
    figure.axes[0].legend()
    finish(figure, path)
