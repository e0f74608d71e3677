"""Convolutions that standardise their weight before they use it, as timm's `StdConv2d` and `ScaledStdConv2d`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.curvature import CurvatureRule, Use
from bayeslayers.curvature.conv_routes import per_example_weight_gradients
from bayeslayers.curvature.rule import Tensors
from bayeslayers.curvature.settings import Settings
from bayeslayers.layers.base import BayesianLayer
from bayeslayers.layers.scope import OUTSIDE, scope_for


class _Standardisation(NamedTuple):
    """What a standardised convolution is, beside its parameters.

    Attributes:
        convolution: As for `curvature.CONVOLUTION`.
        scale: Factor of the standardised weight.
        eps: Added to the variance of a unit's weights.
    """

    convolution: Settings
    scale: float
    eps: float


class _StandardisedConvolution(CurvatureRule):
    """A convolution with `scale * gain * (weight - mean) / sqrt(variance + eps)`, moments over each unit's weights.

    The per-example gradients are those of the convolution's weight, each taken back through the standardisation.
    """

    tensors = ("weight", "bias")

    def forward(self, inputs: tuple[Tensor, ...], tensors: Any, settings: _Standardisation) -> Tensor:
        weight, bias, *gain = tensors
        return torch.convolution(
            inputs[0], _standardised(weight, *gain, settings=settings), bias, *settings.convolution
        )

    def has_examples(self, inputs: tuple[Tensor, ...], tensors: Any) -> bool:
        return inputs[0].dim() == tensors[0].dim()

    def per_example(self, use: Use, g: Tensor) -> Tensors:
        weight, bias, *gain = cast(Any, use.tensors)
        standardise: Any = partial(_standardised, settings=use.settings)
        standardised, pull_back = cast(Any, torch.func.vjp(standardise, weight, *gain))
        rows = per_example_weight_gradients(use.inputs[0], g, standardised, use.settings.convolution)
        of_weight, *of_gain = torch.func.vmap(pull_back)(rows)
        return of_weight, None if bias is None else g.flatten(2).sum(2), *of_gain


class _ScaledConvolution(_StandardisedConvolution):
    """Such a convolution with a gain for each unit."""

    tensors = ("weight", "bias", "gain")


class BayesStandardisedConv2d(BayesianLayer):
    """What makes a weight-standardised convolution Bayesian: the class to derive from before the layer's own."""

    rule = _StandardisedConvolution()

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        if scope_for(self) is OUTSIDE:
            return super().forward(x)  # bit for bit as before its conversion
        if getattr(own, "same_pad", False):
            x = _padded_to_same(x, own.kernel_size, own.stride, own.dilation)
        convolution = Settings(own.stride, own.padding, own.dilation, False, (0, 0), own.groups)
        return self.compute(x, settings=_Standardisation(convolution, getattr(own, "scale", 1.0), own.eps))


class BayesScaledConv2d(BayesStandardisedConv2d):
    """What makes one with a gain for each unit Bayesian."""

    rule = _ScaledConvolution()
    prior_means: ClassVar[Mapping[str, float]] = {"gain": 1.0}


def _standardised(weight: Tensor, gain: Tensor | None = None, *, settings: _Standardisation) -> Tensor:
    rows = weight.flatten(1)
    variance, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    rows = (rows - mean) * (variance + settings.eps).rsqrt() * settings.scale
    return (rows if gain is None else rows * gain.view(-1, 1)).view_as(weight)


def _padded_to_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """Return an input padded so that a stride s divides its size by s, rounded up; more behind than in front."""
    sides: list[int] = []
    for size, k, s, d in zip(
        reversed(x.shape[2:]), reversed(kernel), reversed(stride), reversed(dilation), strict=True
    ):
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides)
