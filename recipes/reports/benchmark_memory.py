"""The memory of a training step beside that of a step of Adam, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bayeslayers as bl
import zoo
from recipes.reports.benchmark import LR, peak_memory, steps
from recipes.training.methods import make_optimizer, method_of

MODELS = ("resnet18_cifar", "mlp4096")
_STEPS = 3  # the second and third reuse what the first has allocated, or do not


@dataclass(frozen=True)
class MemoryRow:
    """One measurement: the most memory that network, optimiser and steps took, beside that under Adam.

    A Bayesian network's precision is included, which the deterministic one under Adam does not have.
    """

    model: str
    batch: int
    optimizer: str
    peak_mb: float
    ratio_to_adam: float


def benchmark_memory(models: Sequence[str] = MODELS, optimizers: Sequence[str] = ("vogn", "ivon")) -> list[MemoryRow]:
    """Measure the peak of three steps: resident memory beyond what the process held before it built the network.

    Args:
        models: Names of `NETWORKS`, or of image classifiers of the zoo, on batches of 64.
        optimizers: Names of `recipes.training.methods`, beside Adam.
    """
    rows = []
    for name in models:
        peaks = {optimizer: _in_own_process(name, optimizer) for optimizer in ("adam", *optimizers)}
        rows += [
            MemoryRow(name, BATCH, optimizer, round(peak / 2**20, 1), round(peak / peaks["adam"], 3))
            for optimizer, peak in peaks.items()
        ]
    return rows


def _in_own_process(name: str, optimizer: str) -> int:
    """Return the memory in bytes; memory that a process has used before would be reused unseen."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured_peak, name, optimizer).result()


def measured_peak(name: str, optimizer: str) -> int:
    """Return the most bytes that building a network and three steps take beyond what the process holds now.

    Args:
        name: Name of the network, as in `benchmark_memory`.
        optimizer: Name of the method.
    """
    torch.set_num_threads(1)
    peak_memory(partial(_run, "mlp", optimizer))  # imports, and code that is loaded by its first call
    before = peak_memory(lambda: None)
    return peak_memory(partial(_run, name, optimizer)) - before


def _run(name: str, optimizer: str) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name]() if name in NETWORKS else _of_zoo(name)
    net = bl.to_deterministic(model) if method_of({"name": optimizer}).point else model
    del model
    options: dict[str, Any] = {"foreach": True} if optimizer == "adam" else {}
    made = make_optimizer({"name": optimizer, "lr": LR, **options}, net, 60_000, seed=0)
    steps(net, made, x, torch.randint(10, (len(x),)), _STEPS)()


def _of_zoo(name: str) -> tuple[nn.Module, Tensor]:
    model = zoo.create(name)
    return model, torch.rand(BATCH, *zoo.card_of(model).input_size)


def _wide() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10)]
    return bl.to_bayesian(nn.Sequential(*layers))[0], torch.rand(BATCH, 784)


BATCH = 64
NETWORKS = {"mlp4096": _wide}
