"""What the optimisers reach by their defaults, nothing but `dataset_size` given, beside Adam after as many epochs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayeslayers as bl
from bayeslayers.checks import at_least_one, did_you_mean
from recipes.reports.small_tasks import IGNORED, Data, Task
from recipes.reports.small_tasks import TASKS as OTHERS
from recipes.reports.text_tasks import TEXT_TASKS

NUM_SAMPLES = 32
TASKS = OTHERS | TEXT_TASKS


def _adam(net: nn.Module, size: int, generator: torch.Generator) -> tuple[nn.Module, torch.optim.Optimizer]:
    return net, torch.optim.Adam(net.parameters(), lr=1e-3)


def _vogn(net: nn.Module, size: int, generator: torch.Generator) -> tuple[nn.Module, torch.optim.Optimizer]:
    bayesian, _ = bl.to_bayesian(net)
    return bayesian, bl.VOGN(bayesian, dataset_size=size, generator=generator)


def _ivon(net: nn.Module, size: int, generator: torch.Generator) -> tuple[nn.Module, torch.optim.Optimizer]:
    return net, bl.IVON(net, dataset_size=size, generator=generator)


METHODS = {"adam": _adam, "vogn": _vogn, "ivon": _ivon}


@dataclass(frozen=True)
class DefaultsRow:
    """One method on one task, means over seeds: `metric` is "accuracy" or "rmse", `value` that on test examples.

    `ece` is the expected calibration error of classes, None for real targets.
    """

    task: str
    data: str
    method: str
    seeds: int
    metric: str
    value: float
    nll: float
    seconds: float
    ece: float | None = None


def benchmark_defaults(
    tasks: Sequence[str] = ("toy", "mnist", "energy"), seeds: int = 3, data_root: Path | None = None
) -> list[DefaultsRow]:
    """Train each method on each task, and measure it on test examples.

    Args:
        tasks: Names of `small_tasks.TASKS`.
        seeds: So many runs, of seeds 0, 1, ...: of the training examples, first weights, order and samples.
        data_root: Folder of the data; None for stand-ins, which need none.

    Raises:
        ValueError: If a task is not known.
        FileNotFoundError: If the folder does not hold a task's data.
    """
    at_least_one("seeds", seeds)
    for name in tasks:
        if name not in TASKS:
            raise ValueError(f"tasks must be among {', '.join(TASKS)}, got {name!r}.{did_you_mean(name, TASKS)}")
    rows = []
    for name in tasks:
        task = TASKS[name]
        for method in METHODS:
            runs, source = [], ""
            for seed in range(seeds):
                data = task.read(data_root, seed)
                runs.append(run_defaults(task, data, method, seed))
                source = data.source
            value, nll, seconds, ece = (statistics.fmean(column) for column in zip(*runs, strict=True))
            metric = "accuracy" if task.likelihood.discrete else "rmse"
            known = None if math.isnan(ece) else ece
            rows.append(DefaultsRow(name, source, method, seeds, metric, value, nll, round(seconds, 2), known))
    return rows


def run_defaults(task: Task, data: Data, method: str, seed: int) -> tuple[float, float, float, float]:
    """Train one method; return accuracy or RMSE, NLL, the seconds that training took, and the ECE, NaN without one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model, optimizer = METHODS[method](task.build(), len(data.x), generator)
        began = time.perf_counter()
        for x, y in _batches(task, data, seed):
            optimizer.step(_closure(task, model, optimizer, x, y))  # pyright: ignore[reportCallIssue, reportArgumentType]
        seconds = time.perf_counter() - began
        batches = zip(data.x_test.split(250), data.y_test.split(250), strict=True)
        evaluation = bl.evaluate(
            model.eval(),
            batches,
            num_samples=NUM_SAMPLES,
            likelihood=task.likelihood,
            method="mean" if method == "adam" else "sample",
            generator=generator,
            ignore_index=IGNORED if task.likelihood.discrete else None,
        )
    metric = "accuracy" if task.likelihood.discrete else "rmse"
    found = evaluation.metrics
    return found[metric], found["nll"], seconds, found.get("ece", math.nan)


def _batches(task: Task, data: Data, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield full batches of all epochs, in an order of the seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(task.epochs):
        order = torch.randperm(len(data.x), generator=generator)
        for index in order[: len(order) // task.batch_size * task.batch_size].split(task.batch_size):
            yield data.x[index], data.y[index]


def _closure(
    task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        output = model(x)
        loss = (
            F.cross_entropy(output, y, ignore_index=IGNORED)
            if y.dtype == torch.long
            else task.likelihood.loss(output, y)
        )
        loss.backward()
        return loss

    return closure
