"""The squares of linear layers and convolutions on a GPU, by Triton kernels where they can run.

What a kernel does not take goes the way of the rule's own torch ops: float64, linear maps of few positions, depthwise
convolutions, whose per-example gradients are small, and convolutions in three dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from bayeslayers.curvature.conv import CONVOLUTION, by_fastest_route
from bayeslayers.curvature.kernels.launch import attempt, runs
from bayeslayers.curvature.linear import LINEAR, weight_gradients
from bayeslayers.curvature.moments import Moments
from bayeslayers.curvature.rule import Use
from bayeslayers.curvature.settings import Settings

_FEW = 4  # positions up to which pairs of them take no more multiply-adds than a tile of 16
_LARGEST_GRID = 2**16 - 1  # in its third dimension
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def linear_squares(use: Use, g: Tensor) -> Sequence[Tensor | None]:
    """Return what `LINEAR.squares` does.

    Args:
        use: The use of the op.
        g: Gradient of the output.
    """
    return LINEAR.squares(use, g) if g.dim() == 2 else LINEAR.squares_by(_linear_sums, use, g)


def convolution_squares(use: Use, g: Tensor) -> Sequence[Tensor | None]:
    """Return what `CONVOLUTION.squares` does.

    Args:
        use: The use of the op.
        g: Gradient of the output.
    """
    return CONVOLUTION.squares_by(_convolution_sums, use, g)


def _linear_sums(g: Tensor, x: Tensor, with_grad: bool) -> tuple[Tensor | None, Tensor]:
    """Return what `linear.weight_gradients` does."""
    if g.dim() > 2 and g.shape[1:-1].numel() > _FEW and _fits("linear squares", g, x):
        found = attempt("linear squares", g, lambda: _linear(g.flatten(1, -2), x.flatten(1, -2), with_grad))
        if found is not None:
            return None if found.grad is None else found.grad.to(g.dtype), found.squares
    return weight_gradients(g, x, with_grad)


def _linear(g: Tensor, x: Tensor, with_grad: bool) -> Moments:
    from bayeslayers.curvature.kernels import triton_squares

    with torch.cuda.device_of(g):
        return triton_squares.linear(g, x, with_grad, _precision("matmul"))


def _convolution_sums(x: Tensor, g: Tensor, weight: Tensor, settings: Settings, with_grad: bool) -> Moments:
    """Sum as a `conv_routes.Route` does, of any number of groups."""
    if (
        x.dim() <= 4
        and len(weight) > settings.groups
        and settings.groups <= _LARGEST_GRID
        and _fits("convolution squares", x, g)
    ):
        found = attempt("convolution squares", x, lambda: _convolution(x, g, weight, settings, with_grad))
        if found is not None:
            return found
    return by_fastest_route(x, g, weight, settings, with_grad)


def _convolution(x: Tensor, g: Tensor, weight: Tensor, settings: Settings, with_grad: bool) -> Moments:
    from bayeslayers.curvature.kernels import triton_squares

    shape = weight.shape
    if x.dim() == 3:  # a row of an image
        x, g, weight = x.unsqueeze(2), g.unsqueeze(2), weight.unsqueeze(2)
        settings = settings._replace(
            stride=(1, *settings.stride), padding=(0, *settings.padding), dilation=(1, *settings.dilation)
        )
    with torch.cuda.device_of(x):
        sums = triton_squares.convolution(x, g, weight, settings, with_grad, _precision("conv"))
    return sums.map(lambda total: total.view(shape))


def _fits(name: str, *tensors: Tensor) -> bool:
    """Return whether a kernel can run on tensors, by their dtypes and sizes too."""
    dtype = tensors[0].dtype
    return dtype in _DTYPES and all(x.dtype == dtype and x.numel() > 0 for x in tensors) and runs(name, *tensors)


def _precision(op: Literal["matmul", "conv"]) -> str:
    """Return how float32 values are multiplied: as the user lets torch do it in its own matmuls or convolutions."""
    backends: Any = torch.backends
    if hasattr(backends, "fp32_precision"):  # torch 2.9; the flags below raise where this has been used
        found = backends.cuda.matmul.fp32_precision if op == "matmul" else backends.cudnn.conv.fp32_precision
        return "tf32" if found == "tf32" else "ieee"
    return "tf32" if (backends.cuda.matmul if op == "matmul" else backends.cudnn).allow_tf32 else "ieee"
