"""Curvature of y = x W^T + b, with any number of positions between example and feature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.curvature.accumulate import sum_of_squares
from bayeslayers.curvature.costs import fastest, matrix_costs
from bayeslayers.curvature.kronecker import column_products
from bayeslayers.curvature.layout import Layout
from bayeslayers.curvature.moments import Moments
from bayeslayers.curvature.rule import FactoredRule, Tensors, Use
from bayeslayers.dtypes import at_least_float32, full_precision

if TYPE_CHECKING:
    from torch import nn

Sums: TypeAlias = Callable[[Tensor, Tensor, bool], tuple[Tensor | None, Tensor]]


class _Linear(FactoredRule):
    """`F.linear` of an input `(n, *, i)`, or `(i,)` for a single example, with weight `(o, i)` and bias `(o,)`."""

    def forward(self, inputs: tuple[Tensor, ...], tensors: Any, settings: Any) -> Tensor:
        return F.linear(inputs[0], *tensors)

    def has_examples(self, inputs: tuple[Tensor, ...], tensors: Tensors) -> bool:
        return inputs[0].dim() > 1

    def example_dims(self, inputs: tuple[Tensor, ...], tensors: Tensors, settings: Any) -> Iterable[int]:
        return range(inputs[0].dim() - 1)

    def lifted_settings(self, settings: Any) -> Any:
        return settings

    def as_positions(self, use: Use, g: Tensor, layout: Layout, examples: int) -> tuple[Use, Tensor]:
        x, g = (layout.examples_first(each, examples).flatten(1, -2) for each in (use.inputs[0], g))
        return use._replace(inputs=(x,)), g

    def per_example(self, use: Use, g: Tensor) -> Tensors:
        x, g = (each.unsqueeze(1).flatten(1, -2) for each in (use.inputs[0], g))  # (n, p, features)
        return g.mT @ x, None if use.tensors[1] is None else g.sum(1)

    def squares(self, use: Use, g: Tensor) -> Sequence[Tensor | None]:
        if g.dim() == 2 and use.part is None:
            return _of_one_position(use, g)
        return self.squares_by(weight_gradients, use, g)

    def squares_by(self, sums: Sums, use: Use, g: Tensor) -> Sequence[Tensor | None]:
        """Return what `squares` does, where a function computes what `weight_gradients` does.

        Args:
            sums: The function.
            use: The use of the op.
            g: Gradient of the output.
        """
        (x,), weight, part = use.inputs, cast(Tensor, use.tensors[0]), use.part
        grad_x = grad_weight = grad_bias = squares_weight = squares_bias = None
        need_x, need_weight, need_bias, need_weight_squares, need_bias_squares = use.needs
        with full_precision(x.device.type):
            if need_x:
                grad_x = g @ weight
            if need_weight_squares and part is None:
                grad_weight, squares_weight = sums(g, x, need_weight)
            elif need_weight_squares and part is not None:
                factor, (part_g, part_x) = part.select(g, x)
                squares_weight = sums(part_g, part_x, False)[1] * factor
            if need_weight and grad_weight is None:
                grad_weight = g.flatten(0, -2).t() @ x.flatten(0, -2)
            if need_bias or need_bias_squares:
                per_example = g.flatten(1, -2).sum(1) if g.dim() > 2 else g
                grad_bias, squares_bias = per_example.sum(0), sum_of_squares(per_example)
        return grad_x, grad_weight, grad_bias, squares_weight, squares_bias

    def factor_sizes(self, layer: nn.Module) -> tuple[int, int] | None:
        weight = layer.get_parameter("weight")
        return weight.shape[1], len(weight)

    def factors(self, use: Use, g: Tensor, size: int) -> Sequence[Tensor | None]:
        (x,), weight = use.inputs, cast(Tensor, use.tensors[0])
        grad_x = grad_weight = grad_bias = input_factor = output_factor = None
        need_x, need_weight, need_bias, *need_factors = use.needs
        with full_precision(x.device.type):
            rows_x, rows_g = x.flatten(0, -2), g.flatten(0, -2)
            if need_x:
                grad_x = g @ weight
            if need_weight:
                grad_weight = rows_g.t() @ rows_x
            if need_bias:
                grad_bias = rows_g.sum(0)
            if any(need_factors):
                wide_g = at_least_float32(rows_g)
                output_factor = wide_g.t() @ wide_g / max(x.shape[1:-1].numel(), 1)
                input_factor = column_products(at_least_float32(rows_x).t(), size)
        return grad_x, grad_weight, grad_bias, input_factor, output_factor


LINEAR = _Linear()


def _of_one_position(use: Use, g: Tensor) -> Sequence[Tensor | None]:
    """Return what `_Linear.squares` does for `(n, i)` and all of the batch, where a square is taken once."""
    (x,), weight = use.inputs, cast(Tensor, use.tensors[0])
    need_x, need_weight, need_bias, need_weight_squares, need_bias_squares = use.needs
    with full_precision(x.device.type):
        g_squares = wide_x = g
        if need_weight_squares or need_bias_squares:  # x * x is what `square` computes, by way of `pow`
            g_squares, wide_x = at_least_float32(g), at_least_float32(x)
            g_squares = g_squares * g_squares
        return (
            torch.mm(g, weight) if need_x else None,
            torch.mm(g.t(), x) if need_weight else None,
            g.sum(0) if need_bias else None,
            torch.mm(g_squares.t(), wide_x * wide_x) if need_weight_squares else None,
            g_squares.sum(0) if need_bias_squares else None,
        )


def weight_gradients(g: Tensor, x: Tensor, with_grad: bool = True) -> tuple[Tensor | None, Tensor]:
    """Return sum_np g_npo x_npi and sum_n (sum_p g_npo x_npi)^2, both `(o, i)`.

    Args:
        g: Gradient of the output, `(n, *, o)`.
        x: Input, `(n, *, i)`, with the same dimensions between.
        with_grad: Whether the gradient is asked for.
    """
    dtype, wide_g, wide_x = g.dtype, at_least_float32(g), at_least_float32(x)
    if g.dim() == 2:
        return g.t() @ x if with_grad else None, wide_g.square().t() @ wide_x.square()
    g, x = wide_g.flatten(1, -2), wide_x.flatten(1, -2)  # (n, p, o), (n, p, i)
    sums = Moments.zeros(g, g.shape[2], x.shape[2], with_grad=with_grad)
    add = sums.add_pairs if fastest(matrix_costs(g, x)) == "pairs" else sums.add_products
    add(g, x)
    return None if sums.grad is None else sums.grad.to(dtype), sums.squares
