"""Curvature of an embedding table: a token that occurs twice in an example adds up before it is squared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.curvature.layout import Layout
from bayeslayers.curvature.rule import CurvatureRule, Tensors, Use
from bayeslayers.dtypes import at_least_float32


class _Embedding(CurvatureRule):
    """`F.embedding` of integer ids `(n, *)`, or a single id, with the table `(v, d)`.

    The setting is the id whose row gets neither gradient nor curvature, or None.
    """

    tensors = ("weight",)
    casts = False

    def forward(self, inputs: tuple[Tensor, ...], tensors: Any, settings: int | None) -> Tensor:
        return F.embedding(inputs[0], tensors[0], settings)

    def has_examples(self, inputs: tuple[Tensor, ...], tensors: Tensors) -> bool:
        return inputs[0].dim() > 0

    def example_dims(self, inputs: tuple[Tensor, ...], tensors: Tensors, settings: int | None) -> Iterable[int]:
        return range(inputs[0].dim())

    def lifted_settings(self, settings: Any) -> Any:
        return settings

    def as_positions(self, use: Use, g: Tensor, layout: Layout, examples: int) -> tuple[Use, Tensor]:
        ids = layout.examples_first(use.inputs[0], examples).flatten(1)
        return use._replace(inputs=(ids,)), layout.examples_first(g, examples).flatten(1, -2)

    def per_example(self, use: Use, g: Tensor) -> Tensors:
        (ids,), (weight,), padding = use.inputs, cast(Any, use.tensors), use.settings
        examples, (rows, features) = len(ids), weight.shape
        keys = torch.arange(examples, device=ids.device)[:, None] * rows + ids.reshape(examples, -1)
        added = g.new_zeros(examples * rows, features).index_add(0, keys.flatten(), g.reshape(-1, features))
        added = added.view(examples, rows, features)
        if padding is not None:
            added[:, padding] = 0
        return (added,)

    def squares(self, use: Use, g: Tensor) -> Sequence[Tensor | None]:
        (ids,), (weight,), padding = use.inputs, cast(Any, use.tensors), use.settings
        examples, (rows, features) = len(ids), weight.shape
        g = g.reshape(-1, features)
        # One key per (example, id): equal keys add up, then each sum is squared.
        example = torch.arange(examples, device=ids.device).repeat_interleave(ids.shape[1:].numel())
        keys, inverse = torch.unique(example * rows + ids.reshape(-1), return_inverse=True)
        per_example = g.new_zeros(len(keys), features).index_add(0, inverse, g)
        row = keys % rows
        if padding is not None:
            per_example = per_example * (row != padding)[:, None]
        grad = g.new_zeros(rows, features).index_add(0, row, per_example)
        squares = at_least_float32(per_example).square()
        return None, grad, squares.new_zeros(rows, features).index_add(0, row, squares)


EMBEDDING = _Embedding()
