"""A linear layer whose weight is stored as `(in, out)`, as the `Conv1D` of transformers is, and its curvature rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bayeslayers.curvature import LINEAR, CurvatureRule, Use
from bayeslayers.curvature.layout import Layout
from bayeslayers.curvature.rule import Tensors
from bayeslayers.layers.base import BayesianLayer
from bayeslayers.layers.scope import OUTSIDE, scope_for


class _TransposedLinear(CurvatureRule):
    """y = x W + b of an input `(n, *, i)` with weight `(i, o)` and bias `(o,)`: what a linear layer has, transposed."""

    tensors = ("weight", "bias")

    def forward(self, inputs: tuple[Tensor, ...], tensors: Any, settings: Any) -> Tensor:
        return F.linear(inputs[0], tensors[0].t(), tensors[1])

    def has_examples(self, inputs: tuple[Tensor, ...], tensors: Tensors) -> bool:
        return inputs[0].dim() > 1

    def example_dims(self, inputs: tuple[Tensor, ...], tensors: Tensors, settings: Any) -> Iterable[int]:
        return LINEAR.example_dims(inputs, tensors, settings)

    def lifted_settings(self, settings: Any) -> Any:
        return settings

    def as_positions(self, use: Use, g: Tensor, layout: Layout, examples: int) -> tuple[Use, Tensor] | None:
        return LINEAR.as_positions(use, g, layout, examples)

    def per_example(self, use: Use, g: Tensor) -> Tensors:
        weight, bias = LINEAR.per_example(use, g)
        return None if weight is None else weight.mT, bias

    def squares(self, use: Use, g: Tensor) -> Sequence[Tensor | None]:
        weight: Any = use.tensors[0]
        x, grad, bias, squares, bias_squares = LINEAR.squares(use._replace(tensors=(weight.t(), use.tensors[1])), g)
        return x, grad if grad is None else grad.t(), bias, squares if squares is None else squares.t(), bias_squares


class BayesTransposedLinear(BayesianLayer):
    """What makes a linear layer with a weight `(in, out)` Bayesian: the class to derive from before the layer's own."""

    rule = _TransposedLinear()

    def forward(self, x: Tensor) -> Tensor:
        if scope_for(self) is OUTSIDE:
            return super().forward(x)  # bit for bit as before its conversion
        return self.compute(x)
