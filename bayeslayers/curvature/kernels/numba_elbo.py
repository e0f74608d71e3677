"""A Numba kernel: Adam's step on the mean and the logarithm of sigma, in one pass over memory, as `numba_step` is."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math

import numpy as np
from numpy import float32, int32
from torch import Tensor

from bayeslayers.curvature.kernels.numba_jit import floats, in_parts, jit, places
from bayeslayers.curvature.kernels.numba_step import VALUES, spread, update_average


@jit
def _gradients(mean, precision, grad, log_sigma_grad, prior_mean, prior_precision, ess, scale, of_mean, of_log_sigma):
    """Write g + p0 (m - m0) / ess, and scale s + (p0 / p - 1) / ess, which the statistic s of the leaf is part of."""
    for i in range(len(mean)):
        of_mean[i] = grad[i] + prior_precision[i] * (mean[i] - prior_mean[i]) / ess
    for i in range(len(mean)):
        of_log_sigma[i] = scale * log_sigma_grad[i] + (prior_precision[i] / precision[i] - float32(1)) / ess


@jit
def _direct(momentum, second, grad, newest, weight, correction, direction):
    """Move the averages of gradients, if there are any, and of their squares, and write Adam's direction."""
    for i in range(len(second)):
        second[i] += weight * (grad[i] * grad[i] - second[i])
    if len(momentum) > 0:
        update_average(momentum, grad, newest)
        grad = momentum
    for i in range(len(second)):
        direction[i] = grad[i] / (math.sqrt(second[i] / correction) + float32(1e-8))


@jit
def _exponential(x):
    """Return exp(x): the coefficients are those of Moshier's Cephes library for single precision."""
    count = np.floor(x * float32(1.44269504088896341) + float32(0.5))
    rest = x - count * float32(0.693359375) + count * float32(2.12194440e-4)
    y = float32(1.9875691500e-4) * rest + float32(1.3981999507e-3)
    y = y * rest + float32(8.3334519073e-3)
    y = y * rest + float32(4.1665795894e-2)
    y = y * rest + float32(1.6666665459e-1)
    y = y * rest + float32(5.0000001201e-1)
    y = y * rest * rest + rest + float32(1)
    power = min(max(count, float32(-126)), float32(127))
    value = y * int32(int32(int32(power) + int32(127)) << int32(23)).view(float32)
    value = float32(np.inf) if x > float32(88.3) else value
    return float32(0) if x < float32(-87.3) else value


@jit
def _add(mean, direction, lr):
    for i in range(len(mean)):
        mean[i] -= lr * direction[i]


@jit
def _scale(precision, direction, lr):
    """Multiply by exp(2 lr direction): the logarithm of sigma moves by -lr direction."""
    for i in range(len(precision)):
        precision[i] *= _exponential(float32(2) * lr * direction[i])


@jit
def _step(
    mean, precision, grad, log_sigma_grad, prior_mean, prior_precision, momentum, second, log_momentum, log_second,
    size, single, ess, scale, lr, newest, weight, correction,
):  # fmt: skip
    mean, precision = floats(mean, size), floats(precision, size)
    grad, log_sigma_grad = floats(grad, size), floats(log_sigma_grad, size)
    prior_mean = floats(prior_mean, 1 if single[0] else size)
    prior_precision = floats(prior_precision, 1 if single[1] else size)
    momentum, log_momentum = (
        floats(momentum, size if momentum else 0),
        floats(log_momentum, size if log_momentum else 0),
    )
    second, log_second = floats(second, size), floats(log_second, size)
    ess, scale, lr, newest = float32(ess), float32(scale), float32(lr), float32(newest)
    weight, correction = float32(weight), float32(correction)
    buffers = np.empty((5, VALUES), np.float32)
    center, prior, direction, g, s = buffers[0], buffers[1], buffers[2], buffers[3], buffers[4]
    for start in range(0, size, VALUES):
        stop = start + VALUES
        m, p = mean[start:stop], precision[start:stop]
        spread(prior_mean, start, center)
        spread(prior_precision, start, prior)
        _gradients(m, p, grad[start:stop], log_sigma_grad[start:stop], center, prior, ess, scale, g, s)
        _direct(momentum[start:stop], second[start:stop], g, newest, weight, correction, direction)
        _add(m, direction, lr)
        _direct(log_momentum[start:stop], log_second[start:stop], s, newest, weight, correction, direction)
        _scale(p, direction, lr)


def step(
    mean: Tensor, precision: Tensor, grad: Tensor, log_sigma_grad: Tensor, prior_mean: Tensor, prior_precision: Tensor,
    momentum: Tensor | None, second: Tensor, log_momentum: Tensor | None, log_second: Tensor,
    numbers: tuple[float, ...],
) -> None:  # fmt: skip
    """Move a posterior by Adam on the evidence lower bound, as `bbb` says.

    Args:
        mean: Mean, which fills its memory in one order, as all the tensors of its shape do; changed.
        precision: Precision; changed.
        grad: Mean over examples of the loss gradient.
        log_sigma_grad: The same of the logarithm of sigma, up to a factor.
        prior_mean: Mean of the prior, one value or of the shape of `mean`.
        prior_precision: Precision of the prior, likewise.
        momentum: Average of the mean's gradients; changed. None without momentum.
        second: That of their squares; changed.
        log_momentum: Those of the logarithm of sigma.
        log_second: Likewise.
        numbers: Effective sample size, the factor of `log_sigma_grad`, learning rate, weight of the newest gradient,
            that of the newest square, and what an average of squares is divided by.
    """
    tensors = mean, precision, grad, log_sigma_grad, prior_mean, prior_precision
    everything = *tensors, momentum, second, log_momentum, log_second
    single = prior_mean.numel() == 1, prior_precision.numel() == 1
    in_parts(mean.numel(), lambda start, count: _step(*places(everything, start), count, single, *numbers))
