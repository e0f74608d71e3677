"""The step of a large tensor's posterior, by a kernel where one can run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bayeslayers.curvature.kernels.launch import attempt, kernels_of, language_of, takes

_NAME, _RETRACTION, _ELBO = "natural-gradient step", "new precision", "step of BBB"


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
    if not takes(_NAME, [x for x in moving if x is not None]):
        return False
    weight = 0.0 if precision_lr is None else precision_lr
    numbers = (newest, ess, lr, weight, weight * ess * curvature_scale, ess * damping, clip_radius)
    return bool(
        attempt(_NAME, moving.mean, lambda: _step(moving, numbers, precision_lr is None, clip_radius < math.inf))
    )


def retract_(
    precision: Tensor, target: Tensor, prior_precision: Tensor, *, factor: float, weight: float, of_root: bool
) -> bool:
    """Turn a statistic into IVON's new precision by a kernel; return False, with nothing changed, where none can run.

    Args:
        precision: Precision of the posterior.
        target: The statistic; it becomes the new precision. See `gaussian.retracted_precision` for the target.
        prior_precision: Precision of the prior, which is added to the statistic, one value or of the same shape.
        factor: Of the statistic.
        weight: Of the target.
        of_root: Whether the root of the precision is a factor of the statistic too.
    """
    tensors = precision, target, prior_precision
    if language_of(target) != "numba" or not takes(_RETRACTION, tensors):
        return False

    def launch() -> bool:
        from bayeslayers.curvature.kernels import numba_step

        numba_step.retract(*tensors, factor, weight, of_root)
        torch.autograd.graph.increment_version(target)
        return True

    return bool(attempt(_RETRACTION, target, launch))


def elbo_step_(tensors: Mapping[str, Tensor], numbers: tuple[float, ...]) -> bool:
    """Make BBB's step by a kernel; return False, with nothing changed, where none can run.

    Args:
        tensors: By the names of `numba_elbo.step`.
        numbers: As there.
    """
    everything = list(tensors.values())
    if language_of(everything[0]) != "numba" or not takes(_ELBO, everything):
        return False

    def launch() -> bool:
        from bayeslayers.curvature.kernels import numba_elbo

        none = {"momentum": None, "log_momentum": None}
        numba_elbo.step(**{**none, **tensors}, numbers=numbers)  # pyright: ignore[reportArgumentType]
        for name in tensors.keys() - {"grad", "log_sigma_grad", "prior_mean", "prior_precision"}:
            torch.autograd.graph.increment_version(tensors[name])
        return True

    return bool(attempt(_ELBO, everything[0], launch))


def _step(moving: Moving, numbers: tuple[float, ...], is_new_precision: bool, clips: bool) -> bool:
    with torch.cuda.device_of(moving.mean):
        kernels_of("step", moving.mean).step(*moving, numbers, is_new_precision, clips)
    for changed in moving[:3]:
        if changed is not None:  # the kernel has changed them past autograd
            torch.autograd.graph.increment_version(changed)
    return True
