"""The methods of `predict` that sample: several samples at once where that is faster.

A method is a generator. For each chunk of samples it yields a function from a batch to the outputs of
those samples, in pieces `(s, n, *)`. All batches pass through one function before the next is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from bayeslayers.distributions.noise import StandardNormal
from bayeslayers.inputs import Batch
from bayeslayers.layers import BayesianLayer, can_draw_output
from bayeslayers.layers.perturbation import LocalReparameterization, Op, Perturbation
from bayeslayers.prediction.chunks import AtOnce, Plan, Run
from bayeslayers.prediction.linearised import linearised_outputs
from bayeslayers.sampling import Sampler, Site, posterior
from bayeslayers.sampling.placement import placed
from bayeslayers.sampling.sharing import Shared


def weight_draws(model: nn.Module, plan: Plan) -> Iterator[Run]:
    """Sample whole networks from the posterior; each one serves all batches.

    Samples that run at once, by `torch.func.vmap`, are the same as those that run one after the other:
    the results agree to rounding.
    """
    return _network_draws(_Networks(model, plan), plan)


def local_draws(model: nn.Module, plan: Plan) -> Iterator[Run]:
    """Sample the outputs of linear layers and convolutions, by `perturbation.LocalReparameterization`.

    For layers on `(n, i)` the predictive distribution of each example is exactly that of sampled weights,
    but the samples of different examples are independent. For positions that share weights it is an
    approximation. What does not depend on the sample, such as the first layer's moments, is computed once
    for all samples that run at once.
    """
    return _network_draws(_Networks(model, plan, local=True), plan)


def _network_draws(networks: _Networks, plan: Plan) -> Iterator[Run]:
    at_once = AtOnce(networks.model, plan)
    for count in plan.counts(at_once):
        networks.draw(count)
        yield partial(at_once.outputs, networks.outputs, count)
        at_once.settle(networks.bytes)


class _Networks:
    """Sampled networks that run several at once, with the weights that `Sampler` would draw one after the other."""

    def __init__(self, model: nn.Module, plan: Plan, local: bool = False):
        self.model, self.generator, self.antithetic = model, plan.generator, plan.antithetic
        sites = list(posterior(model))
        self._perturbed = _local(sites, plan.generator) if local else {}
        self._all_sites = sites
        self._sites = [site for site in sites if site.module not in self._perturbed]  # whose weights are sampled
        self._means = [site.mean.detach() for site in self._sites]
        self._deviations = [site.deviation for site in self._sites]
        self._stacks: list[Tensor] = []
        self._device = sites[0].mean.device
        correlated = any(getattr(site.module, "correlations", None) for site in self._sites)
        self._sampler = Sampler(self._sites, frozen=True) if correlated else None
        self.bytes = sum(mean.numel() * mean.element_size() for mean in self._means)

    def draw(self, count: int) -> None:
        """Sample the next networks, in the memory of the last ones."""
        if not self._stacks or len(self._stacks[0]) != count:
            self._stacks = []
            self._stacks = [_stack_like(mean, count) for mean in self._means]
        factors = [1.0] * len(self._stacks)
        for index in range(0, count, 2 if self.antithetic else 1):
            normal = StandardNormal(self.generator)
            factors = [normal.fill_unscaled_(stack[index]) for stack in self._stacks]
        for site, stack in zip(self._sites, self._stacks, strict=True):
            if site.padding_row is not None:
                stack[:, site.padding_row] = 0
        if self.antithetic:
            for stack in self._stacks:
                torch.neg(stack[::2], out=stack[1::2])
        if self._sampler is not None:
            self._correlate(self._sampler, factors)
            return
        for mean, deviation, stack, factor in zip(self._means, self._deviations, self._stacks, factors, strict=True):
            torch.addcmul(mean, stack, deviation, value=factor, out=stack)

    def _correlate(self, sampler: Sampler, factors: Sequence[float]) -> None:
        """Turn noise into weights for matrix-variate posteriors."""
        columns = list(zip(self._sites, self._stacks, factors, strict=True))
        for index in range(len(self._stacks[0])):
            with sampler.draw({site.name: stack[index] * factor for site, stack, factor in columns}):
                for site, stack, _ in columns:
                    stack[index] = site.value

    def outputs(self, draws: slice, batch: Batch) -> Tensor:
        """Return the outputs of some of the sampled networks, `(s, n, *)`."""
        stacks = [stack[draws] for stack in self._stacks]
        if (size := draws.stop - draws.start) == 1:
            return self._forward(batch, None, *(stack[0] for stack in stacks)).unsqueeze(0)
        with _NO_WARNINGS.held():  # torch warns of ops without a batching rule, which are only slower
            return vmap(partial(self._forward, batch))(torch.empty(size, device=self._device), *stacks)

    def _forward(self, batch: Batch, draw: Tensor | None, *weights: Tensor) -> Tensor:
        perturbations = {
            layer: perturbation if draw is None else _EachDraw(perturbation, draw)
            for layer, perturbation in self._perturbed.items()
        }
        values = {site.name: weight for site, weight in zip(self._sites, weights, strict=True)}
        with placed(self._all_sites, values, perturbations):
            return self.model(batch)


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_NO_WARNINGS = Shared(_without_warnings)


def _local(sites: Sequence[Site], generator: torch.Generator | None) -> dict[nn.Module, LocalReparameterization]:
    """Return how layers sample their outputs: those that can, and that share no weight, as in `Sampler`."""
    tied = {module for site in sites if len(site.places) > 1 for module, _ in site.places}
    found: dict[nn.Module, LocalReparameterization] = {}
    for site in sites:
        if isinstance(site.module, BayesianLayer) and can_draw_output(site.module) and site.module not in tied:
            perturbation = found.setdefault(site.module, LocalReparameterization("local", generator))
            perturbation.values[site.key] = site.deviation
    return found


def _stack_like(mean: Tensor, count: int) -> Tensor:
    """Return memory for tensors laid out as `empty_like(mean)`: the order of their noise depends on the layout."""
    one = torch.empty_like(mean)
    return torch.empty_strided((count, *one.shape), (one.numel(), *one.stride()), dtype=one.dtype, device=one.device)


class _EachDraw(Perturbation):
    """Local reparameterisation under `vmap`: the noise differs from sample to sample even if the moments do not.

    Args:
        one: The perturbation of a single sample.
        draw: Any tensor that `vmap` maps over the samples.
    """

    def __init__(self, one: LocalReparameterization, draw: Tensor):
        super().__init__("local", one.generator)
        self._one, self._draw = one, draw

    def __call__(self, op: Op, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _Noisy.apply(*self._one.moments(op, input, weight, bias), self._draw, self.generator)


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
        noise = deviation.new_empty(shape)
        factor = StandardNormal(generator).fill_unscaled_(noise)
        return torch.addcmul(mean, noise, deviation.to(mean.dtype), value=factor).to(mean.dtype), 0


def linearised_draws(model: nn.Module, plan: Plan) -> Iterator[Run]:
    """Sample outputs of the network linearised in its weights, see `bayeslayers.prediction.linearised`."""
    yield lambda batch: iter([linearised_outputs(model, batch, plan.num_samples, plan.generator)])


def means(model: nn.Module, plan: Plan) -> Iterator[Run]:
    """Compute once, with the posterior means."""
    yield lambda batch: iter([model(batch).unsqueeze(0)])
