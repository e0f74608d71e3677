"""Uncertain parameters that move together in a step, or a piece of a large one."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayeslayers.curvature.kernels.step import Moving, retract_, step_
from bayeslayers.distributions.gaussian import retracted_precision
from bayeslayers.optim.averages import corrected_weight
from bayeslayers.sampling import Site
from bayeslayers.sampling.flat import Scratch, filled

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

    @functools.cached_property
    def mean(self) -> Tensor:
        return self._gathered("mean", self.parameters)

    @functools.cached_property
    def precision(self) -> Tensor:
        return self._gathered("precision", [site.precision for site in self.sites])

    @functools.cached_property
    def prior_mean(self) -> Tensor:
        return self._filled("prior mean", [site.prior_mean for site in self.sites])

    @functools.cached_property
    def prior_precision(self) -> Tensor:
        return self._filled("prior precision", [site.prior_precision for site in self.sites])

    @functools.cached_property
    def grad(self) -> Tensor:
        return self._gathered("grad", [cast(Tensor, p.grad) for p in self.parameters])

    @functools.cached_property
    def statistic(self) -> Tensor:
        return self._gathered("statistic", [self._statistics[p] for p in self.parameters])

    @functools.cached_property
    def momenta(self) -> list[Tensor]:
        """What the gradients have been averaged to: one tensor, or those that are there if some parameter has none."""
        averages = [own["momentum"] for p in self.parameters if "momentum" in (own := self._state.get(p, {}))]
        return [self._gathered("momentum", averages)] if len(averages) == len(self.parameters) else averages

    def count(self, beta1: float) -> float | None:
        """Count a step; return the weight of its gradients in their averages, None without momentum.

        Args:
            beta1: Momentum.
        """
        states = [self._state[p] for p in self.parameters]
        for state in states:
            state["step"] = state.get("step", 0) + 1
        if beta1 == 0:
            return None
        for state, parameter in zip(states, self.parameters, strict=True):
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
                self.__dict__.pop("momenta", None)
        return corrected_weight(1 - beta1, states[0]["step"])

    def average(self, newest: float | None) -> Tensor:
        """Return the averages of the gradients with those of this step, see `adam.momentum_average`.

        Args:
            newest: What `count` returned.
        """
        if newest is None:
            return self.grad
        self.momenta[0].lerp_(self.grad, newest)
        self._write_momentum()
        return self.momenta[0]

    def step_by_kernel(self, newest: float | None, **numbers: Any) -> bool:
        """Move mean, precision and momentum by a kernel; return False where none can run.

        Args:
            newest: What `count` returned.
            **numbers: As for `kernels.step.step_`.
        """
        before = None if newest is None else self.momenta[0]
        tensors = self.grad, self.statistic, self.prior_mean, self.prior_precision
        moving = Moving(self.mean, self.precision, before, *tensors)
        if not step_(moving, newest=1.0 if newest is None else newest, **numbers):
            return False
        if newest is not None:
            self._write_momentum()
        self.write()
        return True

    def new_precision(self, factor: float, weight: float, of_root: bool) -> Tensor:
        """Return the precision retracted towards the prior's and the statistic, in whose place it stands then.

        Args:
            factor: Of the statistic.
            weight: Of this target, see `gaussian.retracted_precision`.
            of_root: Whether the root of the precision is a factor of the statistic too.
        """
        numbers = {"factor": factor, "weight": weight, "of_root": of_root}
        if not retract_(self.precision, self.statistic, self.prior_precision, **numbers):
            for piece in self.pieces():
                target = piece.statistic.mul_(piece.precision.sqrt()) if of_root else piece.statistic
                torch.add(piece.prior_precision, target, alpha=factor, out=target)
                retracted_precision(piece.precision, target, weight)
        return self.statistic

    def _filled(self, name: str, values: Sequence[Tensor]) -> Tensor:
        """Return values that broadcast against the parameters, as they broadcast against `mean`."""
        if values[0].dim() > 0 or len(values) == 1:
            return values[0] if values[0].dim() == 0 else self._gathered(name, values)
        if values[0].device.type != "cpu":  # a launch for each value
            return filled(values, self.parameters)
        return self._scratch.gather((name, self.parameters[0]), values, self.parameters)

    def write(self) -> None:
        """Write back the mean and the precision, which have been changed in place."""
        self._write("mean", self.parameters)
        self._write("precision", [site.precision for site in self.sites])

    def _write_momentum(self) -> None:
        self._write("momentum", [self._state[p]["momentum"] for p in self.parameters])

    def _gathered(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """Return tensors of the parameters' shapes, one for each, as the bundle has its own."""
        if self.piece is not None:
            return tensors[0].view(-1)[self.piece]
        return self._scratch.gather((name, self.parameters[0]), tensors)

    def _write(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Write back what `_gathered` returned."""
        self._scratch.scatter((name, self.parameters[0]), tensors)

    def pieces(self) -> list[Bundle]:
        """Return the pieces of a large parameter whose tensors lie in memory in one order, else the bundle itself."""
        (parameter, *others), (site, *_) = self.parameters, self.sites
        if others:
            return [self]
        tensors = [parameter, parameter.grad, self._statistics.get(parameter), site.precision]
        tensors += [site.prior_mean, site.prior_precision, *self._state.get(parameter, {}).values()]
        sites, places = {parameter: site}, _places([x for x in tensors if isinstance(x, Tensor)])
        return [
            Bundle(self.parameters, sites, self._statistics, self._state, self._scratch, place) for place in places
        ] or [self]


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield parts of tensors that stay in a cache together: of large ones on a CPU that lie in memory in one order.

    Args:
        tensors: Tensors of one shape, and single numbers.
    """
    if not (places := _places(list(tensors.values()))):
        yield dict(tensors)
        return
    flat = {name: x.detach().view(-1) for name, x in tensors.items()}
    for place in places:
        yield {name: x[place] if len(x) > 1 else x[0] for name, x in flat.items()}


def _places(tensors: Sequence[Tensor]) -> list[slice]:
    """Return where to cut tensors of one shape, and single numbers; nothing where they are to stay whole.

    On a GPU they are: it has no cache for pieces, and each would be a launch of every op.
    """
    size = max(x.numel() for x in tensors)
    in_order = all(x.numel() in (1, size) and x.is_contiguous() and x.device.type == "cpu" for x in tensors)
    return [slice(start, start + _PIECE) for start in range(0, size, _PIECE)] if size > _PIECE and in_order else []
