"""Ways to sum the per-example gradients of a convolution's weight and their squares; `costs` chooses among them.

All give the same sums. Which is the fastest depends on the channels, the positions and the device. Each takes the
input `(n, c_in, *)` and the gradient of the output `(n, c_out, *)` of an ordinary convolution, and its weight, of which
only the shape is read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.curvature.accumulate import chunks
from bayeslayers.curvature.moments import Moments
from bayeslayers.curvature.settings import Settings
from bayeslayers.dtypes import at_least_float32

Route: TypeAlias = Callable[[Tensor, Tensor, Tensor, Settings, bool], Moments]

# Unfolded inputs are in memory in chunks of so many budgets: their examples are what a matmul sums over.
_ROWS, _PAIRS = 4, 16


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


def by_rows(x: Tensor, g: Tensor, weight: Tensor, settings: Settings, with_grad: bool) -> Moments:
    """Sum matmuls over the positions, one for each offset of the kernel in the first spatial dimension.

    Channels come last, and the input is unfolded in the other spatial dimensions alone: then the rows that an offset
    in the first one meets are a run of the unfolded memory, of which no copy is made.

    Args:
        x: Input.
        g: Gradient of the output.
        weight: The weight.
        settings: Of the convolution.
        with_grad: Whether to sum the gradients, not only their squares.
    """
    x, g = at_least_float32(x), at_least_float32(g)
    c_out, c_in, height, *others = weight.shape
    stride, dilation, columns = settings.stride[0], settings.dilation[0], math.prod(g.shape[3:])
    found = Moments.zeros(g, height, c_out, math.prod(others) * c_in, with_grad=with_grad)
    for chunk in chunks(len(x), math.prod(others) * x[0].numel() // _ROWS, x):
        g_rows = g[chunk].flatten(2).mT.contiguous()  # (n, p, o)
        unfolded = _unfolded_columns(x[chunk], g, others, settings)  # (n, rows, columns, i)
        for phase in range(min(stride, height)):
            rows = unfolded[:, phase::stride].flatten(1, 2)
            for offset in range(height):
                first, rest = divmod(offset * dilation, stride)
                if rest == phase:
                    run = slice(first * columns, first * columns + g_rows.shape[1])
                    found.part(offset).add_products(g_rows, rows[:, run])
    return found.map(lambda total: total.view(height, c_out, *others, c_in).movedim((0, -1), (2, 1)).contiguous())


def _unfolded_columns(x: Tensor, g: Tensor, kernel: Sequence[int], settings: Settings) -> Tensor:
    """Return the input with all offsets of the kernel but those of the first dimension, `(n, rows, p, kernel * i)`."""
    padded = F.pad(x.movedim(1, -1), [0, 0, *(side for pad in reversed(settings.padding) for side in (pad, pad))])
    windows = [padded[(slice(None), slice(None), *window)] for window in _windows(g, kernel, settings, first=1)]
    together = windows[0] if len(windows) == 1 else torch.stack(windows, -2)
    return together.reshape(*padded.shape[:2], math.prod(g.shape[3:]), -1)


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
    padded = F.pad(x, [side for pad in reversed(settings.padding) for side in (pad, pad)])
    for chunk in chunks(len(x), positions * (positions + 1) // 2 * inputs // _PAIRS, x):
        own = padded[chunk]
        windows = [own[(..., *window)].flatten(2) for window in _windows(g, weight.shape[2:], settings)]
        sums.add_pairs(g[chunk].flatten(2).mT, torch.stack(windows, 2).flatten(1, 2).mT)  # (n, p, i * kernel)
    return sums.map(lambda total: total.view_as(weight))


def _windows(g: Tensor, kernel: Sequence[int], settings: Settings, first: int = 0) -> Iterator[tuple[slice, ...]]:
    """Yield what each offset of the kernel meets of the padded input, from one spatial dimension on."""
    numbers = [settings.dilation[first:], settings.stride[first:], g.shape[2 + first :]]
    for offset in itertools.product(*map(range, kernel)):
        yield tuple(
            [
                slice(o * dilation, o * dilation + stride * (size - 1) + 1, stride)
                for o, dilation, stride, size in zip(offset, *numbers, strict=True)
            ]
        )


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


ROUTES: Mapping[str, Route] = {"pairs": by_pairs, "groups": by_groups, "rows": by_rows}
