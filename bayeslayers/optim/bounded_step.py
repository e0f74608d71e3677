"""What a step moves together, and bounds on the numbers that it makes, before it makes them."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from bayeslayers.optim.bounds import adam_ratio, is_harmless, magnitudes
from bayeslayers.optim.bundle import Bundle
from bayeslayers.optim.shared_step import SharedStep
from bayeslayers.readings import Readings
from bayeslayers.sampling.flat import bundles, joined


class BoundedStep(SharedStep, abc.ABC):
    """Base of optimisers that look at a step before they make it. It is built as `SharedStep`."""

    _moves_bundles: ClassVar[bool] = False  # each tensor has a statistic in its shape; small ones move together

    def _reach(self, group: dict[str, Any]) -> float:
        """Return a bound on what the coming step makes of a group; infinite if none is at hand."""
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return 0.0
        if group["kind"] == "bayesian":
            return self._posterior_reach(group, parameters)
        return magnitudes(Readings(), parameters)()[0] + group["lr"] * adam_ratio(group["beta1"], group["beta2"])

    def _bound(self, group: dict[str, Any], readings: Readings) -> Callable[[], float]:
        """Return what will bound all numbers that a group's step makes, gradients and statistics times N/T included."""
        if all(p.grad is None for p in group["params"]):
            return lambda: 0.0
        return (self._posterior_bound if group["kind"] == "bayesian" else self._adam_bound)(group, readings)

    def _posterior_bound(self, group: dict[str, Any], readings: Readings) -> Callable[[], float]:
        """Return that of uncertain parameters; infinite if none is at hand."""
        return lambda: math.inf

    def _adam_bound(self, group: dict[str, Any], readings: Readings) -> Callable[[], float]:
        parameters = [p for p in group["params"] if p.grad is not None]
        found = magnitudes(readings, parameters, [p.grad for p in parameters if p.grad is not None])
        move = group["lr"] * adam_ratio(group["beta1"], group["beta2"])
        return lambda: found()[0] + move + self._factor() * found()[1]

    def _foresee(self) -> None:
        """Compute bounds on the numbers of the coming step, which are read from the device together with the loss."""
        if self._reads_once and self._foreseen is None and self._averages.draws > 0:
            self._foreseen = [self._bound(group, self._readings) for group in self.param_groups]

    def _is_foreseen_harmless(self) -> bool:
        """Return whether all numbers of the step are far inside the range of floating-point numbers, so also finite."""
        self._foresee()
        pairs = zip(self._foreseen or (), self.param_groups, strict=False)
        return self._foreseen is not None and all(is_harmless(bound(), group["params"]) for bound, group in pairs)

    def _posterior_reach(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> float:
        """Return the bound for uncertain parameters with gradients."""
        return math.inf

    def _factor(self) -> float:
        """Return how much larger what the step adds to the precision is: it must be finite too."""
        return max(self._ess(group) for group in self.param_groups) * max(1.0, self._averages.scale)

    def _numbers(self, grads: Mapping[nn.Parameter, Tensor]) -> list[Tensor]:
        """Return tensors with the entries of all gradients and statistics: those that the step gathers, if it does."""
        if not self._moves_bundles:
            return joined([*grads.values(), *self._averages.statistics.values()])
        bundles = [each for group in self.param_groups if group["kind"] == "bayesian" for each in self._bundles(group)]
        others = [grad for parameter, grad in grads.items() if parameter not in self._sites]
        return [*(x for each in bundles for x in (each.grad, each.statistic)), *joined(others)]

    def _bundles(self, group: Mapping[str, Any]) -> list[Bundle]:
        """Return the uncertain parameters of a group that move in the step: small ones together, large ones alone."""
        key = id(group["params"])
        if key not in self._bundled:
            moving = bundles([p for p in group["params"] if p.grad is not None], lambda p: p, self._kind)
            statistics = self._averages.statistics
            self._bundled[key] = [Bundle(own, self._sites, statistics, self.state, self._scratch) for own in moving]
        return self._bundled[key]

    def _kind(self, parameter: nn.Parameter) -> tuple[Any, ...]:
        """Return what the uncertain parameters of a bundle have in common."""
        site, step = self._sites[parameter], self.state.get(parameter, {}).get("step", 0)
        return parameter.dtype, parameter.device, step, site.prior_mean.dim(), site.prior_precision.dim()

    def _forget(self) -> None:
        super()._forget()
        self._drop_bundles()

    def _drop_bundles(self) -> None:
        self._bundled: dict[int, list[Bundle]] = {}  # by group, of the step that is being made
        self._foreseen: list[Callable[[], float]] | None = None  # bounds for each group
