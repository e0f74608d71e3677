"""The natural-gradient step of a large tensor on a GPU, by a Triton kernel where it can run."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bayeslayers.curvature.kernels.launch import LARGE, attempt, in_one_order, runs

_NAME = "natural-gradient step"


class Moving(NamedTuple):
    """The tensors of a step, all of one shape but for the prior's, which may be single values.

    Attributes:
        mean: Mean of the posterior; changed.
        precision: Its precision; changed.
        average: Average of the gradients so far; changed. None without momentum.
        grad: Mean over examples of the loss gradient, in nats.
        curvature: Mean over examples of its square, up to a factor, or the new precision.
        prior_mean: Mean of the prior.
        prior_precision: Its precision.
    """

    mean: Tensor
    precision: Tensor
    average: Tensor | None
    grad: Tensor
    curvature: Tensor
    prior_mean: Tensor
    prior_precision: Tensor


def step_(
    moving: Moving,
    *,
    newest: float,
    ess: float,
    lr: float,
    precision_lr: float | None = None,
    damping: float = 0.0,
    curvature_scale: float = 1.0,
    clip_radius: float = math.inf,
) -> bool:
    """Move a posterior and its momentum by a kernel; return False, with nothing changed, where none can run.

    Args:
        moving: The tensors.
        newest: Weight of the gradient in the average.
        ess: This and the following as for `gaussian.natural_gradient_step_`.
        lr: See there.
        precision_lr: See there; None where `curvature` is the new precision.
        damping: See there.
        curvature_scale: See there.
        clip_radius: See there.
    """
    if not _fits(moving):
        return False
    weight = 0.0 if precision_lr is None else precision_lr
    numbers = (newest, ess, lr, weight, weight * ess * curvature_scale, ess * damping, clip_radius)
    return bool(attempt(_NAME, lambda: _step(moving, numbers, precision_lr is None, clip_radius < math.inf)))


def _fits(moving: Moving) -> bool:
    if moving.mean.numel() < LARGE:
        return False
    tensors = [x for x in moving if x is not None]
    whole = [x for x in tensors if x.dim() > 0]
    return (
        all(x.dtype == torch.float32 for x in tensors)
        and moving.mean.dim() > 0
        and in_one_order(*whole)
        and runs(_NAME, *tensors)
    )


def _step(moving: Moving, numbers: tuple[float, ...], is_new_precision: bool, clips: bool) -> bool:
    from bayeslayers.curvature.kernels import triton_step

    with torch.cuda.device_of(moving.mean):
        triton_step.step(*moving, numbers, is_new_precision, clips)
    for changed in moving[:3]:
        if changed is not None:  # the kernel has changed them past autograd
            torch.autograd.graph.increment_version(changed)
    return True
