"""What the routes to the squares of a weight's gradients cost, by their work: the rules take the fastest.

A route's seconds are its multiply-adds, the values that it copies and adds up, and its calls of torch, each times what
one takes on the device. `bayeslayers benchmark routes` compares the choice with measurements on a grid of geometries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from bayeslayers.curvature.accumulate import tile_elements
from bayeslayers.curvature.conv_routes import UNFOLDED
from bayeslayers.curvature.settings import Settings


class Device(NamedTuple):
    """Seconds that one unit of work takes.

    Attributes:
        product: A multiply-add in a large matmul.
        convolution: A multiply-add in a convolution's weight gradient.
        value: A value of a per-example gradient, written, squared and added up.
        copy: A value that is copied to another layout.
        call: A call of an op of torch.
        vector: Channels that one instruction computes.
        narrow: Columns below which a matmul is slow.
    """

    product: float
    convolution: float
    value: float
    copy: float
    call: float
    vector: int
    narrow: float


# Of one core of an AMD EPYC with AVX-512, fitted to the grid; only the ratios decide. No GPU has been measured: its
# numbers are guesses from data sheets.
DEVICES = {"cpu": Device(2.8e-11, 2.6e-11, 4e-10, 3.5e-10, 3.3e-6, 8, 33)}
OTHER_DEVICE = Device(1e-13, 2e-13, 6e-12, 3e-12, 1e-5, 16, 16)


def device_of(x: Tensor) -> Device:
    """Return what work costs on the device of a tensor.

    Args:
        x: The tensor.
    """
    return DEVICES.get(x.device.type, OTHER_DEVICE)


def fastest(costs: Mapping[str, float]) -> str:
    """Return the name of the route that costs least.

    Args:
        costs: Seconds by name.
    """
    first, *others = costs
    for name in others:
        if costs[name] < costs[first]:  # compilers follow no `min` by symbolic sizes
            first = name
    return first


def matrix_costs(g: Tensor, x: Tensor) -> dict[str, float]:
    """Return the seconds of the routes "pairs" and "products" of a linear map.

    Args:
        g: Gradient of the output, `(n, p, o)`.
        x: Input, `(n, p, i)`.
    """
    device, (n, p, o), i = device_of(g), g.shape, x.shape[2]
    return {
        "pairs": _pairs(device, n, p, o, i),
        "products": _products(device, n, p, o, i, tile_elements(g)),
    }


def convolution_costs(x: Tensor, g: Tensor, weight_shape: Sequence[int], settings: Settings) -> dict[str, float]:
    """Return the seconds of `conv_routes.ROUTES`, of an ordinary convolution.

    Args:
        x: Input, `(n, c_in, *)`.
        g: Gradient of the output, `(n, c_out, *)`.
        weight_shape: Shape of the weight.
        settings: Of the convolution.
    """
    device, n, positions, groups = device_of(g), len(x), math.prod(g.shape[2:]), settings.groups
    i, kernel = weight_shape[1], weight_shape[2:]
    o, size = weight_shape[0] // groups, math.prod(kernel)
    values, budget = n * o * i * size, tile_elements(g)
    by_groups = groups * (n * positions * size * o * i * device.convolution + 2 * values * device.value)
    if (i % device.vector or o % device.vector) and i * o > 1:  # channels that fill no vector take a slower kernel
        by_groups += 6 * groups * n * positions * i * size * device.copy
    by_groups += (x.numel() + g.numel()) * device.copy + 5 * device.call * math.ceil(groups * values / budget)
    entries = n * positions * i * size  # of the unfolded input, which is copied in runs
    copies = entries * (1 / 4 + 8 / g.shape[-1]) * device.copy
    matmul = entries * o * (1 + device.vector / o) * (1 + device.vector / (i * size)) * device.product
    calls = n + 5 * math.ceil(entries / (UNFOLDED * budget)) + 4 * math.ceil(values / budget)
    products = matmul + copies + values * device.value + calls * device.call
    pairs = _pairs(device, n, positions, o, i * size) + copies
    return {"pairs": groups * pairs, "groups": by_groups, "products": groups * products}


def _products(device: Device, n: int, p: int, o: int, i: int, budget: int) -> float:
    """Return the seconds of `Moments.add_products`."""
    values = n * o * i
    calls = n + math.ceil(4 * values / budget)  # matrices of a batch cost a call each, too
    return _matmul(device, o, i) * n * p * device.product + values * device.value + calls * device.call


def _pairs(device: Device, n: int, p: int, o: int, i: int) -> float:
    """Return the seconds of `Moments.add_pairs`."""
    pairs = p * (p + 1) // 2
    products = n * (p + pairs) * _matmul(device, o, i) * device.product
    return products + 3 * n * pairs * (o + i) * device.copy + 30 * device.call


def _matmul(device: Device, o: int, i: int) -> float:
    """Return the multiply-adds of one position of a matmul, more of a narrow one, whose kernels are slower."""
    return o * i * (1 + device.vector / o) * (1 + (device.narrow / i) ** 2)
