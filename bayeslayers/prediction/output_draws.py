"""Samples of layers' outputs in place of their weights, one after the other or several at once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.func import vmap

from bayeslayers.curvature.kernels.draw import StandardNormal
from bayeslayers.dtypes import at_least_float32, full_precision
from bayeslayers.layers import BayesianLayer, can_draw_output
from bayeslayers.layers.perturbation import LocalReparameterization, Op, Perturbation
from bayeslayers.sampling import Site

Moments = tuple[Tensor, Tensor]

_GROUPED = 4  # examples up to which a grouped convolution is faster


class NotOncePerExampleError(RuntimeError):
    """A layer has run twice, or on other rows than one for each example."""


class Outputs(Protocol):
    """The distribution of a layer's outputs, given its input.

    Attributes:
        rows: Examples of the batch; the layer must then run once, on one row for each. None allows anything.
    """

    rows: int | None

    def moments(self, op: Op, input: Tensor, weight: Tensor, bias: Tensor | None) -> Moments:
        """Return mean and standard deviation of the output's entries."""
        ...


class AnyOutputs:
    """The distribution of local reparameterisation, whatever rows a layer runs on.

    Args:
        deviations: Standard deviations by "weight" and "bias".
    """

    rows: int | None = None

    def __init__(self, deviations: Mapping[str, Tensor]):
        local = LocalReparameterization("local", None)
        local.values.update(deviations)
        self.moments = local.moments


class OncePerExample:
    """The exact distribution of a linear layer's outputs on `(n, i)`, for one batch.

        N(x m^T + m_b, x^2 v^T + v_b)

    Args:
        variances: Variances by "weight" and "bias".
        rows: Examples n.
        keep: Keep the moments for as long as the input repeats, as the first layer's does from sample to sample.
    """

    def __init__(self, variances: Mapping[str, Tensor], rows: int, keep: bool):
        self.variances, self._keep = variances, keep
        self.rows: int | None = rows
        self._kept: tuple[Tensor, int, Moments] | None = None  # an input, its version, its moments

    def moments(self, op: Op, input: Tensor, weight: Tensor, bias: Tensor | None) -> Moments:
        if not self._keep or is_batchedtensor(input):
            return self._moments(op, input, weight, bias)
        if self._kept is None or not _is_same(*self._kept[:2], input):
            self._kept = input, _version(input), self._moments(op, input, weight, bias)
        return self._kept[2]

    def _moments(self, op: Op, input: Tensor, weight: Tensor, bias: Tensor | None) -> Moments:
        with full_precision(input.device.type):
            square = op(at_least_float32(input).square(), self.variances["weight"], self.variances.get("bias"))
        return op(input, weight, bias), square.sqrt()


def _version(x: Tensor) -> int:
    """Return what grows when a tensor is changed in place; -1 where nobody counts."""
    return -1 if x.is_inference() else x._version


def _is_same(old: Tensor, version: int, new: Tensor) -> bool:
    """Return whether a tensor still has the values of a version of another; where both share memory, by no read."""
    if _version(old) != version:
        return False
    if type(old) is type(new) is Tensor and old.data_ptr() == new.data_ptr() != 0:
        if (old.shape, old.stride(), old.dtype, old.device) == (new.shape, new.stride(), new.dtype, new.device):
            return True
    return torch.equal(old, new)


class DrawnOutput(Perturbation):
    """The sampled output of one layer in one forward pass.

    Args:
        outputs: What the output is distributed as.
        generator: Source of the noise; torch's default one if None.
        draw: Any tensor that `vmap` maps over the samples; None for one sample without `vmap`.
    """

    def __init__(self, outputs: Outputs, generator: torch.Generator | None, draw: Tensor | None):
        super().__init__("local", generator)
        self._outputs, self._draw, self._called = outputs, draw, False

    def __call__(self, op: Op, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._outputs.rows is not None:
            if self._called or input.shape[:-1] != (self._outputs.rows,):
                raise NotOncePerExampleError
            self._called = True
        mean, deviation = self._outputs.moments(op, input, weight, bias)
        if self._draw is None:
            return _noisy(mean, deviation, deviation.shape, self.generator)
        return _Noisy.apply(mean, deviation, self._draw, self.generator)


def _noisy(mean: Tensor, deviation: Tensor, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    noise = StandardNormal(generator).fill_(deviation.new_empty(shape))
    if mean.dtype == deviation.dtype:
        return torch.addcmul(mean, noise, deviation, out=noise)
    return mean + (noise * deviation).to(mean.dtype)


class _Noisy(torch.autograd.Function):
    """`mean + noise * deviation`, an autograd function because its `vmap` rule receives plain tensors."""

    @staticmethod
    def forward(mean: Tensor, deviation: Tensor, draw: Tensor, generator: torch.Generator | None) -> Tensor:
        raise AssertionError("runs only under vmap")

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass  # no gradient flows

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[int | None], mean: Tensor, deviation: Tensor, draw: Tensor, generator: Any
    ) -> tuple[Tensor, int]:
        mean, deviation = (
            part if dim is None else part.movedim(dim, 0)
            for part, dim in zip((mean, deviation), in_dims[:2], strict=True)
        )
        shape = deviation.shape if in_dims[1] is not None else (info.batch_size, *deviation.shape)
        return _noisy(mean, deviation, shape, generator), 0


class EachWeight(Perturbation):
    """Runs a layer with the sampled weights of each sample, where `vmap` would make one grouped convolution of them.

    A grouped convolution is faster for a few examples only: measured on one CPU core with 3x3 and 5x5 kernels, 1 to 64
    channels. Where the input is the same for all samples, it is an ordinary one with more output channels, and faster
    than one after the other.
    """

    def __init__(self) -> None:
        super().__init__("weights", None)

    def __call__(self, op: Op, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _Each.apply(op, input, weight, bias)


class _Each(torch.autograd.Function):
    @staticmethod
    def forward(op: Op, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return op(input, weight, bias)

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass  # no gradient flows

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], op: Op, *tensors: Any) -> tuple[Tensor, int]:
        dims, columns = in_dims[1:], []
        for part, dim in zip(tensors, dims, strict=True):
            columns.append(itertools.repeat(part, info.batch_size) if dim is None else part.movedim(dim, 0))
        if dims[0] is None or dims[1] is None or len(columns[0][0]) <= _GROUPED:
            return vmap(op, tuple(dims))(*tensors), 0
        return torch.stack([op(*own) for own in zip(*columns, strict=True)]), 0


def layers_that_draw(sites: Sequence[Site]) -> dict[BayesianLayer, dict[str, Site]]:
    """Return the sites of the layers that can sample their outputs, and that share no weight, as in `Sampler`.

    Args:
        sites: All sites of a model.
    """
    tied = {module for site in sites if len(site.places) > 1 for module, _ in site.places}
    found: dict[BayesianLayer, dict[str, Site]] = {}
    for site in sites:
        if isinstance(site.module, BayesianLayer) and can_draw_output(site.module) and site.module not in tied:
            found.setdefault(site.module, {})[site.key] = site
    return found


def local_outputs(sites: Sequence[Site]) -> Mapping[Any, Outputs]:
    """Return the outputs' distributions of all layers that can sample them.

    Args:
        sites: All sites of a model.
    """
    return {
        layer: AnyOutputs({key: site.deviation for key, site in own.items()})
        for layer, own in layers_that_draw(sites).items()
    }
