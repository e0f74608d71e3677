"""Uncertain parameters that move together in a step, or a piece of a large one."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayeslayers.optim.averages import corrected_weight
from bayeslayers.sampling import Site
from bayeslayers.sampling.flat import Scratch, filled, gather

_PIECE = 2**16  # values: with the operands of a step they stay in a cache


class Bundle:
    """Uncertain parameters that move together, their tensors gathered when they are first asked for.

    Args:
        parameters: The parameters: one, or small ones of one kind.
        sites: Their sites.
        statistics: Statistics of the step by parameter.
        state: What the optimiser keeps of each parameter.
        scratch: Memory for what moves.
        piece: Entries of a lone contiguous parameter, flat; None for all.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        sites: Mapping[Any, Site],
        statistics: Mapping[Any, Tensor],
        state: Mapping[Any, dict[str, Any]],
        scratch: Scratch,
        piece: slice | None = None,
    ) -> None:
        self.parameters = parameters
        self.piece = piece
        self.sites = [sites[p] for p in parameters]
        self._statistics = statistics
        self._state = state
        self._scratch = scratch

    def gathered(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return tensors of the parameters' shapes, one for each, as the bundle has its own."""
        return gather(tensors) if self.piece is None else tensors[0].view(-1)[self.piece]

    @functools.cached_property
    def mean(self) -> Tensor:
        return self._moving("mean", self.parameters)

    @functools.cached_property
    def precision(self) -> Tensor:
        return self._moving("precision", [site.precision for site in self.sites])

    @functools.cached_property
    def prior_mean(self) -> Tensor:
        return self._filled([site.prior_mean for site in self.sites])

    @functools.cached_property
    def prior_precision(self) -> Tensor:
        return self._filled([site.prior_precision for site in self.sites])

    @functools.cached_property
    def grad(self) -> Tensor:
        return self.gathered([cast(Tensor, p.grad) for p in self.parameters])

    @functools.cached_property
    def statistic(self) -> Tensor:
        return self.gathered([self._statistics[p] for p in self.parameters])

    @functools.cached_property
    def momenta(self) -> list[Tensor]:
        """What the gradients have been averaged to: one tensor, or those that are there if some parameter has none."""
        averages = [own["momentum"] for p in self.parameters if "momentum" in (own := self._state.get(p, {}))]
        return [self._moving("momentum", averages)] if len(averages) == len(self.parameters) else averages

    def average(self, beta1: float) -> Tensor:
        """Count a step of the parameters, and return the averages of their gradients; see `adam.momentum_average`."""
        states = [self._state[p] for p in self.parameters]
        if self.piece is None or self.piece.start == 0:
            for state in states:
                state["step"] = state.get("step", 0) + 1
        if beta1 == 0:
            return self.grad
        for state, parameter in zip(states, self.parameters, strict=True):
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
                self.__dict__.pop("momenta", None)
        (average,) = self.momenta
        average.lerp_(self.grad, corrected_weight(1 - beta1, states[0]["step"]))
        self._write("momentum", [state["momentum"] for state in states])
        return average

    def _filled(self, values: Sequence[Tensor]) -> Tensor:
        """Return values that broadcast against the parameters, as they broadcast against `mean`."""
        return filled(values, self.parameters) if self.piece is None or values[0].dim() == 0 else self.gathered(values)

    def write(self) -> None:
        """Write back the mean and the precision, which have been changed in place."""
        self._write("mean", self.parameters)
        self._write("precision", [site.precision for site in self.sites])

    def _moving(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """Return `gathered` tensors that an op will change in place."""
        if self.piece is not None:
            return self.gathered(tensors)
        return self._scratch.gather((name, self.parameters[0]), tensors)

    def _write(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Write back what `_moving` returned."""
        self._scratch.scatter((name, self.parameters[0]), tensors)

    def pieces(self) -> list[Bundle]:
        """Return the pieces of a large parameter whose tensors lie in memory in one order, else the bundle itself."""
        (parameter, *others), (site, *_) = self.parameters, self.sites
        size = parameter.numel()
        if others or size <= _PIECE:
            return [self]
        tensors = [parameter, parameter.grad, self._statistics.get(parameter), site.precision]
        tensors += [site.prior_mean, site.prior_precision, *self._state.get(parameter, {}).values()]
        if not all(x.numel() in (1, size) and x.is_contiguous() for x in tensors if isinstance(x, Tensor)):
            return [self]
        sites, places = {parameter: site}, [slice(i, i + _PIECE) for i in range(0, size, _PIECE)]
        return [Bundle(self.parameters, sites, self._statistics, self._state, self._scratch, place) for place in places]


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield parts of tensors that stay in a cache together: of large ones on a CPU that lie in memory in one order.

    Args:
        tensors: Tensors of one shape, and single numbers.
    """
    size = max(x.numel() for x in tensors.values())
    in_order = all(x.numel() in (1, size) and x.is_contiguous() and x.device.type == "cpu" for x in tensors.values())
    if size <= _PIECE or not in_order:
        yield dict(tensors)
        return
    flat = {name: x.detach().view(-1) for name, x in tensors.items()}
    for start in range(0, size, _PIECE):
        yield {name: x[start : start + _PIECE] if len(x) > 1 else x[0] for name, x in flat.items()}
