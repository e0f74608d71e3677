"""Normalisation layers with a posterior over scale and shift, and a norm that suits posteriors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bayeslayers import curvature
from bayeslayers.checks import positive
from bayeslayers.curvature.accumulate import Leaves
from bayeslayers.curvature.batch_norm import BATCH_NORM, Normalisation
from bayeslayers.curvature.op import is_eager
from bayeslayers.dtypes import at_least_float32
from bayeslayers.layers.base import BayesianLayer


class _BayesNorm(BayesianLayer):
    """A normalisation layer, whose scale has prior mean 1: `_normalise` is its op without the affine part."""

    rule = curvature.AFFINE
    prior_means: ClassVar[Mapping[str, float]] = {"weight": 1.0}
    _normalise: Callable[..., Tensor]  # (input, weight=None, bias=None), each kind of norm has its own

    def forward(self, input: Tensor) -> Tensor:
        tensors, leaves, _ = self.operands()
        if leaves is None or tensors[0] is None:
            return self._normalise(input, *tensors)
        return self._with_curvature(input, tensors, leaves)

    def _with_curvature(self, input: Tensor, tensors: Any, leaves: Leaves) -> Tensor:
        return self.rule((self._normalise(input),), tensors, leaves, self._positions(input))

    def _positions(self, input: Tensor) -> tuple[int, ...]:
        return tuple(range(2, input.dim()))


class _BayesBatchNorm(_BayesNorm, _BatchNorm):
    def _normalise(self, input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        own = self._settings(input)
        return F.batch_norm(input, own.running_mean, own.running_var, weight, bias, own.training, own.momentum, own.eps)

    def _settings(self, input: Tensor) -> Normalisation:
        """Return what the layer takes beside its operands, and count a batch whose statistics it follows."""
        self._check_input_dim(input)
        update = self.training and self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        if update and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        keep = update or not self.training
        return Normalisation(
            self.running_mean if keep else None,
            self.running_var if keep else None,
            self.training or self.running_mean is None,
            momentum,
            self.eps,
        )

    def _with_curvature(self, input: Tensor, tensors: Any, leaves: Leaves) -> Tensor:
        if _fuses(input, tensors[0]):
            return BATCH_NORM((input,), tensors, leaves, self._settings(input))
        return super()._with_curvature(input, tensors, leaves)


def _fuses(input: Tensor, weight: Tensor) -> bool:
    """Return whether torch's own kernel does: not under vmap and compilers, for mixed dtypes, and for a single value.

    Of a single value a channel, the op by itself raises.
    """
    plain = is_eager() and type(input) is Tensor and input.dtype == weight.dtype and input.dtype.itemsize >= 4
    return plain and input.dim() > 1 and input.numel() > input.shape[1]


class BayesBatchNorm1d(_BayesBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` with a Gaussian posterior over scale and shift."""


class BayesBatchNorm2d(_BayesBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with a Gaussian posterior over scale and shift."""


class BayesBatchNorm3d(_BayesBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` with a Gaussian posterior over scale and shift."""


class BayesGroupNorm(_BayesNorm, nn.GroupNorm):
    """`nn.GroupNorm` with a Gaussian posterior over scale and shift."""

    def _normalise(self, input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.group_norm(input, self.num_groups, weight, bias, self.eps)


class BayesLayerNorm(_BayesNorm, nn.LayerNorm):
    """`nn.LayerNorm` with a Gaussian posterior over scale and shift; dimension 0 runs over examples."""

    def _normalise(self, input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)

    def _positions(self, input: Tensor) -> tuple[int, ...]:
        return tuple(range(1, input.dim() - len(self.normalized_shape)))

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == len(self.normalized_shape):  # a single example
            return super().forward(input.unsqueeze(0)).squeeze(0)
        return super().forward(input)


class FilterResponseNorm2d(nn.Module):
    """Filter response normalisation: each channel of each example over its root mean square, scaled and shifted.

        y = x / sqrt(mean_hw(x^2) + eps) * weight + bias

    No example sees another, as under BatchNorm, and no mean is subtracted. The paper follows it by
    max(y, threshold) with a learned threshold, for without centred inputs whole channels can die
    under a ReLU. Follow it by SiLU instead, as Izmailov et al. 2021 do (arXiv 2104.14421): it passes
    a gradient on both sides of 0, the loss stays smooth in the weights, as a Gaussian posterior
    would have it, and there is no third kind of parameter.

    Source: Singh & Krishnan 2020 (arXiv 1911.09737), Eq. 1, with eps fixed.

    Args:
        num_features: Channels.
        eps: Added to the mean square, > 0.
        device: Device of the parameters.
        dtype: Their type.

    Raises:
        ValueError: In the forward pass, if the input is not `(n, num_features, h, w)` with h w > 1.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_features, self.eps = num_features, positive("eps", eps)
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        return self._normalise(input, self.weight, self.bias)

    def _normalise(self, input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        if input.dim() != 4 or input.shape[1] != self.num_features or input.shape[2] * input.shape[3] == 1:
            raise ValueError(
                f"input must have the shape (n, {self.num_features}, h, w) with h w > 1, got {tuple(input.shape)}: "
                "of a single position the norm keeps no more than the sign. Use larger inputs, or BayesGroupNorm."
            )
        mean_square = at_least_float32(input).square().mean((2, 3), keepdim=True)
        x_hat = input * (mean_square + self.eps).rsqrt().to(input.dtype)
        if weight is not None:
            x_hat = x_hat * weight[:, None, None]
        return x_hat if bias is None else x_hat + bias[:, None, None]

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class BayesFilterResponseNorm2d(_BayesNorm, FilterResponseNorm2d):
    """`FilterResponseNorm2d` with a Gaussian posterior over scale and shift."""
