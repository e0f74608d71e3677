"""Ways to sum the per-example gradients of a convolution's weight and their squares; `costs` chooses among them.

All give the same sums. Which is the fastest depends on the channels, the positions and the device. Each takes the
input `(n, c_in, *)` and the gradient of the output `(n, c_out, *)` of an ordinary convolution, and its weight, of which
only the shape is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.curvature.accumulate import chunks
from bayeslayers.curvature.moments import Moments
from bayeslayers.curvature.settings import Settings
from bayeslayers.dtypes import at_least_float32

Route: TypeAlias = Callable[[Tensor, Tensor, Tensor, Settings, bool], Moments]

# Unfolded inputs are in memory in chunks of so many budgets. They are written once and read once: a larger chunk costs
# fewer calls. For pairs, the examples of a chunk are what a matmul sums over.
UNFOLDED, _PAIRS = 4, 16


def by_groups(x: Tensor, g: Tensor, weight: Tensor, settings: Settings, with_grad: bool) -> Moments:
    """Sum the per-example gradients of one convolution whose groups are the examples; any number of groups.

    Args:
        x: Input.
        g: Gradient of the output.
        weight: The weight.
        settings: Of the convolution.
        with_grad: Whether to sum the gradients, not only their squares.
    """
    sums = Moments.zeros(g, *weight.shape, with_grad=with_grad)
    for chunk in chunks(len(x), weight.numel(), x):
        sums.add(per_example_weight_gradients(x[chunk], g[chunk], weight, settings))
    return sums


def per_example_weight_gradients(x: Tensor, g: Tensor, weight: Tensor, settings: Settings) -> Tensor:
    """Return the per-example gradients of the weight of an ordinary convolution, `(n, *weight.shape)`.

    Args:
        x: Input, `(n, c_in, *)`.
        g: Gradient of the output.
        weight: Of which only the shape is read.
        settings: Of the convolution.
    """
    n = len(x)
    return torch.ops.aten.convolution_backward(
        g.reshape(1, -1, *g.shape[2:]),
        x.reshape(1, -1, *x.shape[2:]),
        x.new_empty(n * weight.shape[0], *weight.shape[1:]),
        None,
        settings.stride,
        settings.padding,
        settings.dilation,
        False,
        [0] * len(settings.stride),
        n * settings.groups,
        [False, True, False],
    )[1].unflatten(0, (n, -1))


def by_products(x: Tensor, g: Tensor, weight: Tensor, settings: Settings, with_grad: bool) -> Moments:
    """Sum the products over positions of the unfolded input and the gradient of the output.

    Args:
        x: Input.
        g: Gradient of the output.
        weight: The weight.
        settings: Of the convolution.
        with_grad: Whether to sum the gradients, not only their squares.
    """
    x, g = at_least_float32(x), at_least_float32(g)
    sums = Moments.zeros(g, weight[0].numel(), len(weight), with_grad=with_grad)
    for chunk in chunks(len(x), math.prod(g.shape[2:]) * weight[0].numel() // UNFOLDED, x):
        sums.add_products(_unfolded(x[chunk], weight, settings).mT, g[chunk].flatten(2).mT)
    return sums.map(lambda total: total.t().reshape(weight.shape))


def by_pairs(x: Tensor, g: Tensor, weight: Tensor, settings: Settings, with_grad: bool) -> Moments:
    """Sum without per-example gradients, as a linear layer on the unfolded input does for pairs of positions.

    Args:
        x: Input.
        g: Gradient of the output.
        weight: The weight.
        settings: Of the convolution.
        with_grad: Whether to sum the gradients, not only their squares.
    """
    x, g = at_least_float32(x), at_least_float32(g)
    positions, inputs = math.prod(g.shape[2:]), weight[0].numel()
    sums = Moments.zeros(g, len(weight), inputs, with_grad=with_grad)
    for chunk in chunks(len(x), positions * (positions + 1) // 2 * inputs // _PAIRS, x):
        sums.add_pairs(g[chunk].flatten(2).mT, _unfolded(x[chunk], weight, settings).mT)
    return sums.map(lambda total: total.view_as(weight))


def _unfolded(x: Tensor, weight: Tensor, settings: Settings) -> Tensor:
    """Return what each entry of the kernel meets of the input, `(n, i * kernel, p)`."""
    x = F.pad(x, [side for pad in reversed(settings.padding) for side in (pad, pad)])
    kernel, count = weight.shape[2:], weight.dim() - 2
    for dim, (size, stride, dilation) in enumerate(zip(kernel, settings.stride, settings.dilation, strict=True), 2):
        x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    spatial = tuple(range(2, 2 + count))
    return x.movedim(spatial, tuple(range(2 + count, 2 + 2 * count))).flatten(2 + count).flatten(1, -2)


def in_groups(route: Route, x: Tensor, g: Tensor, weight: Tensor, settings: Settings, with_grad: bool) -> Moments:
    """Sum over the examples of a convolution in any number of groups, one group after the other.

    Args:
        route: Of an ordinary convolution.
        x: Input.
        g: Gradient of the output.
        weight: The weight.
        settings: Of the convolution.
        with_grad: Whether to sum the gradients, not only their squares.
    """
    count, own = settings.groups, settings._replace(groups=1)
    if route is by_groups or count == 1:
        return route(x, g, weight, settings, with_grad)
    groups = zip(x.chunk(count, 1), g.chunk(count, 1), weight.chunk(count), strict=True)
    return Moments.joined([route(*group, own, with_grad) for group in groups])


ROUTES: Mapping[str, Route] = {"pairs": by_pairs, "groups": by_groups, "products": by_products}
