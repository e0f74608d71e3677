"""The step with Kronecker factors of the Fisher: it moves a layer's matrix, and leaves a matrix-variate posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bayeslayers.checks import at_least_one
from bayeslayers.distributions.gaussian import natural_gradient_step_
from bayeslayers.distributions.low_rank import between
from bayeslayers.distributions.matrix_gaussian import as_matrix, leading_root, marginal_precision
from bayeslayers.dtypes import at_least_float32
from bayeslayers.layers import BayesianLayer
from bayeslayers.layers.correlated import multiplying
from bayeslayers.optim.adam import momentum_average
from bayeslayers.optim.averages import corrected_weight
from bayeslayers.optim.bounds import magnitudes, smallest
from bayeslayers.optim.dense import DenseBlock
from bayeslayers.optim.drawn_roots import DrawnRoots, kept
from bayeslayers.optim.factors import FACTORS, averaged, inverse_in, inverses, starting_share
from bayeslayers.optim.fisher import INPUT, OUTPUT, FisherOptimizer, interval
from bayeslayers.optim.matrix_prior import MatrixPrior
from bayeslayers.readings import Readings
from bayeslayers.sampling import Site


class KroneckerFactored(FisherOptimizer):
    """The step that K-FAC and Noisy K-FAC share."""

    _keeps_roots: ClassVar[bool] = True
    _reads_once: ClassVar[bool] = True

    def _prepare(self) -> None:
        super()._prepare()
        self._priors: dict[BayesianLayer, MatrixPrior | None] = {}
        self._drawn_roots = DrawnRoots()

    @contextmanager
    def _draw(self, noise: Mapping[str, Tensor] | None) -> Iterator[None]:
        with multiplying(self._drawn_roots.of(self._sites.values(), self.state)), super()._draw(noise):
            yield

    def _forget(self) -> None:
        super()._forget()
        self._curvatures: dict[Any, dict[str, Any]] = {}  # what the step that is being made changes of layers' states

    def _plan(self) -> None:
        """Compute inverses and roots of all layers: a factor may have none."""
        self._curvatures = {
            parameter: self._curvature(self._sites[parameter], group)
            for group in self.param_groups
            if group["kind"] == "bayesian"
            for parameter in group["params"]
            if parameter.grad is not None and self._is_weight_with_factors(parameter)
        } | {block.sites[0].mean: self._dense_curvature(block, group) for block, group in self._moving_blocks()}

    def _moving_blocks(self) -> Iterator[tuple[DenseBlock, dict[str, Any]]]:
        """Yield the dense blocks with gradients, and their groups."""
        for group in self.param_groups:
            for parameter in group["params"]:
                block = self._blocks.get(parameter)
                if (
                    block is not None
                    and block.is_whole
                    and parameter is block.sites[0].mean
                    and parameter.grad is not None
                ):
                    yield block, group

    def _is_weight_with_factors(self, parameter: nn.Parameter) -> bool:
        return self._sites[parameter].key == "weight" and self._has_factors(self._sites[parameter])

    def _has_factors(self, site: Site) -> bool:
        """Whether a tensor's curvature is in the factors of its layer's weight, which are not those of a frozen one."""
        layer: Any = site.module
        if not isinstance(layer, BayesianLayer) or layer.factor_sizes() is None or site.mean in self._blocks:
            return False
        return layer.get_parameter("weight").requires_grad

    def _curvature(self, site: Site, group: dict[str, Any]) -> dict[str, Any]:
        """Return what this step changes in the state of a weight's factors, with the roots of the posterior.

        Nothing is changed yet: a factor without an inverse refuses the step of all layers.
        """
        layer: Any = site.module
        state = self.state.get(site.mean, {})
        new: dict[str, Any] = {key: state[key] for key in ("updates", "input", "output", "start") if key in state}
        statistics = self._averages.statistics
        if site.name + INPUT in statistics:
            found = statistics[site.name + INPUT], statistics[site.name + OUTPUT]
            if is_new := "input" not in new or new["input"].shape != found[0].shape:
                new["start"] = 0.0 if self._from_curvature else starting_share(site, found[0], self._ess(group))
            new = averaged({"start": new["start"]} if is_new else new, found, group["factor_lr"])
        if "input" in new and self._is_due(state, "input_inverse", new["input"]):
            rest = new["start"] * (1 - group["factor_lr"]) ** new["updates"]
            factors = new["input"], new["output"] + rest * torch.eye(len(new["output"])).to(new["output"])
            prior = self._matrix_prior(layer, len(new["input"]))
            options = group["damping"], self.inverse_tolerance, state, self._sampling_counterpart is None
            new |= inverses(site, factors, prior, self._ess(group), *options)
            new["inverse_step"] = state.get("step", 0) + 1
        return new

    def _dense_curvature(self, block: DenseBlock, group: dict[str, Any]) -> dict[str, Any]:
        """Return what this step changes in the state of a dense block, with the root of the posterior."""
        state, ess = self.state.get(block.sites[0].mean, {}), self._ess(group)
        new: dict[str, Any] = {key: state[key] for key in ("updates", "block", "start") if key in state}
        if (found := self._averages.statistics.get(block.statistic)) is not None:
            new = block.averaged(new, found, group["factor_lr"], ess, not self._from_curvature)
        if "block" in new and self._is_due(state, "inverse", new["block"]):
            new |= block.solved(new, group["factor_lr"], ess, group["damping"])
            new["inverse_step"] = state.get("step", 0) + 1
        return new

    def _matrix_prior(self, layer: BayesianLayer, inputs: int) -> MatrixPrior | None:
        """Return a layer's matrix-variate prior, which is inverted once."""
        self._priors[layer] = MatrixPrior.of(layer, inputs, self._priors.get(layer))
        return self._priors[layer]

    def _is_due(self, state: Mapping[str, Any], inverse: str, curvature: Tensor) -> bool:
        """Whether inverses are to be computed in the coming step of a layer, of which the state holds one so named."""
        if "inverse_step" not in state or len(state[inverse]) != len(curvature):
            return True
        step, every = state["step"] + 1, self.inverse_every
        due = every(step) if callable(every) else interval(every, step)
        return step - state["inverse_step"] >= at_least_one(f"inverse_every({step})", due)

    def _update(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            site, block = self._sites[parameter], self._blocks.get(parameter)
            if block is not None and block.is_whole:
                if site is block.sites[0]:
                    self._update_block(block, group)
            elif not self._has_factors(site):
                self._update_diagonal(site, group)
            elif site.key == "weight":
                self._update_matrix(site, group)

    def _update_matrix(self, site: Site, group: dict[str, Any]) -> None:
        """Move a layer's matrix by its gradient, the prior's in it, between the inverse factors."""
        layer: Any = site.module
        state = self.state[site.mean]
        new = self._curvatures.pop(site.mean) if site.mean in self._curvatures else self._curvature(site, group)
        roots = new.pop("roots", None)
        state.update(new)
        if roots is not None and self._sampling_counterpart is None:
            state.update(kept(roots))
        if "input_inverse" not in state:  # the layer's first statistics are still to come
            return
        columns = site.mean.shape[1:].numel()
        sites = [site, self._sites[layer.bias]] if len(state["input"]) > columns else [site]
        parts = (slice(columns), slice(columns, None))
        inputs, outputs = (inverse_in(state, name) for name in FACTORS)
        step = between(outputs, self._gradient_matrix(sites, parts, group), inputs)
        whole = [root.whole() for root in roots or ()]
        precision = marginal_precision(*whole) if whole else None
        for each, part in zip(sites, parts, strict=False):
            each.mean.sub_(step[:, part].view(each.mean.shape), alpha=group["lr"])
            if precision is not None:
                each.precision.copy_(precision[:, part].view(each.mean.shape))
        if whole:
            layer.set_roots(*(root.to(site.mean.dtype) for root in whole))

    def _update_block(self, block: DenseBlock, group: dict[str, Any]) -> None:
        """Move all entries of a layer by their gradient, the prior's in it, times the inverse of the curvature."""
        state = self.state[block.sites[0].mean]
        new = self._curvatures.pop(block.sites[0].mean, {})
        root = new.pop("root", None)
        state.update(new)
        if "inverse" not in state:  # the layer's first statistics are still to come
            return
        gradient = torch.cat([at_least_float32(self._gradient(site, group)).flatten() for site in block.sites])
        gradient = gradient + block.pull() / self._ess(group)
        block.move(-group["lr"] * (at_least_float32(state["inverse"]) @ gradient), root)

    def _gradient(self, site: Site, group: dict[str, Any]) -> Tensor:
        """Return the momentum average of the loss's gradient."""
        state = self.state[site.mean]
        state["step"] = state.get("step", 0) + 1
        grad = torch.zeros_like(site.mean) if site.mean.grad is None else site.mean.grad
        return momentum_average(state, grad, group["beta1"])

    def _gradient_matrix(self, sites: Sequence[Site], parts: Sequence[slice], group: dict[str, Any]) -> Tensor:
        """Return the gradient of a layer's matrix, over ess that of the prior's minus log density in it."""
        layer: Any = sites[0].module
        ess, inputs = self._ess(group), sum(site.mean[0].numel() for site in sites)
        gradients = [at_least_float32(self._gradient(site, group)) for site in sites]
        differences = [at_least_float32(site.mean - site.prior_mean) for site in sites]
        if (prior := self._matrix_prior(layer, inputs)) is not None:
            return as_matrix(*gradients) + prior.pull(as_matrix(*differences)) / ess
        matrix = gradients[0].new_empty(len(gradients[0]), inputs)
        for site, part, gradient, difference in zip(sites, parts, gradients, differences, strict=False):
            out = matrix[:, part].view(gradient.shape)
            torch.addcmul(gradient, difference, at_least_float32(site.prior_precision), value=1 / ess, out=out)
        return matrix

    def _posterior_bound(self, group: dict[str, Any], readings: Readings) -> Callable[[], float]:
        sites = [self._sites[parameter] for parameter in group["params"] if parameter.grad is not None]
        states = [self.state.get(site.mean, {}) for site in sites]
        if self._moves_curvature(sites):
            return lambda: math.inf
        # Gradients of the prior are in the bound of the step; a bound on an inverse is its norm, and 1/p of a diagonal.
        pairs = [[inverse_in(state, name) for state in states if f"{name}_inverse" in state] for name in FACTORS]
        found = magnitudes(
            readings,
            [site.mean for site in sites],
            [site.prior_mean for site in sites],
            [site.prior_precision for site in sites],
            [
                x
                for s, state in zip(sites, states, strict=True)
                for x in (s.mean.grad, state.get("momentum"))
                if x is not None
            ],
            *([each.matrix for each in own if not each.rest] for own in pairs),
            [state["inverse"] for state in states if "inverse" in state],
            [self._averages.statistics[name] for site in sites for name in self._new_factors(site)],
        )
        diagonal = [s.precision for s in sites if not self._has_factors(s) and s.mean not in self._blocks]
        least, rests = smallest(readings, diagonal), [max((each.rest for each in own), default=0.0) for own in pairs]

        def bound() -> float:
            (mean, center, prior, gradient, inputs, outputs, dense, new), ess = found(), self._ess(group)
            inverse = max(
                max(inputs, rests[0]) * max(outputs, rests[1]), dense, ess / least() if least() > 0 else math.inf
            )
            return (
                self._factor() * (gradient + new)
                + mean
                + group["lr"] * (gradient + prior / ess * (mean + center)) * inverse
            )

        return bound

    def _moves_curvature(self, sites: Sequence[Site]) -> bool:
        """Whether a step moves more than means, momenta and averages of factors, or needs new inverses."""
        if any(self._priors.values()):
            return True
        statistics = self._averages.statistics
        for site in sites:
            block = self._blocks.get(site.mean)
            state = self.state.get(site.mean if block is None else block.sites[0].mean, {})
            key, inverse = ("input", "input_inverse") if block is None else ("block", "inverse")
            if block is None and not self._has_factors(site):
                if "updates" not in state or site.name in statistics:
                    return True
            elif site.key == "weight" or block is not None:
                if key not in state or self._is_due(state, inverse, state[key]):
                    return True
                if block is not None and block.statistic in statistics:
                    return True
                if any(statistics[name].shape != state["input"].shape for name in self._new_factors(site)[:1]):
                    return True
        return False

    def _new_factors(self, site: Site) -> list[str]:
        """Return the names of the statistics of a weight that its factors are averaged with."""
        return [name for kind in (INPUT, OUTPUT) if (name := site.name + kind) in self._averages.statistics]

    def _update_diagonal(self, site: Site, group: dict[str, Any]) -> None:
        """Move a tensor without factors as VOGN does, its curvature averaged as factors are.

        The bias of a weight that has been frozen since leaves the weight's roots.
        """
        state, squares, ess = self.state[site.mean], self._averages.statistics.get(site.name), self._ess(group)
        grad: Any = site.mean.grad
        if squares is not None:
            if "updates" not in state:
                start = site.prior_precision.expand_as(site.mean) if self._from_curvature else site.precision
                state |= {"updates": 0, "curvature": torch.zeros_like(squares), "start": start - site.prior_precision}
            state["updates"] += 1
            state["curvature"].lerp_(squares, corrected_weight(group["factor_lr"], state["updates"]))
            rest = state["start"] * (1 - group["factor_lr"]) ** state["updates"]
            site.precision.copy_(ess * state["curvature"] + site.prior_precision + rest)
        elif "updates" not in state:
            return
        layer = site.module
        if isinstance(layer, BayesianLayer) and layer.roots is not None:
            columns = layer.get_parameter("weight").shape[1:].numel()
            if len(layer.roots[0]) > columns:
                layer.set_roots(leading_root(layer.roots[0], columns), layer.roots[1])
        state["step"] = state.get("step", 0) + 1
        natural_gradient_step_(
            site.mean,
            site.precision,
            momentum_average(state, grad, group["beta1"]),
            torch.zeros_like(site.mean),
            prior_mean=site.prior_mean,
            prior_precision=site.prior_precision,
            ess=ess,
            lr=group["lr"],
            precision_lr=0.0,  # it has moved
            damping=group["damping"],
        )
