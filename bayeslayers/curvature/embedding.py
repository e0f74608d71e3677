"""Curvature of an embedding table: a token that occurs twice in an example adds up before it is squared."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.curvature.accumulate import Leaves, owned, tally
from bayeslayers.dtypes import at_least_float32


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None, leaves: Leaves) -> Tensor:
    """Return `F.embedding(ids, weight)` and let the leaf receive squared per-example gradients.

    Args:
        ids: Integer ids `(n, *)`, or a single id.
        weight: Table `(v, d)`.
        padding_idx: Id whose row gets neither gradient nor curvature, or None.
        leaves: Where the sum of squares goes.
    """
    if ids.dim() == 0:
        return embedding(ids.unsqueeze(0), weight, padding_idx, leaves).squeeze(0)
    return _Embedding.apply(ids, weight, leaves.weight, leaves.tally, padding_idx)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ids, weight, weight_leaf, tally_leaf, padding_idx):
        return owned(F.embedding(ids, weight))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ids, weight, _, _, ctx.padding_idx = inputs
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape

    @staticmethod
    def backward(ctx, g):
        (ids,) = ctx.saved_tensors
        examples, (rows, features) = len(ids), ctx.shape
        g = g.reshape(-1, features)
        # One key per (example, id): equal keys add up, then each sum is squared.
        example = torch.arange(examples, device=ids.device).repeat_interleave(ids.shape[1:].numel())
        keys, inverse = torch.unique(example * rows + ids.reshape(-1), return_inverse=True)
        per_example = g.new_zeros(len(keys), features).index_add(0, inverse, g)
        row = keys % rows
        if ctx.padding_idx is not None:
            per_example = per_example * (row != ctx.padding_idx)[:, None]
        grad = g.new_zeros(rows, features).index_add(0, row, per_example)
        squares = (
            at_least_float32(g).new_zeros(rows, features).index_add(0, row, at_least_float32(per_example).square())
        )
        return None, grad, squares, tally(examples), None
