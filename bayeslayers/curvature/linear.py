"""Curvature of y = x W^T + b, with any number of positions between example and feature."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.curvature.accumulate import chunks, sum_of_squares
from bayeslayers.curvature.kronecker import column_products
from bayeslayers.curvature.layout import Layout
from bayeslayers.curvature.rule import FactoredRule, Tensors, Use
from bayeslayers.dtypes import at_least_float32, full_precision

if TYPE_CHECKING:
    from torch import nn

# Up to here the pairs of positions cost less than per-example gradients that are written and read again.
GRAM_POSITIONS = 4


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
        (x,), weight, part = use.inputs, cast(Tensor, use.tensors[0]), use.part
        grad_x = grad_weight = grad_bias = squares_weight = squares_bias = None
        need_x, need_weight, need_bias, need_weight_squares, need_bias_squares = use.needs
        with full_precision(x.device.type):
            if need_x:
                grad_x = g @ weight
            if need_weight:
                grad_weight = g.flatten(0, -2).t() @ x.flatten(0, -2)
            if need_weight_squares and part is None:
                squares_weight = outer_product_squares(g, x)
            elif need_weight_squares and part is not None:
                factor, (part_g, part_x) = part.select(g, x)
                squares_weight = outer_product_squares(part_g, part_x) * factor
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


def outer_product_squares(g: Tensor, x: Tensor) -> Tensor:
    """Return sum_n (sum_p g_npo x_npi)^2, shape (o, i).

    One position needs one matmul of squares, a few positions one matmul over their pairs (the
    square written out), and many positions one matmul per example, in chunks.

    Args:
        g: Gradient of the output, `(n, *, o)`.
        x: Input, `(n, *, i)`, with the same dimensions between.
    """
    g, x = at_least_float32(g), at_least_float32(x)
    if g.dim() == 2:
        return g.square().t() @ x.square()
    g, x = g.flatten(1, -2), x.flatten(1, -2)  # (n, p, o), (n, p, i)
    if g.shape[1] <= GRAM_POSITIONS:
        return (_pairs(g).t() @ _pairs(x, off_diagonal=2.0)).clamp(min=0)  # rounding may end below
    squares = g.new_zeros(g.shape[2], x.shape[2])
    for chunk in chunks(len(g), squares.numel(), g):
        squares += sum_of_squares(g[chunk].transpose(1, 2) @ x[chunk])
    return squares


def _pairs(x: Tensor, off_diagonal: float = 1.0) -> Tensor:
    """Return x_np x_nq for each pair p <= q of positions, `(n * pairs, features)`."""
    p, q = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
    weight = torch.where(p == q, 1.0, off_diagonal).to(x.dtype)
    return (x[:, p] * x[:, q] * weight[:, None]).flatten(0, 1)
