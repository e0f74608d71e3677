"""The step with Kronecker factors of the Fisher: it moves a layer's matrix, and leaves a matrix-variate posterior."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bayeslayers.checks import at_least_one
from bayeslayers.distributions.gaussian import natural_gradient_step_
from bayeslayers.distributions.matrix_gaussian import (
    as_matrix,
    damp,
    inverse,
    inverse_root,
    leading_root,
    marginal_precision,
)
from bayeslayers.dtypes import at_least_float32
from bayeslayers.layers import BayesianLayer
from bayeslayers.optim.adam import momentum_average
from bayeslayers.optim.averages import corrected_weight
from bayeslayers.optim.dense import DenseBlock
from bayeslayers.optim.fisher import INPUT, OUTPUT, FisherOptimizer
from bayeslayers.optim.matrix_prior import MatrixPrior
from bayeslayers.sampling import Site


class KroneckerFactored(FisherOptimizer):
    """The step that K-FAC and Noisy K-FAC share."""

    _keeps_roots: ClassVar[bool] = True

    def _prepare(self) -> None:
        super()._prepare()
        self._priors: dict[BayesianLayer, MatrixPrior | None] = {}

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
        state = self.state.get(site.mean, {})
        new: dict[str, Any] = {key: state[key] for key in ("updates", "input", "output", "start") if key in state}
        statistics = self._averages.statistics
        if site.name + INPUT in statistics:
            new = self._averaged(new, site, group, statistics[site.name + INPUT], statistics[site.name + OUTPUT])
        if "input" in new and self._is_due(state, "input_inverse", new["input"]):
            rest = new["start"] * (1 - group["factor_lr"]) ** new["updates"]
            factors = new["input"], new["output"] + rest * torch.eye(len(new["output"])).to(new["output"])
            new |= self._inverses(site, factors, self._ess(group), group["damping"])
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

    def _inverses(self, site: Site, factors: tuple[Tensor, Tensor], ess: float, damping: float) -> dict[str, Any]:
        """Return the inverses that a step multiplies by, and the roots of the posterior."""
        layer: Any = site.module
        inputs = len(factors[0])
        if (prior := self._matrix_prior(layer, inputs)) is None:
            precision = _mean_over_matrix(layer, "prior_precision", inputs) / ess
        else:
            factors, precision, damping = prior.whitened(*factors), 1 / ess, prior.damping(damping)
        of_posterior, of_step = damp(*factors, precision), damp(*factors, precision + damping)
        roots = inverse_root(of_posterior[0]), inverse_root(of_posterior[1]) * ess**-0.5
        inverses = inverse(of_step[0]), inverse(of_step[1])
        if prior is not None:
            roots = prior.restored(*roots)
            inverses = (
                prior.input_root @ inverses[0] @ prior.input_root.mT,
                prior.output_root @ inverses[1] @ (prior.output_root.mT),
            )
        return {"input_inverse": inverses[0], "output_inverse": inverses[1], "roots": roots}

    def _matrix_prior(self, layer: BayesianLayer, inputs: int) -> MatrixPrior | None:
        """Return a layer's matrix-variate prior, which is inverted once."""
        self._priors[layer] = MatrixPrior.of(layer, inputs, self._priors.get(layer))
        return self._priors[layer]

    def _averaged(self, old: dict[str, Any], site: Site, group: Mapping[str, Any], *found: Tensor) -> dict[str, Any]:
        """Return the averages with new factors in them, begun again where a frozen or freed bias changes their size."""
        if "input" not in old or old["input"].shape != found[0].shape:
            start = 0.0 if self._from_curvature else self._start(site, found[0], self._ess(group))
            return {"updates": 1, "input": found[0], "output": found[1], "start": start}
        weight = corrected_weight(group["factor_lr"], old["updates"] + 1)
        averages = {
            key: at_least_float32(old[key]).lerp(new, weight)
            for key, new in zip(("input", "output"), found, strict=True)
        }
        return {**old, **averages, "updates": old["updates"] + 1}

    @staticmethod
    def _start(site: Site, input_factor: Tensor, ess: float) -> float:
        """Return the multiple of I that makes up a layer's precision as G, in the mean over the diagonal of A."""
        inputs, mean_input = len(input_factor), float(input_factor.diagonal().mean())
        precision, prior = (_mean_over_matrix(site.module, name, inputs) for name in ("precision", "prior_precision"))
        return (precision - prior) / ess / mean_input if precision > prior and mean_input > 0 else 0.0

    def _is_due(self, state: Mapping[str, Any], inverse: str, curvature: Tensor) -> bool:
        """Whether inverses are to be computed in the coming step of a layer, of which the state holds one so named."""
        if "inverse_step" not in state or state[inverse].shape != curvature.shape:
            return True
        step = state["step"] + 1
        return step - state["inverse_step"] >= at_least_one(f"inverse_every({step})", self._interval(step))

    def _interval(self, step: int) -> int:
        if callable(self.inverse_every):
            return self.inverse_every(step)
        # The first factors are those of few examples: held for long, their inverse makes the steps diverge.
        return 1 if step <= self.inverse_every else self.inverse_every

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
        new = self._curvatures.pop(site.mean)
        roots = new.pop("roots", None)
        state.update(new)
        if "input_inverse" not in state:  # the layer's first statistics are still to come
            return
        columns = site.mean.shape[1:].numel()
        sites = [site, self._sites[layer.bias]] if len(state["input"]) > columns else [site]
        matrix = as_matrix(*(at_least_float32(self._gradient(each, group)) for each in sites))
        matrix = matrix + self._pull(sites, len(state["input"])) / self._ess(group)
        step = at_least_float32(state["output_inverse"]) @ matrix @ at_least_float32(state["input_inverse"])
        precision = None if roots is None else marginal_precision(*roots)
        for each, part in zip(sites, (slice(columns), slice(columns, None)), strict=False):
            each.mean.sub_(step[:, part].reshape(each.mean.shape), alpha=group["lr"])
            if precision is not None:
                each.precision.copy_(precision[:, part].reshape(each.mean.shape))
        if roots is not None:
            layer.set_roots(*(root.to(site.mean.dtype) for root in roots))

    def _update_block(self, block: DenseBlock, group: dict[str, Any]) -> None:
        """Move all entries of a layer by their gradient, the prior's in it, times the inverse of the curvature."""
        state = self.state[block.sites[0].mean]
        new = self._curvatures.pop(block.sites[0].mean)
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

    def _pull(self, sites: Sequence[Site], inputs: int) -> Tensor:
        """Return the gradient of the prior's minus log density in a layer's matrix."""
        differences = [at_least_float32(site.mean - site.prior_mean) for site in sites]
        layer: Any = sites[0].module
        if (prior := self._matrix_prior(layer, inputs)) is not None:
            return prior.pull(as_matrix(*differences))
        return as_matrix(*(site.prior_precision * each for site, each in zip(sites, differences, strict=True)))

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


def _mean_over_matrix(layer: Any, name: str, inputs: int) -> float:
    """Return the mean of a buffer over a layer's matrix of so many columns: factors have room for one number."""
    columns = layer.weight.shape[1:].numel()
    total = float(getattr(layer, f"weight_{name}").mean()) * columns
    if inputs > columns:
        total += float(getattr(layer, f"bias_{name}").mean())
    return total / inputs
