"""Bags of embeddings: the sum, the mean or the maximum of the rows of a table that an example names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bayeslayers import curvature
from bayeslayers.layers.base import BayesianLayer
from bayeslayers.layers.linear import refuse_rewriting
from bayeslayers.layers.scope import OUTSIDE, scope_for


class BayesEmbeddingBag(BayesianLayer, nn.EmbeddingBag):
    """`nn.EmbeddingBag` with a Gaussian posterior; each bag is an example.

    Raises:
        ValueError: With `max_norm`, `scale_grad_by_freq` or `sparse`, which rewrite the table or its
            gradient in ways that no posterior has a meaning for.
    """

    rule = curvature.EMBEDDING

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        refuse_rewriting(self, "BayesEmbeddingBag")

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        if scope_for(self) is OUTSIDE:
            return nn.EmbeddingBag.forward(self, input, offsets, per_sample_weights)
        if offsets is None:
            ids, counts = input, torch.ones_like(input, dtype=torch.bool)
        else:
            place, counts = _bags(offsets[: len(offsets) - bool(self.include_last_offset)], len(input))
            ids = input[place]
            per_sample_weights = None if per_sample_weights is None else per_sample_weights[place]
        if self.padding_idx is not None:
            counts = counts & (ids != self.padding_idx)
        rows = self.compute(ids, settings=self.padding_idx)  # (n, size of the largest bag, d)
        if per_sample_weights is not None:
            rows = rows * per_sample_weights[..., None]
        if self.mode == "max":
            largest = rows.masked_fill(~counts[..., None], -torch.inf).amax(1) if rows.shape[1] else rows.sum(1)
            return largest.masked_fill(~counts.any(1)[:, None], 0)
        total = (rows * counts[..., None]).sum(1)
        return total if self.mode == "sum" else total / counts.sum(1).clamp(min=1)[:, None]


def _bags(offsets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the places of each bag's entries in a flat input, `(bags, size)`, and which of them are its own.

    Args:
        offsets: Where each bag begins.
        count: Length of the input.
    """
    ends = torch.cat([offsets[1:], offsets.new_tensor([count])])
    size = int((ends - offsets).max()) if len(offsets) else 0
    place = offsets[:, None] + torch.arange(size, device=offsets.device)
    return place.clamp(max=max(count - 1, 0)), place < ends[:, None]
