"""Layers whose output is linear in their weight: linear maps, convolutions and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bayeslayers import curvature
from bayeslayers.curvature.accumulate import Leaves
from bayeslayers.curvature.settings import Settings
from bayeslayers.layers.base import BayesianLayer
from bayeslayers.layers.perturbation import Op, Perturbation


class BayesLinear(BayesianLayer, nn.Linear):
    """`nn.Linear` with a Gaussian posterior; takes `(*, in_features)`, dimension 0 running over examples."""

    rule = curvature.LINEAR

    def forward(self, input: Tensor) -> Tensor:
        tensors, leaves, perturbation = self.operands()
        if perturbation is not None:
            return _drawn_output(perturbation, F.linear, input, tensors, leaves)
        if leaves is None:
            return F.linear(input, *tensors)
        return self.rule((input,), tensors, leaves)


class _BayesConv(BayesianLayer, _ConvNd):
    """A convolution: the op itself is torch's, with the drawn weight in place of the mean."""

    rule = curvature.CONVOLUTION

    def forward(self, input: Tensor) -> Tensor:
        tensors, leaves, perturbation = self.operands()
        if perturbation is not None:
            return _drawn_output(perturbation, self._conv_forward, input, tensors, leaves)
        if leaves is None:
            return self._conv_forward(input, *tensors)
        input, padding = self._zero_padded(input)
        settings = Settings(self.stride, padding, self.dilation, False, (0,) * len(padding), self.groups)
        return self.rule((input,), tensors, leaves, settings)

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
    rule = curvature.CONVOLUTION
    padding: tuple[int, ...]  # never a string here
    function: ClassVar[Callable[..., Tensor]]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        tensors, leaves, perturbation = self.operands()
        extra = self._output_padding(
            input,
            output_size,
            list(self.stride),
            list(self.padding),
            list(self.kernel_size),
            len(self.kernel_size),
            list(self.dilation),
        )

        def op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self.function(x, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation)

        if perturbation is not None:
            return _drawn_output(perturbation, op, input, tensors, leaves)
        if leaves is None:
            return op(input, *tensors)
        settings = Settings(self.stride, self.padding, self.dilation, True, tuple(extra), self.groups)
        return self.rule((input,), tensors, leaves, settings)


class BayesConvTranspose1d(_BayesConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with a Gaussian posterior."""

    function = staticmethod(F.conv_transpose1d)


class BayesConvTranspose2d(_BayesConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with a Gaussian posterior."""

    function = staticmethod(F.conv_transpose2d)


class BayesConvTranspose3d(_BayesConvTranspose, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with a Gaussian posterior."""

    function = staticmethod(F.conv_transpose3d)


REWRITING = ("max_norm", "scale_grad_by_freq", "sparse")  # options by which a table, or its gradient, is rewritten


def refuse_rewriting(table: nn.Embedding | nn.EmbeddingBag, name: str) -> None:
    """Raise if an option of a table of embeddings rewrites it, or its gradient.

    Args:
        table: The layer.
        name: Its class, for the message.
    """
    for option in REWRITING:
        if getattr(table, option):
            raise ValueError(f"{option} must be off in {name}, got {getattr(table, option)}.")


class BayesEmbedding(BayesianLayer, nn.Embedding):
    """`nn.Embedding` with a Gaussian posterior; takes ids `(n, *)`, dimension 0 running over examples.

    Raises:
        ValueError: With `max_norm`, `scale_grad_by_freq` or `sparse`, which rewrite the table or its
            gradient in ways that no posterior has a meaning for.
    """

    rule = curvature.EMBEDDING

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        refuse_rewriting(self, "BayesEmbedding")

    def forward(self, input: Tensor) -> Tensor:
        return self.compute(input, settings=self.padding_idx)


def _drawn_output(
    perturbation: Perturbation, op: Op, input: Tensor, means: tuple[Any, Any], leaves: Leaves | None
) -> Tensor:
    """Return a drawn output of a layer, whose op and means are given: no weight of it is drawn."""
    if leaves is not None:
        raise RuntimeError(
            f"curvature must be tracked under estimator='weights', got {perturbation.estimator!r}: it squares "
            "per-example gradients at one draw of the weights."
        )
    return perturbation(op, input, *means)


# A subclass with a forward of its own may do something else with its weight, which is therefore drawn.
_DRAW_THEIR_OUTPUT = (BayesLinear.forward, _BayesConv.forward, _BayesConvTranspose.forward)


def can_draw_output(layer: BayesianLayer) -> bool:
    """Return whether a layer can draw its output in place of its weight: not where its weights are correlated.

    Args:
        layer: Layer in question.
    """
    return type(layer).forward in _DRAW_THEIR_OUTPUT and not layer.correlations
