"""The bilinear layer and its curvature rule: a worked example of a layer in one file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bayeslayers.curvature import CurvatureRule, Use
from bayeslayers.curvature.rule import Tensors
from bayeslayers.layers.base import BayesianLayer
from bayeslayers.layers.scope import OUTSIDE, scope_for


class _Bilinear(CurvatureRule):
    """y_o = sum_ij x1_i weight_oij x2_j + bias_o of inputs `(n, *, in1)` and `(n, *, in2)`.

    Positions between example and feature share the weight, so an example's gradient is their sum.
    """

    tensors = ("weight", "bias")

    def forward(self, inputs: tuple[Tensor, ...], tensors: Any, settings: Any) -> Tensor:
        y = torch.einsum("...i,oij,...j->...o", inputs[0], tensors[0], inputs[1])  # torch's own op has no vmap rule
        return y if tensors[1] is None else y + tensors[1]

    def has_examples(self, inputs: tuple[Tensor, ...], tensors: Tensors) -> bool:
        return inputs[0].dim() > 1

    def per_example(self, use: Use, g: Tensor) -> Tensors:
        x1, x2, g = (x.unsqueeze(1).flatten(1, -2) for x in (*use.inputs, g))  # (n, p, features)
        bias = None if use.tensors[1] is None else g.sum(1)
        return torch.einsum("npo,npi,npj->noij", g, x1, x2), bias


class BayesBilinear(BayesianLayer, nn.Bilinear):
    """`nn.Bilinear` with a Gaussian posterior; dimension 0 of both inputs runs over examples."""

    rule = _Bilinear()

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        if scope_for(self) is OUTSIDE:
            return nn.Bilinear.forward(self, input1, input2)  # bit for bit as before its conversion
        return self.compute(input1, input2)
