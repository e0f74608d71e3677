"""Numba kernels: the natural-gradient step of a diagonal Gaussian, in one pass over memory.

Values are moved a run at a time, by short loops over few arrays, which the compiler turns into vector instructions.
What one loop leaves for the next stays in the first cache.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

import math

import numpy as np
from numpy import float32
from torch import Tensor

from bayeslayers.curvature.kernels.numba_jit import floats, in_parts, jit, places

VALUES = 256  # of a run: few, so that all streams of memory are read ahead together


@jit
def update_average(average, grad, newest):
    """Write (1 - newest) average + newest grad."""
    for i in range(len(average)):
        average[i] = (float32(1) - newest) * average[i] + newest * grad[i]


@jit
def _precision(precision, curvature, prior, precision_lr, weight):
    """Write (1 - precision_lr) precision + precision_lr prior + weight curvature."""
    for i in range(len(precision)):
        precision[i] = (float32(1) - precision_lr) * precision[i] + precision_lr * prior[i] + weight * curvature[i]


@jit
def spread(prior, start, out):
    """Write values of the prior from one place on, or its one value."""
    if len(prior) == 1:
        out[:] = prior[0]
    else:
        _copy(prior[start : start + len(out)], out)


@jit
def _copy(values, out):
    for i in range(len(values)):
        out[i] = values[i]


@jit
def _direction(mean, prior_mean, prior_precision, grad, ess, out):
    """Write ess grad + prior_precision (mean - prior_mean)."""
    for i in range(len(mean)):
        out[i] = ess * grad[i] + prior_precision[i] * (mean[i] - prior_mean[i])


@jit
def _move(mean, direction, precision, damping, lr, clip_radius):
    """Add -lr direction / (precision + damping) to the mean, bounded before lr; what is not a number stays so."""
    for i in range(len(mean)):
        move = direction[i] / (precision[i] + damping)
        move = clip_radius if move > clip_radius else move
        mean[i] -= lr * (-clip_radius if move < -clip_radius else move)


@jit
def _step(
    mean, precision, average, grad, curvature, prior_mean, prior_precision, size, single,
    newest, ess, lr, precision_lr, curvature_weight, damping, clip_radius, is_new_precision,
):  # fmt: skip
    mean, precision, average = floats(mean, size), floats(precision, size), floats(average, size if average else 0)
    grad, curvature = floats(grad, size), floats(curvature, size)
    prior_mean = floats(prior_mean, 1 if single[0] else size)
    prior_precision = floats(prior_precision, 1 if single[1] else size)
    buffers = np.empty((3, VALUES), np.float32)
    center, prior, direction = buffers[0], buffers[1], buffers[2]
    for start in range(0, len(mean), VALUES):
        stop = start + VALUES
        m, p, g, c = mean[start:stop], precision[start:stop], grad[start:stop], curvature[start:stop]
        spread(prior_mean, start, center)
        spread(prior_precision, start, prior)
        if is_new_precision:
            _copy(c, p)
        else:
            _precision(p, c, prior, float32(precision_lr), float32(curvature_weight))
        if len(average) > 0:
            update_average(average[start:stop], g, float32(newest))
            g = average[start:stop]
        _direction(m, center, prior, g, float32(ess), direction)
        _move(m, direction, p, float32(damping), float32(lr), float32(clip_radius))


@jit
def _retract(precision, target, prior_precision, size, single, factor, weight, of_root):
    precision, target = floats(precision, size), floats(target, size)
    prior_precision = floats(prior_precision, 1 if single else size)
    prior = np.empty(VALUES, np.float32)
    for start in range(0, len(precision), VALUES):
        p, t = precision[start : start + VALUES], target[start : start + VALUES]
        spread(prior_precision, start, prior)
        _retracted(p, t, prior, float32(factor), float32(weight), of_root)


@jit
def _retracted(precision, target, prior, factor, weight, of_root):
    """Write p (1 + (1 - r)^2) / 2 with r = weight (p - target) / p, as `gaussian.retracted_precision`."""
    if of_root:
        for i in range(len(precision)):
            target[i] *= math.sqrt(precision[i])
    for i in range(len(precision)):
        rest = (prior[i] + factor * target[i]) / precision[i] * weight + (float32(1) - weight)
        target[i] = float32(0.5) * (rest * rest * precision[i] + precision[i])


def step(
    mean: Tensor, precision: Tensor, average: Tensor | None, grad: Tensor, curvature: Tensor, prior_mean: Tensor,
    prior_precision: Tensor, numbers: tuple[float, ...], is_new_precision: bool, clips: bool,
) -> None:  # fmt: skip
    """Move momentum average a, precision p and mean m, given gradient g, curvature c and prior N(m0, 1/p0).

        a <- (1 - newest) a + newest g
        p <- (1 - precision_lr) p + precision_lr p0 + curvature_weight c,  or the new precision that stands in c
        m <- m - lr clip((ess a + p0 (m - m0)) / (p + damping))

    It is `gaussian.natural_gradient_step_`; every term of the precision is non-negative there too.

    Args:
        mean: m, which fills its memory in one order, as all the tensors of its shape do; changed.
        precision: p; changed.
        average: a; changed. None for none.
        grad: g.
        curvature: c, or the new precision.
        prior_mean: m0, one value or of the shape of `mean`.
        prior_precision: p0, likewise.
        numbers: What the formulas name, from `newest` to `damping`, and the bound on the move.
        is_new_precision: Whether `curvature` is the new precision.
        clips: Whether the move is bounded; otherwise its bound is infinite.
    """
    tensors = mean, precision, average, grad, curvature, prior_mean, prior_precision
    single = prior_mean.numel() == 1, prior_precision.numel() == 1

    def run(start: int, count: int) -> None:
        _step(*places(tensors, start), count, single, *numbers, is_new_precision)

    in_parts(mean.numel(), run)


def retract(
    precision: Tensor, target: Tensor, prior_precision: Tensor, factor: float, weight: float, of_root: bool
) -> None:
    """Turn a statistic s into IVON's new precision, as `gaussian.retracted_precision` makes it.

    Its target is p0 + factor s, or p0 + factor s sqrt(p).

    Args:
        precision: p.
        target: s, which becomes the new precision.
        prior_precision: p0, one value or of the shape of the precision.
        factor: Of the statistic.
        weight: Of the target.
        of_root: Whether sqrt(p) is a factor of it too.
    """
    tensors, single = (precision, target, prior_precision), prior_precision.numel() == 1

    def run(start: int, count: int) -> None:
        _retract(*places(tensors, start), count, single, factor, weight, of_root)

    in_parts(target.numel(), run)
