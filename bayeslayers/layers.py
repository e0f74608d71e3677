"""The torch.nn layers with a Gaussian posterior: each parameter is the mean, its precision a buffer beside it.

A plain call uses the means. Inside `sampled(model)` it uses the weights drawn for that scope, and
inside `tracked(model)` the backward pass also sums squared per-example gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bayeslayers import curvature
from bayeslayers.checks import positive
from bayeslayers.curvature.accumulate import Leaves, wide
from bayeslayers.curvature.conv import Settings
from bayeslayers.curvature.kronecker import KroneckerLeaves
from bayeslayers.perturbation import Op, Perturbation

DEFAULT_PRIOR_PRECISION = 50.0  # a standard deviation of 0.14, the usual initial one of a unit with 50 inputs
DEFAULT_INIT_PRECISION = 1e3  # a standard deviation of 0.03, small beside it

POSTERIOR_SUFFIXES = ("_precision", "_prior_mean", "_prior_precision")
ROOTS = ("weight_input_root", "weight_output_root")


def attach_posterior(
    module: nn.Module, prior_precision: float, init_precision: float, keys: Iterable[str] | None = None
) -> None:
    """Give parameters of any module, not those of modules inside it, a precision and a prior, as new buffers.

    The prior's mean is 0, and 1 for the scale of a Bayesian normalisation layer.

    Args:
        module: Module that owns the parameters.
        prior_precision: Precision of the prior, > 0.
        init_precision: Precision of the posterior, > 0.
        keys: Names that the parameters have in the module; None for all of them.

    Raises:
        TypeError: If a parameter is not of real numbers.
    """
    means = module.prior_means if isinstance(module, BayesianLayer) else {}
    for key in [name for name, _ in module.named_parameters(recurse=False)] if keys is None else keys:
        parameter: Any = module._parameters[key]
        if not parameter.is_floating_point():
            raise TypeError(f"parameter '{key}' must be of real numbers, got {parameter.dtype}.")
        values = (init_precision, means.get(key, 0.0), prior_precision)
        for suffix, value, shape in zip(POSTERIOR_SUFFIXES, values, (parameter.shape, (), ()), strict=True):
            module.register_buffer(key + suffix, parameter.new_full(shape, value, requires_grad=False))


class BayesianLayer(nn.Module):
    """What every Bayesian layer adds to its torch.nn layer: a precision and a prior per parameter.

    For a parameter `weight` (the posterior's mean) there are the buffers `weight_precision` (the
    shape of `weight`), `weight_prior_mean` and `weight_prior_precision` (scalars, or the shape of
    `weight` once a posterior has become a prior). An ordinary checkpoint, which has none of the
    three, loads as means and leaves them as they are.

    A layer may have a matrix-variate posterior, by two buffers more: `weight_input_root` and
    `weight_output_root`, from which its weight is drawn as in `matrix_gaussian`, jointly with the
    bias if the first is one larger than a row of the weight. The precisions are then those of each
    entry by itself. Optimisers of a diagonal posterior go on from these and drop the roots.

    Args:
        prior_precision: Precision of the prior N(prior_mean, 1/prior_precision), > 0.
        init_precision: Precision of the posterior at the start, > 0.

    Other arguments are those of the torch.nn layer.
    """

    prior_means: ClassVar[Mapping[str, float]] = {}
    drawn: dict[str, Tensor]
    leaves: Leaves | KroneckerLeaves | None
    perturbation: Perturbation | None = None  # how a scope draws the output, where it draws no weight
    recomputed_in: int = -1  # the backward pass that ran the last forward, to recompute it; -1 if none did

    def __init__(
        self,
        *args: Any,
        prior_precision: float = DEFAULT_PRIOR_PRECISION,
        init_precision: float = DEFAULT_INIT_PRECISION,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        positive("prior_precision", prior_precision)
        positive("init_precision", init_precision)
        self.attach_posterior(prior_precision, init_precision)

    def attach_posterior(self, prior_precision: float, init_precision: float) -> None:
        """Give each parameter that has none its precision and prior, as new buffers; the layer is outside any scope."""
        self.drawn = {}
        self.leaves = self.perturbation = None
        names = [name for name, _ in self.named_parameters(recurse=False) if f"{name}_precision" not in self._buffers]
        attach_posterior(self, prior_precision, init_precision, names)

    def value(self, name: str) -> Any:
        """Return the tensor to compute with: the scope's draw, the mean outside one, None if there is no such."""
        draw = self.drawn.get(name)
        return getattr(self, name) if draw is None else draw

    def active_leaves(self) -> Any:
        """Return the leaves to fill, of a kind that the layer's rule takes, or None where no gradient will flow."""
        if self.leaves is None or not torch.is_grad_enabled():
            return None
        self.recomputed_in = -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
        return self.leaves

    def _perturbed(self, perturbation: Perturbation, op: Op, input: Tensor) -> Tensor:
        """Return a drawn output of the layer, whose op is given."""
        if self.active_leaves() is not None:
            raise RuntimeError(
                f"curvature must be tracked under how='weights', got how={perturbation.how!r}: it squares per-example "
                "gradients at one draw of the weights."
            )
        return perturbation(op, input, self.value("weight"), self.value("bias"))  # the means: no weight is drawn

    def factor_sizes(self) -> tuple[int, int] | None:
        """Return the sizes (i, o) of the Kronecker factors of the weight's curvature, None if it has no such form."""
        layer: Any = self
        if isinstance(layer, nn.Linear) or (isinstance(layer, _ConvNd) and not layer.transposed and layer.groups == 1):
            return layer.weight.shape[1:].numel(), len(layer.weight)
        return None

    def root_shapes(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Return the shapes that the roots of a matrix-variate posterior may have, those with the bias first."""
        if (sizes := self.factor_sizes()) is None:
            return []
        i, o = sizes
        return [((n, n), (o, o)) for n in ([i + 1, i] if self._parameters.get("bias") is not None else [i])]

    @property
    def roots(self) -> tuple[Tensor, Tensor] | None:
        """The roots of a matrix-variate posterior, None where it is diagonal."""
        found = [self._buffers.get(name) for name in ROOTS]
        return None if found[0] is None or found[1] is None else (found[0], found[1])

    def set_roots(self, input_root: Tensor, output_root: Tensor) -> None:
        """Give the layer a matrix-variate posterior."""
        for name, root in zip(ROOTS, (input_root, output_root), strict=True):
            self.register_buffer(name, root)

    def drop_roots(self) -> None:
        """Leave the layer the diagonal posterior of its precisions."""
        for name in ROOTS:
            self._buffers.pop(name, None)

    def _fit_roots(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Make room for the roots of a posterior to load, or none if it is a diagonal one."""
        found = [state_dict.get(prefix + name) for name in ROOTS]
        shapes = tuple(tuple(root.shape) if isinstance(root, Tensor) else () for root in found)
        if shapes in self.root_shapes():
            weight = self.get_parameter("weight").detach()
            self.set_roots(*(weight.new_empty(shape) for shape in shapes))
        elif found == [None, None] and prefix + "weight_precision" in state_dict:
            self.drop_roots()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._fit_roots(state_dict, prefix)
        own = [name for name in self._buffers if name.endswith(POSTERIOR_SUFFIXES) or name in ROOTS]
        for name in own:
            self._fit_prior(name, state_dict.get(prefix + name))
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        if not any(prefix + name in state_dict for name in own):  # an ordinary checkpoint
            missing = [key for key in missing if key.removeprefix(prefix) not in own]
        missing_keys.extend(missing)

    def _fit_prior(self, name: str, loaded: object) -> None:
        """Give a prior's buffer the loaded shape, where that is a scalar or the parameter's."""
        if not isinstance(loaded, Tensor) or "_prior_" not in name:
            return
        buffer, parameter = self.get_buffer(name), self.get_parameter(name.partition("_prior_")[0])
        if loaded.shape != buffer.shape and loaded.shape in ((), parameter.shape):
            setattr(self, name, buffer.new_empty(loaded.shape))


class BayesLinear(BayesianLayer, nn.Linear):
    """`nn.Linear` with a Gaussian posterior; takes `(*, in_features)`, dimension 0 running over examples."""

    def forward(self, input: Tensor) -> Tensor:
        if self.perturbation is not None:
            return self._perturbed(self.perturbation, F.linear, input)
        weight, bias, leaves = self.value("weight"), self.value("bias"), self.active_leaves()
        if leaves is None:
            return F.linear(input, weight, bias)
        return curvature.linear(input, weight, bias, leaves)


class _BayesConv(BayesianLayer, _ConvNd):
    """A convolution: the op itself is torch's, with the drawn weight in place of the mean."""

    def forward(self, input: Tensor) -> Tensor:
        if self.perturbation is not None:
            return self._perturbed(self.perturbation, self._conv_forward, input)
        weight, bias, leaves = self.value("weight"), self.value("bias"), self.active_leaves()
        if leaves is None:
            return self._conv_forward(input, weight, bias)
        input, padding = self._zero_padded(input)
        settings = Settings(self.stride, padding, self.dilation, False, (0,) * len(padding), self.groups)
        return curvature.convolution(input, weight, bias, leaves, settings)

    def _zero_padded(self, input: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return the input and the symmetric zero padding still to do, having done any other padding."""
        sides = self._reversed_padding_repeated_twice  # last dimension first, (before, after) each
        before, after = tuple(sides[-2::-2]), tuple(sides[::-2])
        if self.padding_mode != "zeros":
            return F.pad(input, sides, mode=self.padding_mode), (0,) * len(before)
        if not isinstance(self.padding, str):  # as it is now: some networks change it once built
            return input, self.padding
        if before != after:  # padding="same" with an even kernel
            return F.pad(input, sides), (0,) * len(before)
        return input, before


class BayesConv1d(_BayesConv, nn.Conv1d):
    """`nn.Conv1d` with a Gaussian posterior."""


class BayesConv2d(_BayesConv, nn.Conv2d):
    """`nn.Conv2d` with a Gaussian posterior."""


class BayesConv3d(_BayesConv, nn.Conv3d):
    """`nn.Conv3d` with a Gaussian posterior."""


class _BayesConvTranspose(BayesianLayer, _ConvTransposeNd):
    padding: tuple[int, ...]  # never a string here
    function: ClassVar[Callable[..., Tensor]]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        weight, bias, leaves = self.value("weight"), self.value("bias"), self.active_leaves()
        extra = self._output_padding(
            input,
            output_size,
            list(self.stride),
            list(self.padding),
            list(self.kernel_size),
            weight.dim() - 2,
            list(self.dilation),
        )

        def op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self.function(x, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation)

        if self.perturbation is not None:
            return self._perturbed(self.perturbation, op, input)
        if leaves is None:
            return op(input, weight, bias)
        settings = Settings(self.stride, self.padding, self.dilation, True, tuple(extra), self.groups)
        return curvature.convolution(input, weight, bias, leaves, settings)


class BayesConvTranspose1d(_BayesConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with a Gaussian posterior."""

    function = staticmethod(F.conv_transpose1d)


class BayesConvTranspose2d(_BayesConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with a Gaussian posterior."""

    function = staticmethod(F.conv_transpose2d)


class BayesConvTranspose3d(_BayesConvTranspose, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with a Gaussian posterior."""

    function = staticmethod(F.conv_transpose3d)


# A subclass with a forward of its own may do something else with its weight, which is therefore drawn.
_LINEAR_IN_WEIGHT = (BayesLinear.forward, _BayesConv.forward, _BayesConvTranspose.forward)


def can_draw_output(layer: BayesianLayer) -> bool:
    """Return whether a layer can draw its output in place of its weight: not under a matrix-variate posterior.

    Args:
        layer: Layer in question.
    """
    return type(layer).forward in _LINEAR_IN_WEIGHT and layer.roots is None


class _BayesNorm(BayesianLayer):
    """A normalisation layer, whose scale has prior mean 1: `_normalise` is its op without the affine part."""

    prior_means: ClassVar[Mapping[str, float]] = {"weight": 1.0}
    _normalise: Callable[..., Tensor]  # (input, weight=None, bias=None), each kind of norm has its own

    def forward(self, input: Tensor) -> Tensor:
        weight, bias, leaves = self.value("weight"), self.value("bias"), self.active_leaves()
        if leaves is None or weight is None:
            return self._normalise(input, weight, bias)
        return curvature.affine(self._normalise(input), weight, bias, leaves, self._positions(input))

    def _positions(self, input: Tensor) -> tuple[int, ...]:
        return tuple(range(2, input.dim()))


class _BayesBatchNorm(_BayesNorm, _BatchNorm):
    def _normalise(self, input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        update = self.training and self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        if update and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        keep = update or not self.training
        return F.batch_norm(
            input,
            self.running_mean if keep else None,
            self.running_var if keep else None,
            weight,
            bias,
            self.training or self.running_mean is None,
            momentum,
            self.eps,
        )


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
        mean_square = wide(input).square().mean((2, 3), keepdim=True)
        x_hat = input * (mean_square + self.eps).rsqrt().to(input.dtype)
        if weight is not None:
            x_hat = x_hat * weight[:, None, None]
        return x_hat if bias is None else x_hat + bias[:, None, None]

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class BayesFilterResponseNorm2d(_BayesNorm, FilterResponseNorm2d):
    """`FilterResponseNorm2d` with a Gaussian posterior over scale and shift."""


class BayesEmbedding(BayesianLayer, nn.Embedding):
    """`nn.Embedding` with a Gaussian posterior; takes ids `(n, *)`, dimension 0 running over examples.

    Raises:
        ValueError: With `max_norm`, `scale_grad_by_freq` or `sparse`, which rewrite the table or its
            gradient in ways that no posterior has a meaning for.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(self, option):
                raise ValueError(f"{option} must be off in BayesEmbedding, got {getattr(self, option)}.")

    def forward(self, input: Tensor) -> Tensor:
        weight, leaves = self.value("weight"), self.active_leaves()
        if leaves is None:
            output = F.embedding(input, weight, self.padding_idx)
        else:
            output = curvature.embedding(input, weight, self.padding_idx, leaves)
        if self.padding_idx is None or not self.drawn:
            return output
        # Padding stands for nothing, of which there is no uncertainty: its row is not drawn.
        padding = (input == self.padding_idx).unsqueeze(-1)
        return torch.where(padding, self.weight[self.padding_idx].detach(), output)
