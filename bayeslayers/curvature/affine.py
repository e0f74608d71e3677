"""Curvature of the scale and shift of a normalisation layer: y = x_hat * scale + shift.

The normalised input x_hat is held fixed. Under batch statistics it depends on the other examples
of the batch, so a per-example gradient in the strict sense does not exist; this is the convention
of the paper (Osawa et al. 2019). The per-example gradient sums over positions *before* it is squared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayeslayers.curvature.accumulate import Leaves, owned, sum_of_squares, tally


def affine(x_hat: Tensor, scale: Tensor, shift: Tensor | None, leaves: Leaves, positions: tuple[int, ...]) -> Tensor:
    """Return `x_hat * scale + shift` and let the leaves receive squared per-example gradients.

    Args:
        x_hat: Normalised input `(n, ...)`.
        scale: Scale, whose shape is that of one example of `x_hat` without its positions.
        shift: Shift, the shape of `scale`, or None.
        leaves: Where the sums of squares go.
        positions: The dimensions of `x_hat`, beside dimension 0, over which the parameters are shared.
    """
    return _Affine.apply(x_hat, scale, shift, *leaves, positions)


class _Affine(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x_hat, scale, shift, scale_leaf, shift_leaf, tally_leaf, part, positions):
        y = x_hat * _broadcast(scale, x_hat, positions)
        return owned(y if shift is None else y + _broadcast(shift, x_hat, positions))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x_hat, scale, *_, ctx.positions = inputs
        ctx.save_for_backward(x_hat, scale)

    @staticmethod
    def backward(ctx, g):
        x_hat, scale = ctx.saved_tensors
        need_x, need_scale, need_shift, *_ = ctx.needs_input_grad
        grad_x = grad_scale = grad_shift = squares_scale = squares_shift = None
        if need_x:
            grad_x = g * _broadcast(scale, g, ctx.positions)
        if need_scale:
            per_example = _sum_positions(g * x_hat, ctx.positions)
            grad_scale, squares_scale = per_example.sum(0), sum_of_squares(per_example)
        if need_shift:
            per_example = _sum_positions(g, ctx.positions)
            grad_shift, squares_shift = per_example.sum(0), sum_of_squares(per_example)
        return grad_x, grad_scale, grad_shift, squares_scale, squares_shift, tally(len(g)), None, None


def _broadcast(parameter: Tensor, x: Tensor, positions: tuple[int, ...]) -> Tensor:
    """Give `parameter` a size-1 dimension for each position of `x`."""
    return parameter.reshape([1 if d in positions else x.shape[d] for d in range(1, x.dim())])


def _sum_positions(x: Tensor, positions: tuple[int, ...]) -> Tensor:
    return x.sum(positions) if positions else x
