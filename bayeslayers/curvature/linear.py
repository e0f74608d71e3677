"""Curvature of y = x W^T + b, with any number of positions between example and feature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.curvature import kronecker
from bayeslayers.curvature.accumulate import Leaves, chunks, owned, sum_of_squares, tally
from bayeslayers.curvature.kronecker import KroneckerLeaves
from bayeslayers.dtypes import at_least_float32, autocast_operand, full_precision

# Up to here the pairs of positions cost less than per-example gradients that are written and read again.
GRAM_POSITIONS = 4


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, leaves: Leaves | KroneckerLeaves) -> Tensor:
    """Return `F.linear(x, weight, bias)` and let the leaves receive squared per-example gradients or factors.

    Args:
        x: Input `(n, *, i)`, or `(i,)` for a single example.
        weight: `(o, i)`.
        bias: `(o,)` or None.
        leaves: Where the sums of squares go, or those of the factors.
    """
    x, weight = autocast_operand(x), autocast_operand(weight)
    bias = None if bias is None else autocast_operand(bias)
    if x.dim() == 1:
        return linear(x.unsqueeze(0), weight, bias, leaves).squeeze(0)
    if isinstance(leaves, KroneckerLeaves):
        return kronecker.linear(x, weight, bias, leaves)
    return _Linear.apply(x, weight, bias, *leaves)


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, weight_leaf, bias_leaf, tally_leaf, part):
        return owned(F.linear(x, weight, bias))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, *_, ctx.part = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad_output):
        (x, weight), part = ctx.saved_tensors, ctx.part
        grad_x = grad_weight = grad_bias = squares_weight = squares_bias = None
        need_x, need_weight, need_bias, need_weight_squares, *_ = ctx.needs_input_grad
        with full_precision(x.device.type):
            if need_x:
                grad_x = grad_output @ weight
            if need_weight:
                folded_x, folded_g = x.flatten(0, -2), grad_output.flatten(0, -2)
                grad_weight = folded_g.t() @ folded_x
            if need_weight_squares and part is None:
                squares_weight = outer_product_squares(grad_output, x)
            elif need_weight_squares:
                factor, (part_g, part_x) = part.select(grad_output, x)
                squares_weight = outer_product_squares(part_g, part_x) * factor
            if need_bias:
                per_example = grad_output.flatten(1, -2).sum(1) if grad_output.dim() > 2 else grad_output
                grad_bias, squares_bias = per_example.sum(0), sum_of_squares(per_example)
        return grad_x, grad_weight, grad_bias, squares_weight, squares_bias, tally(len(x)), None


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
