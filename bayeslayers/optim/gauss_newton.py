"""The Gauss-Newton step that VOGN and OGN share: curvature from squared per-example gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bayeslayers.checks import fraction, non_negative, positive
from bayeslayers.curvature.counts import Reduction
from bayeslayers.distributions.gaussian import natural_gradient_step_
from bayeslayers.optim.averages import Recorded, corrected_weight
from bayeslayers.optim.base import VariationalOptimizer
from bayeslayers.optim.bounds import NaturalBounds
from bayeslayers.optim.groups import Rules
from bayeslayers.optim.options import Options
from bayeslayers.readings import Readings
from bayeslayers.sampling import Tracker, layers_with_curvature
from bayeslayers.sampling.placement import placed

RULES: Rules = {
    "lr": non_negative,
    "beta1": fraction,
    "precision_lr": partial(fraction, one=True),
    "temperature": positive,
    "damping": non_negative,
}


class GaussNewton(VariationalOptimizer):
    """The step that VOGN and OGN share."""

    _of_squares = _moves_bundles = _reads_once = True

    def __init__(
        self,
        model: nn.Module,
        dataset_size: int,
        rules: Rules,
        values: Mapping[str, Any],
        options: Options,
        *,
        curvature_fraction: float,
        loss_reduction: Reduction,
        vectorise: bool = False,
    ):
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}.")
        self.loss_reduction = loss_reduction
        self.curvature_fraction = fraction("curvature_fraction", curvature_fraction, one=True)
        self.vectorise, self._at_once = vectorise, 1
        options, self._from_curvature = options.with_precision_from_curvature()
        super().__init__(model, dataset_size, rules, values, options)

    def _prepare(self) -> None:
        super()._prepare()
        self._tracker = Tracker(layers_with_curvature(self._sites.values()), model=self.model)

    @contextmanager
    def _scope(self, noise: Mapping[str, Tensor] | None) -> Iterator[None]:
        with self._draw(noise), self._track():
            yield

    def _track(self) -> AbstractContextManager[Tracker]:
        return self._tracker.track(self.curvature_fraction, self._generator, lambda: self._forwards.place)

    def _needs_place(self) -> bool:
        return self.curvature_fraction < 1

    def _clear_record(self) -> None:
        self._tracker.clear()

    def _record(self) -> Recorded | None:
        examples = self._tracker.examples
        if examples == 0:
            return None
        squares: dict[nn.Parameter, Tensor] = {}
        for parameter, site in self._sites.items():
            leaf = self._tracker.leaves.get(site.name)
            if leaf is not None and leaf.grad is not None:
                squares[parameter] = leaf.grad
            elif parameter.grad is not None:
                raise self._without_its_layer(site)
        # What makes sums over examples and draws, in the units of the loss, means over them.
        seen = self._elements_later(examples)
        if self.loss_reduction == "sum":
            mean = 1 / (seen().examples * self._at_once)
            return Recorded(squares, mean * seen().number / seen().examples, mean)
        draws = self._at_once
        return Recorded(squares, lambda: seen().number / draws, 1 / draws)

    def _run_draws(self, closure: Callable[[], Any]) -> tuple[Any, Any]:
        if not self.vectorise or self.num_samples == 1:
            return super()._run_draws(closure)
        self._at_once, self._losses.batched = self.num_samples, True
        try:
            with torch.enable_grad(), self._recording(self._track):
                losses, outputs = self._run_at_once(closure)
        finally:
            self._at_once, self._losses.batched = 1, False
        return losses.mean(), None if outputs is None else outputs.detach().mean(0)

    def _run_at_once(self, closure: Callable[[], Any]) -> tuple[Tensor, Tensor | None]:
        """Run the closure under all draws by `vmap`, and go backward; return losses and outputs, draws first."""
        if any(isinstance(m, _BatchNorm) and m.training and m.track_running_stats for m in self.model.modules()):
            raise RuntimeError(
                "vectorise must be off for a network whose BatchNorm keeps running statistics, got it on."
            )
        sites = list(self._sites.values())

        def run(*drawn: Tensor) -> tuple[Tensor, ...]:
            with placed(sites, {site.name: value for site, value in zip(sites, drawn, strict=True)}):
                result = closure()
            return result if isinstance(result, tuple) else (result,)

        draws = []
        for _ in range(self.num_samples):
            with self._sampler.draw():
                draws.append([site.value for site in sites])
        stacked = [torch.stack(values) for values in zip(*draws, strict=True)]
        losses, *outputs = torch.func.vmap(run, randomness="different")(*stacked)
        self._note_loss(losses.detach())
        losses.sum().backward()
        return losses.detach(), outputs[0] if outputs else None

    def _bounds(self, group: Mapping[str, Any], readings: Readings) -> NaturalBounds:
        moving = self._bundles(group)
        # The new precision is a mean of the old one and of the prior's, and more.
        least = [precision for each in moving for precision in (each.precision, each.prior_precision)]
        return NaturalBounds(readings, moving, least, [each.statistic for each in moving])

    def _posterior_bound(self, group: dict[str, Any], readings: Readings) -> Callable[[], float]:
        bounds = self._bounds(group, readings)

        def bound() -> float:
            numbers = self._factor() * (bounds.gradient() + bounds.others()[0])
            return numbers + bounds.reach(self._ess(group), group["lr"])

        return bound

    def _posterior_reach(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> float:
        return self._bounds(group, Readings()).reach(self._ess(group), group["lr"])

    def _update(self, group: dict[str, Any]) -> None:
        for bundle in self._bundles(group):
            newest, precision_lr = bundle.count(group["beta1"]), group["precision_lr"]
            if self._from_curvature:
                precision_lr = corrected_weight(precision_lr, self.state[bundle.parameters[0]]["step"])
            numbers = {
                "ess": self._ess(group),
                "lr": group["lr"],
                "precision_lr": precision_lr,
                "damping": group["damping"],
                "curvature_scale": self._averages.scale,
                "clip_radius": group.get("clip_radius", math.inf),
            }
            if bundle.step_by_kernel(newest, **numbers):
                continue
            for piece in bundle.pieces():
                natural_gradient_step_(
                    piece.mean,
                    piece.precision,
                    piece.average(newest),
                    piece.statistic,
                    prior_mean=piece.prior_mean,
                    prior_precision=piece.prior_precision,
                    **numbers,
                )
                piece.write()
