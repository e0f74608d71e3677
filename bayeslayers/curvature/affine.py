"""Curvature of the scale and shift of a normalisation layer: y = x_hat * scale + shift.

The normalised input x_hat is held fixed. Under batch statistics it depends on the other examples
of the batch, so a per-example gradient in the strict sense does not exist; this is the convention
of the paper (Osawa et al. 2019). The per-example gradient sums over positions *before* it is squared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import Tensor

from bayeslayers.curvature.accumulate import sum_of_squares
from bayeslayers.curvature.layout import Layout
from bayeslayers.curvature.rule import CurvatureRule, Tensors, Use


class _Affine(CurvatureRule):
    """`x_hat * scale + shift` of the normalised input `x_hat` `(n, ...)`.

    The settings are the dimensions of `x_hat`, beside dimension 0, over which the parameters are shared. Scale and
    shift have the shape of one example of `x_hat` without these; the shift may be absent.
    """

    tensors = ("weight", "bias")
    casts = False

    def forward(self, inputs: tuple[Tensor, ...], tensors: Any, settings: tuple[int, ...]) -> Tensor:
        (x_hat,), (scale, shift) = inputs, tensors
        y = x_hat * _broadcast(scale, x_hat, settings)
        return y if shift is None else y + _broadcast(shift, x_hat, settings)

    def example_dims(self, inputs: tuple[Tensor, ...], tensors: Tensors, settings: tuple[int, ...]) -> Iterable[int]:
        return (0, *settings)

    def lifted_settings(self, settings: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *[d + 1 for d in settings])

    def as_positions(self, use: Use, g: Tensor, layout: Layout, examples: int) -> tuple[Use, Tensor]:
        features = [d + 1 for d in range(1, g.dim()) if d not in use.settings]  # of the parameters, once unfolded
        positions = [d for d in range(1, g.dim() + 1) if d not in features]

        def of(x: Tensor) -> Tensor:
            x = layout.examples_first(x, examples).permute(0, *positions, *features)
            return x.flatten(1, len(positions))

        return use._replace(inputs=(of(use.inputs[0]),), settings=(1,)), of(g)

    def per_example(self, use: Use, g: Tensor) -> Tensors:
        scale = _sum_positions(g * use.inputs[0], use.settings)
        return scale, None if use.tensors[1] is None else _sum_positions(g, use.settings)

    def squares(self, use: Use, g: Tensor) -> Sequence[Tensor | None]:
        (x_hat,), (scale, _), positions = use.inputs, cast(Any, use.tensors), use.settings
        need_x, need_scale, need_shift, need_scale_squares, need_shift_squares = use.needs
        grad_x = grad_scale = grad_shift = squares_scale = squares_shift = None
        if need_x:
            grad_x = g * _broadcast(scale, g, positions)
        if need_scale or need_scale_squares:
            per_example = _sum_positions(g * x_hat, positions)
            grad_scale, squares_scale = per_example.sum(0), sum_of_squares(per_example)
        if need_shift or need_shift_squares:
            per_example = _sum_positions(g, positions)
            grad_shift, squares_shift = per_example.sum(0), sum_of_squares(per_example)
        return grad_x, grad_scale, grad_shift, squares_scale, squares_shift


AFFINE = _Affine()


def _broadcast(parameter: Tensor, x: Tensor, positions: tuple[int, ...]) -> Tensor:
    """Give `parameter` a size-1 dimension for each position of `x`."""
    return parameter.reshape([1 if d in positions else x.shape[d] for d in range(1, x.dim())])


def _sum_positions(x: Tensor, positions: tuple[int, ...]) -> Tensor:
    return x.sum(positions) if positions else x
