"""Curvature of a linear map whose weight is some of the rows of a larger one, as attention packs its projections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor

from bayeslayers.curvature.layout import Layout
from bayeslayers.curvature.linear import LINEAR
from bayeslayers.curvature.rule import CurvatureRule, Tensors, Use


class Rows(NamedTuple):
    """Which rows of the tensors an op takes.

    Attributes:
        weight: The first one in the weight.
        bias: The first one in the bias.
        count: How many there are.
    """

    weight: int
    bias: int
    count: int


class _LinearRows(CurvatureRule):
    """`F.linear` of an input `(n, *, i)` by rows of weight `(o, i)` and bias `(o,)`; the settings are `Rows`.

    The gradient of all other rows is 0, so that ops with other rows of the same tensors add up, squares as well.
    """

    tensors = ("weight", "bias")

    def forward(self, inputs: tuple[Tensor, ...], tensors: Tensors, settings: Rows) -> Tensor:
        return F.linear(inputs[0], *cast(Any, _rows(tensors, settings)))

    def has_examples(self, inputs: tuple[Tensor, ...], tensors: Tensors) -> bool:
        return LINEAR.has_examples(inputs, tensors)

    def example_dims(self, inputs: tuple[Tensor, ...], tensors: Tensors, settings: Rows) -> Iterable[int]:
        return LINEAR.example_dims(inputs, tensors, settings)

    def lifted_settings(self, settings: Rows) -> Rows:
        return settings

    def as_positions(self, use: Use, g: Tensor, layout: Layout, examples: int) -> tuple[Use, Tensor]:
        return LINEAR.as_positions(use, g, layout, examples)

    def per_example(self, use: Use, g: Tensor) -> Tensors:
        weight, bias = LINEAR.per_example(use, g)
        (full, full_bias), rows = use.tensors, use.settings
        return _padded(weight, rows.weight, full, 1), _padded(bias, rows.bias, full_bias, 0)

    def squares(self, use: Use, g: Tensor) -> Sequence[Tensor | None]:
        (full, full_bias), rows = use.tensors, use.settings
        of_rows = use._replace(tensors=_rows(use.tensors, rows))
        x, weight, bias, squares, bias_squares = LINEAR.kernel_for(g.device.type)(of_rows, g)
        return (
            x,
            _padded(weight, rows.weight, full, 1),
            _padded(bias, rows.bias, full_bias, 0),
            _padded(squares, rows.weight, full, 1),
            _padded(bias_squares, rows.bias, full_bias, 0),
        )


LINEAR_ROWS = _LinearRows()


def _rows(tensors: Tensors, rows: Rows) -> Tensors:
    weight, bias = cast(Any, tensors)
    return (
        weight[rows.weight : rows.weight + rows.count],
        None if bias is None else bias[rows.bias : rows.bias + rows.count],
    )


def _padded(part: Tensor | None, first: int, full: Tensor | None, behind: int) -> Tensor | None:
    """Return rows of a tensor with zeros in place of the others; `behind` dimensions follow that of the rows."""
    if part is None or full is None:
        return None
    count = part.shape[-1 - behind]
    return F.pad(part, [0, 0] * behind + [first, len(full) - first - count])
