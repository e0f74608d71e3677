"""Curvature of convolutions in one, two and three dimensions, ordinary and transposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.curvature.accumulate import chunks, sum_of_squares
from bayeslayers.curvature.conv_routes import ROUTES, Route, in_groups
from bayeslayers.curvature.costs import convolution_costs, fastest
from bayeslayers.curvature.kronecker import column_products
from bayeslayers.curvature.moments import Moments
from bayeslayers.curvature.rule import FactoredRule, Use
from bayeslayers.curvature.settings import Settings
from bayeslayers.dtypes import at_least_float32, full_precision


class _Convolution(FactoredRule):
    """A convolution of an input `(n, c_in, *spatial)`, or `(c_in, *spatial)` for a single example.

    The weight is `(c_out, c_in / groups, *kernel)`, transposed `(c_in, c_out / groups, *kernel)`, the bias `(c_out,)`.
    The settings are `Settings`.
    """

    def forward(self, inputs: tuple[Tensor, ...], tensors: Any, settings: Settings) -> Tensor:
        weight, bias = tensors
        return torch.convolution(inputs[0], weight, bias, *settings)

    def has_examples(self, inputs: tuple[Tensor, ...], tensors: Any) -> bool:
        return inputs[0].dim() == tensors[0].dim()

    def squares(self, use: Use, g: Tensor) -> Sequence[Tensor | None]:
        return self.squares_by(by_fastest_route, use, g)

    def squares_by(self, route: Route, use: Use, g: Tensor) -> Sequence[Tensor | None]:
        """Return what `squares` does, where a route of any number of groups sums the weight's gradients.

        Args:
            route: The route.
            use: The use of the op.
            g: Gradient of the output.
        """
        (x,), weight, part, settings = use.inputs, cast(Tensor, use.tensors[0]), use.part, use.settings
        need_x, need_weight, need_bias, need_weight_squares, need_bias_squares = use.needs
        squares_weight = grad_bias = squares_bias = None
        with full_precision(x.device.type):
            # The per-example gradients of all examples give the gradient too, those of a part do not.
            plain_weight = need_weight and (part is not None or not need_weight_squares)
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                g, x, weight, None, *settings, [need_x, plain_weight, False]
            )
            if need_weight_squares and part is None:
                grad_weight, squares_weight = weight_gradients(x, g, weight, settings, need_weight, route)
            elif need_weight_squares and part is not None:
                factor, (part_x, part_g) = part.select(x, g)
                squares_weight = weight_gradients(part_x, part_g, weight, settings, False, route)[1] * factor
            if need_bias or need_bias_squares:
                per_example = g.flatten(2).sum(2)
                grad_bias, squares_bias = per_example.sum(0), sum_of_squares(per_example)
        return grad_x, grad_weight, grad_bias, squares_weight, squares_bias

    def factor_sizes(self, layer: Any) -> tuple[int, int] | None:
        """Return the sizes of the factors, None of a transposed convolution and of one in groups."""
        if layer.transposed or layer.groups != 1:
            return None
        return layer.weight.shape[1:].numel(), len(layer.weight)

    def factors(self, use: Use, g: Tensor, size: int) -> Sequence[Tensor | None]:
        (x,), weight, settings = use.inputs, cast(Tensor, use.tensors[0]), use.settings
        *need_gradients, need_input, need_output = use.needs
        input_factor = output_factor = None
        with full_precision(x.device.type):
            grads = torch.ops.aten.convolution_backward(g, x, weight, [len(weight)], *settings, need_gradients)
            if need_input or need_output:
                rows_g = at_least_float32(g).flatten(2).transpose(0, 1).flatten(1)  # (o, n * p)
                output_factor = rows_g @ rows_g.t() / max(g.shape[2:].numel(), 1)
                input_factor = _patch_factor(x, weight, size, *settings[:3])
        return *grads, input_factor, output_factor


CONVOLUTION = _Convolution()


def by_fastest_route(x: Tensor, g: Tensor, weight: Tensor, settings: Settings, with_grad: bool) -> Moments:
    """Sum by the route of torch ops that costs least; any number of groups.

    Args:
        x: Input.
        g: Gradient of the output.
        weight: The weight.
        settings: Of the convolution.
        with_grad: Whether to sum the gradients, not only their squares.
    """
    route = ROUTES[fastest(convolution_costs(x, g, weight.shape, settings))]
    return in_groups(route, x, g, weight, settings, with_grad)


def weight_gradients(
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    settings: Settings,
    with_grad: bool = True,
    route: Route = by_fastest_route,
) -> tuple[Tensor | None, Tensor]:
    """Return the weight's gradient and the sum over examples of its squared per-example gradients.

    The per-example gradients give both, so they replace the kernel of the weight's gradient. In
    a transposed convolution the input and the output's gradient change places.

    Args:
        x: Input, `(n, c_in, *)`.
        g: Gradient of the output.
        weight: The weight.
        settings: Of the convolution.
        with_grad: Whether the gradient is asked for.
        route: How they are summed.
    """
    if settings.transposed:
        x, g = g, x
        # Output padding takes from the padding on the far side, and more than that cuts positions off.
        sides = zip(settings.padding, settings.output_padding, strict=True)
        x = F.pad(x, [side for pad, extra in reversed([*sides]) for side in (pad, pad - extra)])
        settings = settings._replace(padding=(0,) * len(settings.padding))
    sums = route(x, g, weight, settings, with_grad)
    return None if sums.grad is None else sums.grad.to(weight.dtype), sums.squares


def _patch_factor(
    x: Tensor,
    weight: Tensor,
    size: int,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Return the sum over examples and positions of the outer products of patches, `(size, size)`."""
    x = F.pad(x, [side for pad in reversed(padding) for side in (pad, pad)])
    kernel = weight.shape[2:]
    positions = [
        (length - d * (k - 1) - 1) // s + 1
        for length, k, d, s in zip(x.shape[2:], kernel, dilation, stride, strict=True)
    ]
    factor = at_least_float32(x).new_zeros(size, size)
    for chunk in chunks(len(x), weight[0].numel() * torch.Size(positions).numel(), at_least_float32(x)):
        part = at_least_float32(x[chunk]).transpose(0, 1).contiguous()  # (c, n, *)
        channel, example, *steps = part.stride()
        # Each patch element as a step of its own through the memory: (c, *kernel, n, *positions).
        patches = part.as_strided(
            (len(part), *kernel, part.shape[1], *positions),
            (
                channel,
                *(step * d for step, d in zip(steps, dilation, strict=True)),
                example,
                *(step * s for step, s in zip(steps, stride, strict=True)),
            ),
        )
        factor += column_products(patches.reshape(weight[0].numel(), -1), size)
    return factor
