"""Mean and variance of each kind of layer's output, from those of its input.

All elements are treated as independent, and as Gaussian at the input of a non-linearity: there are
variances but no covariances. The moments of a linear layer are exact for independent inputs, and those
of a ReLU for Gaussian ones; each rule states any further approximation.

Sources: Frey & Hinton 1999 (Neural Computation 11) for rectified Gaussians; Wu et al. 2019 (arXiv
1810.03958) for Bayesian networks; Gast & Roth 2018 (arXiv 1805.11327) for the layers of a
convolutional network, max pooling among them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd, _MaxPoolNd

from bayeslayers.sampling.placement import computing_with

_NODES = 32  # of Gauss-Hermite quadrature


class Moments(NamedTuple):
    """Mean and variance of each element of a tensor."""

    mean: Tensor
    variance: Tensor


Rule: TypeAlias = Callable[[Any, Moments], Moments]


def no_rule(name: str) -> ValueError:
    """Return the error for an operation without a moment rule."""
    return ValueError(
        f"no moment rule for {name}: method 'moments' needs one for everything after a Bayesian layer. "
        "Use method 'sample'."
    )


def _linear(layer: nn.Module, x: Moments) -> Moments:
    """Return the moments of a layer that is linear in weight and bias, exact for independent inputs.

        mean = m x        variance = v x^2 + (m^2 + v) s      with weights N(m, v) and inputs (x, s)

    The positions of a convolution share its weights and are therefore correlated; this is neglected.
    """
    if getattr(layer, "correlations", None):
        raise no_rule("a posterior of a layer with correlations")
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    v, v_bias = _variance(layer, "weight"), None if bias is None else _variance(layer, "bias")

    def apply(weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
        with computing_with(layer, {"weight": weight} if bias is None else {"weight": weight, "bias": bias}):
            return layer(input)

    no_bias = None if bias is None else torch.zeros_like(bias)
    variance = apply(v, v_bias, x.mean.square()) + apply(weight.square() + v, no_bias, x.variance)
    return Moments(apply(weight, bias, x.mean), variance)


def _variance(layer: nn.Module, name: str) -> Tensor:
    precision = layer._buffers.get(f"{name}_precision")
    return torch.zeros_like(layer.get_parameter(name)) if precision is None else precision.reciprocal()


def _batch_norm(norm: _BatchNorm, x: Moments) -> Moments:
    if norm.running_mean is None or norm.running_var is None:
        raise no_rule(f"{type(norm).__name__} without running statistics")
    shape = (-1, *[1] * (x.mean.dim() - 2))
    scale = (norm.running_var + norm.eps).rsqrt().view(shape)
    x_hat = Moments((x.mean - norm.running_mean.view(shape)) * scale, x.variance * scale.square())
    return _affine(norm, x_hat, shape)


def _group_norm(norm: nn.GroupNorm, x: Moments) -> Moments:
    """Return the moments with the group's statistics at their expectations, close to exact for large groups."""
    mean, variance = (part.unflatten(1, (norm.num_groups, -1)) for part in x)
    x_hat = _standardised(Moments(mean, variance), tuple(range(2, mean.dim())), norm.eps)
    return _affine(norm, Moments(*(part.flatten(1, 2) for part in x_hat)), (-1, *[1] * (x.mean.dim() - 2)))


def _layer_norm(norm: nn.LayerNorm, x: Moments) -> Moments:
    """Return the moments with the layer's statistics at their expectations, as for GroupNorm."""
    dimensions = tuple(range(-len(norm.normalized_shape), 0))
    return _affine(norm, _standardised(x, dimensions, norm.eps), tuple(norm.normalized_shape))


def _standardised(x: Moments, dimensions: tuple[int, ...], eps: float) -> Moments:
    centred = x.mean - x.mean.mean(dimensions, keepdim=True)
    scale = ((centred.square() + x.variance).mean(dimensions, keepdim=True) + eps).rsqrt()
    return Moments(centred * scale, x.variance * scale.square())


def _affine(norm: nn.Module, x: Moments, shape: tuple[int, ...]) -> Moments:
    """Scale and shift by independent Gaussians, if the norm has them."""
    mean, variance = x
    if norm._parameters.get("weight") is not None:
        weight, v = norm.get_parameter("weight").view(shape), _variance(norm, "weight").view(shape)
        mean, variance = mean * weight, variance * (weight.square() + v) + mean.square() * v
    if norm._parameters.get("bias") is not None:
        mean, variance = mean + norm.get_parameter("bias").view(shape), variance + _variance(norm, "bias").view(shape)
    return Moments(mean, variance)


def _normal_parts(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return P(z > 0) and sqrt(variance) times the standard normal density at mean / sqrt(variance)."""
    deviation = variance.sqrt()
    ratio = mean / deviation.clamp_min(torch.finfo(mean.dtype).tiny)  # a deterministic element: -inf, 0 or inf
    return torch.special.ndtr(ratio), deviation * (-0.5 * ratio.square()).exp() / math.sqrt(2 * math.pi)


def _relu(relu: nn.ReLU, x: Moments) -> Moments:
    return rectified(0.0, x)


def _leaky_relu(relu: nn.LeakyReLU, x: Moments) -> Moments:
    return rectified(relu.negative_slope, x)


def rectified(slope: float, x: Moments) -> Moments:
    """Return the exact moments of max(z, 0) + slope min(z, 0) for Gaussian z (Frey & Hinton 1999).

    With a = P(z > 0) and b = s phi(x / s):  E[z+] = x a + b,  E[z+^2] = (x^2 + s^2) a + x b.
    """
    above, density = _normal_parts(*x)
    positive = x.mean * above + density
    square = (x.mean.square() + x.variance) * above + x.mean * density
    whole = x.mean.square() + x.variance
    mean = positive + slope * (x.mean - positive)
    second = square + slope**2 * (whole - square)  # positive and negative part are never both non-zero
    return Moments(mean, (second - mean.square()).clamp_min(0))  # only rounding can leave it below 0


def _smooth(activation: nn.Module, x: Moments) -> Moments:
    """Return the moments of a smooth activation of Gaussians, by Gauss-Hermite quadrature with 32 nodes."""
    nodes, weights = _quadrature()
    deviation, mean, square = x.variance.sqrt(), torch.zeros_like(x.mean), torch.zeros_like(x.mean)
    for node, weight in zip(nodes, weights, strict=True):
        value = activation(x.mean + node * deviation)
        delta = weight * value
        mean, square = mean + delta, square + delta * value
    return Moments(mean, (square - mean.square()).clamp_min(0))


@functools.cache
def _quadrature() -> tuple[list[float], list[float]]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    return nodes.tolist(), (weights / math.sqrt(2 * math.pi)).tolist()


def _max_pool(pool: _MaxPoolNd, x: Moments) -> Moments:
    """Return the moments of each window's maximum, taken pairwise, with each maximum approximated by a Gaussian.

    Source: Gast & Roth 2018, section 4; the moments of two Gaussians' maximum are those of Clark 1961.
    """
    if pool.ceil_mode or pool.return_indices:
        raise no_rule(f"{type(pool).__name__} with ceil_mode or return_indices")
    dimensions = x.mean.dim() - 2
    sizes = [_tuple(value, dimensions) for value in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
    padded = any(padding for _, _, padding, _ in zip(*sizes, strict=True))
    # Below all elements: never the maximum.
    never = float((x.mean - 40 * x.variance.sqrt()).amin()) - 1 if padded else 0.0
    for index, (kernel, stride, padding, dilation) in enumerate(zip(*sizes, strict=True)):
        dim = index + 2
        sides = [0, 0] * (x.mean.dim() - dim - 1) + [padding, padding]
        mean, variance = F.pad(x.mean, sides, value=never), F.pad(x.variance, sides)
        count = (mean.shape[dim] - dilation * (kernel - 1) - 1) // stride + 1
        elements = []
        for offset in range(0, kernel * dilation, dilation):
            chosen = (slice(None),) * dim + (slice(offset, offset + (count - 1) * stride + 1, stride),)
            elements.append(Moments(mean[chosen], variance[chosen]))
        while len(elements) > 1:
            elements = [maximum(*elements[i : i + 2]) for i in range(0, len(elements), 2)]
        x = elements[0]
    return x


def maximum(a: Moments, b: Moments | None = None) -> Moments:
    """Return the moments of the maximum of two independent Gaussians; a single one keeps its own.

    d^2 = s_a + s_b,  E = b + E[max(a - b, 0)],  E[max^2] by Clark 1961 (Operations Research 9), Eq. 2-4
    """
    if b is None:
        return a
    above, density = _normal_parts(a.mean - b.mean, a.variance + b.variance)
    mean = a.mean * above + b.mean * (1 - above) + density
    # Squared distances from the mean: those from zero would cancel numerically.
    to_a, to_b = a.mean - mean, b.mean - mean
    variance = (to_a.square() + a.variance) * above + (to_b.square() + b.variance) * (1 - above)
    variance = variance + (to_a + to_b) * density
    return Moments(mean, variance.clamp_min(0))


def _average_pool(pool: _AvgPoolNd, x: Moments) -> Moments:
    """Return the moments of means of k independent elements, whose variance is the mean variance over k."""
    dimensions = x.mean.dim() - 2
    uneven = any(_tuple(pool.padding, dimensions)) and not pool.count_include_pad
    if pool.ceil_mode or uneven or getattr(pool, "divisor_override", None):
        raise no_rule(f"{type(pool).__name__} whose windows differ in their divisors")
    size = math.prod(_tuple(pool.kernel_size, dimensions))
    return Moments(pool(x.mean), pool(x.variance) / size)


def _adaptive_average_pool(pool: _AdaptiveAvgPoolNd, x: Moments) -> Moments:
    mean = pool(x.mean)
    before, after = x.mean.shape[2:], mean.shape[2:]
    if any(b % a for b, a in zip(before, after, strict=True)):
        raise no_rule(f"{type(pool).__name__} with windows of several sizes")
    return Moments(mean, pool(x.variance) * math.prod(after) / math.prod(before))


def _moved(module: nn.Module, x: Moments) -> Moments:
    return Moments(*(module(part) for part in x))


def _tuple(value: Any, dimensions: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * dimensions if len(value) == 1 else value


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    _ConvNd: _linear,
    _BatchNorm: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.ReLU: _relu,
    nn.LeakyReLU: _leaky_relu,
    _MaxPoolNd: _max_pool,
    _AvgPoolNd: _average_pool,
    _AdaptiveAvgPoolNd: _adaptive_average_pool,
    **dict.fromkeys((nn.SiLU, nn.GELU, nn.ELU, nn.Softplus, nn.Tanh, nn.Sigmoid), _smooth),
    **dict.fromkeys((nn.Flatten, nn.Unflatten, nn.Identity, nn.ZeroPad2d, _DropoutNd), _moved),
}
