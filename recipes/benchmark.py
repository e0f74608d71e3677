"""Costs as ratios, measured side by side in one process: medians of interleaved runs."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayeslayers as bl
import zoo

BATCH = 128


@dataclass(frozen=True)
class Row:
    """One measurement: the median step of an optimiser, and its ratio to that of Adam on the twin."""

    model: str
    batch: int
    optimizer: str
    median_ms: float
    ratio_to_adam: float


def benchmark_step(rounds: int = 100, seed: int = 0) -> list[Row]:
    """Time a training step of VOGN (one draw) beside one of Adam (foreach) on the deterministic twin.

    Args:
        rounds: Interleaved steps of each, after a tenth as many to warm up.
        seed: Of weights and data.
    """
    rows = []
    for name in ("mlp", "lenet5"):
        torch.manual_seed(seed)
        model = zoo.create(name)
        twin = deterministic_twin(model)
        x, y = torch.rand(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
        adam = torch.optim.Adam(twin.parameters(), foreach=True)
        steps = {"adam": _step(twin, adam, x, y), "vogn": _step(model, bl.VOGN(model, 60_000), x, y)}
        medians = interleaved_medians(steps, rounds)
        rows += [
            Row(name, BATCH, optimizer, round(1e3 * median, 3), round(median / medians["adam"], 3))
            for optimizer, median in medians.items()
        ]
    return rows


def interleaved_medians(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median time of each action in seconds, the actions taking turns."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + rounds // 10):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            if number >= rounds // 10:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def deterministic_twin(model: nn.Module) -> nn.Module:
    """Return the same network of torch.nn layers, with the posterior means as weights."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if isinstance(child, bl.BayesianLayer):
                setattr(parent, name, _ordinary(child))
    return twin


def _ordinary(layer: bl.BayesianLayer) -> nn.Module:
    if isinstance(layer, bl.BayesLinear):
        plain: nn.Module = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    elif isinstance(layer, bl.BayesConv2d):
        sizes = (layer.kernel_size, layer.stride, layer.padding)
        plain = nn.Conv2d(layer.in_channels, layer.out_channels, *sizes)  # pyright: ignore[reportArgumentType]
    else:
        raise TypeError(f"no ordinary twin for {type(layer).__name__}.")
    plain.load_state_dict(layer.state_dict(), strict=False)
    return plain


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable[[], object]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)  # pyright: ignore[reportCallIssue, reportArgumentType]
