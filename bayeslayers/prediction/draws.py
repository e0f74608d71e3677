"""The methods of `predict` that sample: several samples at once where that is faster.

A method is a generator. For each chunk of samples it yields a function from a batch to the outputs of
those samples, in pieces `(s, n, *)`. All batches pass through one function before the next is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from bayeslayers.curvature.kernels.draw import StandardNormal
from bayeslayers.inputs import Batch
from bayeslayers.layers.perturbation import Perturbation
from bayeslayers.prediction.chunks import AtOnce, Plan, Run
from bayeslayers.prediction.linearised import linearised_outputs
from bayeslayers.prediction.output_draws import DrawnOutput, EachWeight, Outputs, layers_that_draw, local_outputs
from bayeslayers.prediction.stack import Stack
from bayeslayers.sampling import Sampler, posterior
from bayeslayers.sampling.placement import placed
from bayeslayers.sampling.sampler import sites_together
from bayeslayers.sampling.sharing import Shared


def weight_draws(model: nn.Module, plan: Plan) -> Iterator[Run]:
    """Sample whole networks from the posterior; each one serves all batches.

    Samples that run at once, by `torch.func.vmap`, are the same as those that run one after the other:
    the results agree to rounding.
    """
    return network_draws(Networks(model, plan), plan)


def local_draws(model: nn.Module, plan: Plan) -> Iterator[Run]:
    """Sample the outputs of linear layers and convolutions, by `perturbation.LocalReparameterization`.

    For layers on `(n, i)` the predictive distribution of each example is exactly that of sampled weights,
    but the samples of different examples are independent. For positions that share weights it is an
    approximation. What does not depend on the sample, such as the first layer's moments, is computed once
    for all samples that run at once.
    """
    return network_draws(Networks(model, plan, local_outputs(list(posterior(model)))), plan)


def network_draws(networks: Networks, plan: Plan, at_once: AtOnce | None = None) -> Iterator[Run]:
    """Sample networks, several at once.

    Args:
        networks: Where they come from.
        plan: How many there are.
        at_once: How many run at once; None finds out by the first sample.
    """
    at_once = AtOnce(networks.model, plan) if at_once is None else at_once
    for count in plan.counts(at_once):
        networks.draw(count)
        yield partial(at_once.outputs, networks.outputs, count)
        at_once.settle(networks.bytes)


class Networks:
    """Sampled networks that run several at once, with the weights that `Sampler` would draw one after the other.

    Args:
        model: The network.
        plan: How samples are drawn.
        outputs: By layer, the distribution of its outputs, where these are sampled in place of its weights.
    """

    def __init__(self, model: nn.Module, plan: Plan, outputs: Mapping[Any, Outputs] | None = None):
        self.model, self.generator, self.antithetic = model, plan.generator, plan.antithetic
        sites = list(posterior(model))
        self._drawn_outputs = dict(outputs or {})
        self._all_sites = sites
        layers = layers_that_draw(sites)
        self._convolutions = [m for m in layers if m not in self._drawn_outputs and not isinstance(m, nn.Linear)]
        self._sites = [site for site in sites if site.module not in self._drawn_outputs]  # whose weights are sampled
        self._stacks = [Stack([site for _, site in bundle]) for bundle in sites_together(self._sites)]
        self._device = sites[0].mean.device
        correlated = any(getattr(site.module, "correlations", None) for site in self._sites)
        self._sampler = Sampler(self._sites, frozen=True) if correlated else None
        self.bytes = sum(stack.mean.numel() * stack.mean.element_size() for stack in self._stacks)

    def draw(self, count: int) -> None:
        """Sample the next networks, in the memory of the last ones."""
        for stack in self._stacks:
            stack.hold(count)
        # Beside sampled outputs, samples that run at once have other noise than alone in any case.
        at_once = self._drawn_outputs and count > 1
        for index in [slice(0, count)] if at_once else range(0, count, 2 if self.antithetic else 1):
            normal = StandardNormal(self.generator)
            for stack in self._stacks:
                stack.fill(index, normal, self.antithetic, noise=self._sampler is not None)
        if self._sampler is not None:
            self._correlate(self._sampler, count)

    def _correlate(self, sampler: Sampler, count: int) -> None:
        """Turn noise into weights for matrix-variate posteriors."""
        columns = [(site, values) for stack in self._stacks for site, values in stack.values.items()]
        for index in range(count):
            with sampler.draw({site.name: values[index] for site, values in columns}):
                for site, values in columns:
                    values[index] = site.value

    def outputs(self, draws: slice, batch: Batch) -> Tensor:
        """Return the outputs of some of the sampled networks, `(s, n, *)`."""
        stacks = [values[draws] for stack in self._stacks for values in stack.values.values()]
        if (size := draws.stop - draws.start) == 1:
            return self._forward(batch, None, *(stack[0] for stack in stacks)).unsqueeze(0)
        with _NO_WARNINGS.held():  # torch warns of ops without a batching rule, which are only slower
            return vmap(partial(self._forward, batch))(torch.empty(size, device=self._device), *stacks)

    def _forward(self, batch: Batch, draw: Tensor | None, *weights: Tensor) -> Tensor:
        perturbations: dict[nn.Module, Perturbation] = {
            layer: DrawnOutput(outputs, self.generator, draw) for layer, outputs in self._drawn_outputs.items()
        }
        if draw is not None:
            perturbations |= dict.fromkeys(self._convolutions, EachWeight())
        sites = (site for stack in self._stacks for site in stack.sites)
        values = {site.name: weight for site, weight in zip(sites, weights, strict=True)}
        with placed(self._all_sites, values, perturbations):
            return self.model(batch)


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_NO_WARNINGS = Shared(_without_warnings)


def linearised_draws(model: nn.Module, plan: Plan) -> Iterator[Run]:
    """Sample outputs of the network linearised in its weights, see `bayeslayers.prediction.linearised`."""
    yield lambda batch: iter([linearised_outputs(model, batch, plan.num_samples, plan.generator)])


def means(model: nn.Module, plan: Plan) -> Iterator[Run]:
    """Compute once, with the posterior means."""
    yield lambda batch: iter([model(batch).unsqueeze(0)])
