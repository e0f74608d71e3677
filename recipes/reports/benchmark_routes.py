"""Whether the curvature rules choose fast routes: each route's time on a grid of layers, beside that of the choice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bayeslayers.checks import at_least_one
from bayeslayers.curvature.conv_routes import ROUTES, in_groups
from bayeslayers.curvature.costs import convolution_costs, fastest, matrix_costs
from bayeslayers.curvature.moments import Moments
from bayeslayers.curvature.settings import Settings
from recipes.reports.benchmark import interleaved_medians

_HOPELESS = 10.0  # times the costs of the choice: a route that is not measured


class Convolution(NamedTuple):
    """A layer of square images: examples, channels in and out, size of the image, kernel, stride, groups."""

    n: int
    c_in: int
    c_out: int
    size: int
    kernel: int
    stride: int = 1
    groups: int = 1


class Sequence(NamedTuple):
    """A linear layer: examples, positions, features out and in."""

    n: int
    positions: int
    c_out: int
    c_in: int


GRID: tuple[Convolution | Sequence, ...] = (
    Convolution(128, 1, 6, 28, 5),
    Convolution(128, 6, 16, 14, 5),
    Convolution(32, 3, 64, 32, 3),
    Convolution(64, 3, 16, 32, 3),
    Convolution(128, 3, 32, 32, 5),
    Convolution(8, 3, 16, 96, 3),
    Convolution(64, 12, 24, 16, 3),
    Convolution(64, 16, 16, 32, 3),
    Convolution(64, 16, 32, 32, 3, 2),
    Convolution(64, 32, 32, 16, 3),
    Convolution(64, 64, 64, 8, 3),
    Convolution(32, 64, 64, 32, 3),
    Convolution(32, 64, 128, 32, 3, 2),
    Convolution(32, 64, 128, 32, 1, 2),
    Convolution(32, 128, 128, 16, 3),
    Convolution(32, 128, 256, 16, 3, 2),
    Convolution(32, 256, 256, 8, 3),
    Convolution(32, 256, 512, 8, 1, 2),
    Convolution(32, 512, 512, 4, 3),
    Convolution(32, 512, 512, 2, 3),
    Convolution(32, 256, 256, 1, 3),
    Convolution(8, 32, 32, 64, 3),
    Convolution(8, 3, 64, 64, 7, 2),
    Convolution(16, 256, 64, 16, 1),
    Convolution(32, 64, 64, 16, 3, 1, 64),
    Convolution(32, 128, 128, 16, 3, 1, 4),
    Sequence(64, 2, 256, 256),
    Sequence(32, 4, 512, 512),
    Sequence(32, 4, 32, 32),
    Sequence(64, 8, 300, 100),
    Sequence(32, 16, 512, 512),
    Sequence(32, 64, 256, 256),
    Sequence(32, 64, 1024, 256),
    Sequence(16, 197, 192, 192),
)


@dataclass(frozen=True)
class RoutesRow:
    """One layer: milliseconds of its routes, the one that is chosen, the fastest, and the ratio of their times."""

    layer: str
    chosen: str
    fastest: str
    ratio: float
    milliseconds: dict[str, float]


def benchmark_routes(
    rounds: int = 100, seed: int = 0, grid: Iterable[Convolution | Sequence] | None = None
) -> list[RoutesRow]:
    """Time the routes to the squares of a weight's gradients on a grid of layers, in process time on one thread.

    A route whose estimate is ten times that of the choice is not measured.

    Args:
        rounds: Runs of each route, after a tenth as many to warm up.
        seed: Of the layers' inputs.
        grid: The layers; None for `GRID`.

    Raises:
        ValueError: If `rounds` is not positive.
    """
    at_least_one("rounds", rounds)
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        generator = torch.Generator().manual_seed(seed)
        for layer in GRID if grid is None else grid:
            costs, routes = routes_of(layer, generator)
            chosen = fastest(costs)
            tried = {name: run for name, run in routes.items() if costs[name] <= _HOPELESS * costs[chosen]}
            medians = interleaved_medians(tried, rounds, time.process_time)
            best = min(medians, key=medians.__getitem__)
            times = {name: round(1e3 * median, 3) for name, median in medians.items()}
            rows.append(RoutesRow(_name(layer), chosen, best, round(medians[chosen] / medians[best], 3), times))
    finally:
        torch.set_num_threads(threads)
    return rows


def routes_of(
    layer: Convolution | Sequence, generator: torch.Generator | None = None
) -> tuple[dict[str, float], dict[str, Callable[[], object]]]:
    """Return the costs of a layer's routes as the rules estimate them, and the routes on a random batch.

    Args:
        layer: The layer.
        generator: Source of the batch.
    """
    if isinstance(layer, Sequence):
        g = torch.randn(layer.n, layer.positions, layer.c_out, generator=generator)
        x = torch.randn(layer.n, layer.positions, layer.c_in, generator=generator)
        sums: dict[str, Callable[[], object]] = {name: partial(_sums, name, g, x) for name in ("pairs", "products")}
        return matrix_costs(g, x), sums
    settings = Settings((layer.stride,) * 2, (layer.kernel // 2,) * 2, (1, 1), False, (0, 0), layer.groups)
    x = torch.randn(layer.n, layer.c_in, layer.size, layer.size, generator=generator)
    weight = torch.randn(layer.c_out, layer.c_in // layer.groups, layer.kernel, layer.kernel, generator=generator)
    g = torch.convolution(x, weight, None, *settings)
    routes: dict[str, Callable[[], object]] = {
        name: partial(in_groups, route, x, g, weight, settings, True) for name, route in ROUTES.items()
    }
    return convolution_costs(x, g, weight.shape, settings), routes


def _sums(route: str, g: Tensor, x: Tensor) -> Moments:
    sums = Moments.zeros(g, g.shape[2], x.shape[2])
    (sums.add_pairs if route == "pairs" else sums.add_products)(g, x)
    return sums


def _name(layer: Convolution | Sequence) -> str:
    if isinstance(layer, Sequence):
        return f"{layer.n} x {layer.positions} positions, linear {layer.c_in} -> {layer.c_out}"
    name = f"{layer.n} x {layer.size} x {layer.size}, {layer.kernel} x {layer.kernel} {layer.c_in} -> {layer.c_out}"
    name += f", stride {layer.stride}" if layer.stride > 1 else ""
    return name + (f", {layer.groups} groups" if layer.groups > 1 else "")
