"""Kronecker factors of the curvature of linear layers and convolutions: A of the input, G of the output's gradient.

With the input x~ of a layer (a patch, for a convolution; a 1 behind it for the bias) and the gradient
g of its output at position p of example n, the gradient of the matrix [weight | bias] is the sum over
p of g x~^T, and the mean over examples of its outer product is taken to be A (x) G with

    A = mean_n sum_p x~_np x~_np^T,    G = mean_n 1/P sum_p g_np g_np^T

Of a single position (P = 1) this takes A and G for independent; of several also the gradients at
different positions for uncorrelated, and the sums of products for products of sums.
Source: Martens & Grosse 2015 (arXiv 1503.05671), Eq. 1; Grosse & Martens 2016 (arXiv 1602.01407),
Theorem 1, of which these are Omega and Gamma; Eschenhagen et al. 2023 (arXiv 2311.00636), K-FAC-expand,
for the positions of a linear layer.

As for the squares, two leaves receive the sums over examples of A and G, in the units of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.curvature.accumulate import chunks, owned, tally
from bayeslayers.curvature.settings import Settings
from bayeslayers.dtypes import at_least_float32, full_precision


@dataclass
class Backward:
    """What backward passes compute from now on; read in the pass itself.

    Attributes:
        gradients: Those of weight and bias.
        factors: The Kronecker factors.
    """

    gradients: bool = True
    factors: bool = True


class KroneckerLeaves(NamedTuple):
    """The extra leaves of one module whose curvature is a Kronecker product.

    Attributes:
        input: Leaf `(i, i)` of A; `(i + 1, i + 1)` where the bias is to be in it.
        output: Leaf `(o, o)` of G.
        tally: Leaf that counts examples and uses.
        backward: What a pass fills.
    """

    input: Tensor
    output: Tensor
    tally: Tensor
    backward: Backward


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, leaves: KroneckerLeaves) -> Tensor:
    """Return `F.linear(x, weight, bias)` for `x` of `(n, *, i)`, and let the leaves receive A and G."""
    return _Linear.apply(x, weight, bias, *leaves)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, leaves: KroneckerLeaves, settings: Settings) -> Tensor:
    """Return the convolution of `x` `(n, c, *)`, one group and not transposed, and let the leaves receive A and G."""
    return _Convolution.apply(x, weight, bias, *leaves, *settings)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, input_leaf, output_leaf, tally_leaf, backward):
        ctx.save_for_backward(x, weight)
        ctx.passes, ctx.size = backward, len(input_leaf)
        return owned(F.linear(x, weight, bias))

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        factors = (None, None)
        with full_precision(x.device.type):
            if need_x:
                grad_x = g @ weight
            rows_x, rows_g = x.flatten(0, -2), g.flatten(0, -2)
            if need_weight and ctx.passes.gradients:
                grad_weight = rows_g.t() @ rows_x
            if need_bias and ctx.passes.gradients:
                grad_bias = rows_g.sum(0)
            if ctx.passes.factors:
                positions = x.shape[1:-1].numel()
                wide_g = at_least_float32(rows_g)
                output_factor = wide_g.t() @ wide_g / max(positions, 1)
                factors = (_input_factor(at_least_float32(rows_x).t(), ctx.size), output_factor)
        return grad_x, grad_weight, grad_bias, *factors, tally(len(x)), None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, input_leaf, output_leaf, tally_leaf, backward, *settings):
        ctx.save_for_backward(x, weight)
        ctx.passes, ctx.size, ctx.settings = backward, len(input_leaf), settings
        return owned(torch.convolution(x, weight, bias, *settings))

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        gradients = ctx.passes.gradients
        factors = (None, None)
        with full_precision(x.device.type):
            grads = torch.ops.aten.convolution_backward(
                g,
                x,
                weight,
                [len(weight)],
                *ctx.settings,
                [need_x, need_weight and gradients, need_bias and gradients],
            )
            if ctx.passes.factors:
                rows_g = at_least_float32(g).flatten(2).transpose(0, 1).flatten(1)  # (o, n * p)
                positions = max(g.shape[2:].numel(), 1)
                input_factor = _patch_factor(x, weight, ctx.size, *ctx.settings[:3])
                factors = (input_factor, rows_g @ rows_g.t() / positions)
        return *grads, *factors, tally(len(x)), *[None] * 7


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
        factor += _input_factor(patches.reshape(weight[0].numel(), -1), size)
    return factor


def _input_factor(columns: Tensor, size: int) -> Tensor:
    """Return the sum of the outer products of columns `(i, m)`, with a 1 behind each if `size` is i + 1."""
    product = columns @ columns.t()
    if len(columns) == size:
        return product
    total = columns.sum(1, keepdim=True)
    ones = total.new_full((1, 1), columns.shape[1])
    return torch.cat([torch.cat([product, total], 1), torch.cat([total.t(), ones], 1)])
