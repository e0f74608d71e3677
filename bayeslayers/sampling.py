"""Scopes: `sampled(model)` computes with drawn weights, `tracked(model)` sums squared per-example gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bayeslayers import gaussian
from bayeslayers.curvature.accumulate import Leaves, Part
from bayeslayers.layers import BayesianLayer
from bayeslayers.noise import StandardNormal


@dataclass(frozen=True)
class Site:
    """One uncertain tensor of a model: `name` is its parameter's name in `model.named_parameters()`.

    The tensors are read from the module each time, so they follow `model.to(...)`.
    """

    name: str
    module: BayesianLayer
    key: str

    @property
    def mean(self) -> nn.Parameter:
        return getattr(self.module, self.key)

    @property
    def precision(self) -> Tensor:
        return getattr(self.module, f"{self.key}_precision")

    @property
    def prior_mean(self) -> Tensor:
        return getattr(self.module, f"{self.key}_prior_mean")

    @property
    def prior_precision(self) -> Tensor:
        return getattr(self.module, f"{self.key}_prior_precision")


def posterior(model: nn.Module) -> Iterator[Site]:
    """Yield the uncertain tensors of `model`, in the order of its parameters.

    Raises:
        ValueError: If two Bayesian layers share a parameter: it cannot have two posteriors.
    """
    names: dict[nn.Parameter, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, BayesianLayer):
            for key, parameter in module.named_parameters(recurse=False):
                name = f"{path}.{key}" if path else key
                if names.setdefault(parameter, name) != name:
                    raise ValueError(
                        f"parameter '{name}' must belong to one Bayesian layer, got that of '{names[parameter]}'. Use "
                        "the same layer twice, or ordinary layers for tied weights."
                    )
                yield Site(name, module, key)


def kl_divergence(model: nn.Module) -> Tensor:
    """Return KL(posterior || prior) of all Bayesian layers of `model`, in nats."""
    sites = posterior(model)
    terms = [gaussian.kl_divergence(s.mean, s.precision, s.prior_mean, s.prior_precision) for s in sites]
    if not terms:
        raise ValueError("model must have Bayesian layers, got none. Build it from them, as BayesLinear.")
    return torch.stack(terms).sum()


def sampled(
    model: nn.Module,
    generator: torch.Generator | None = None,
    noise: Mapping[str, Tensor] | None = None,
) -> AbstractContextManager[None]:
    """Compute with one draw of the posterior's weights inside the scope, with the means again after it.

    The draw is made beside the means, which are never overwritten, and the gradient with respect
    to the drawn weight arrives in the mean's `.grad`. Scopes nest: the inner draw holds.

    Args:
        model: Model with Bayesian layers.
        generator: Source of the noise, on the model's device; torch's default one if None.
        noise: Standard normal values by parameter name, in place of drawn ones (for antithetic
            pairs, say). It must name every site.
    """
    return Sampler(list(posterior(model)), generator).draw(noise)


class Sampler:
    """Draws of the weights of some sites, one after the other.

    Args:
        sites: The uncertain tensors to draw.
        generator: Source of the noise; torch's default one if None.
        frozen: The posterior will not change between draws, so that standard deviations are kept.
    """

    def __init__(self, sites: Sequence[Site], generator: torch.Generator | None = None, frozen: bool = False):
        self.sites = sites
        self.generator = generator
        self._modules = list(dict.fromkeys(site.module for site in sites))
        # Memory is kept from draw to draw: on a CPU its allocation costs as much as the arithmetic.
        self._noise = [torch.empty_like(site.mean) for site in sites]
        self._deviations = [site.precision.rsqrt() for site in sites] if frozen else None

    @contextmanager
    def draw(self, noise: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Compute with a new draw inside the scope; see `sampled`."""
        # Past nn.Module.__setattr__, which costs as much as the draw of a small tensor.
        layers = [vars(module) for module in self._modules]
        before = [layer["drawn"] for layer in layers]
        normal = StandardNormal(self.generator)
        try:
            for layer in layers:
                layer["drawn"] = {}
            for index, site in enumerate(self.sites):
                mean = site.mean
                values, factor = self._noise_of(index, mean, normal) if noise is None else (_given(noise, site), 1.0)
                deviation = site.precision.rsqrt() if self._deviations is None else self._deviations[index]
                # The node of addcmul keeps nothing for the mean: several backward passes may go through it.
                site.module.drawn[site.key] = torch.addcmul(mean, values, deviation, value=factor)
            yield
        finally:
            for layer, drawn in zip(layers, before, strict=True):
                layer["drawn"] = drawn

    def _noise_of(self, index: int, mean: Tensor, normal: StandardNormal) -> tuple[Tensor, float]:
        """Return values for one site, in the memory of the last, and the factor that makes them standard normal."""
        noise = self._noise[index]
        if (noise.device, noise.dtype) != (mean.device, mean.dtype):  # the model has moved
            noise = self._noise[index] = torch.empty_like(mean)
        return noise, normal.fill_unscaled_(noise)


def _given(noise: Mapping[str, Tensor], site: Site) -> Tensor:
    values = noise.get(site.name)
    if values is None or values.shape != site.mean.shape:
        got = "none" if values is None else f"shape {tuple(values.shape)}"
        raise ValueError(f"noise must hold '{site.name}' of shape {tuple(site.mean.shape)}, got {got}.")
    return values


def tracked(model: nn.Module) -> AbstractContextManager[Tracker]:
    """Let backward passes inside the scope sum squared per-example gradients, in the yielded `Tracker`.

    Frozen parameters (`requires_grad=False`) are left out.
    """
    return Tracker({name: m for name, m in model.named_modules() if isinstance(m, BayesianLayer)}).track()


class Tracker:
    """Sums of squared per-example gradients of some layers, one scope after the other.

    Attributes:
        leaves: Per parameter name, the leaf whose `.grad` is the sum of squares of the last scope,
            in the units of the loss that was back-propagated.
    """

    def __init__(self, layers: Mapping[str, BayesianLayer]):
        self.layers = layers
        self.leaves: dict[str, Tensor] = {}
        self._tallies: dict[str, Tensor] = {}
        self._part: Part | None = None
        self._passes: dict[int, tuple[str, int]] = {}  # per backward pass, a layer and how many examples it saw
        self._uses: dict[tuple[str, int], int] = {}  # per layer and backward pass

    @property
    def examples(self) -> int:
        """Examples that went backward in the last scope, over all its backward passes."""
        counts = [tally.grad[0] for tally in self._tallies.values() if tally.grad is not None]
        return int(max(counts, default=0))

    def clear(self) -> None:
        """Forget the sums."""
        for leaf in (*self.leaves.values(), *self._tallies.values()):
            leaf.grad = None
        self._passes.clear()
        self._uses.clear()

    @contextmanager
    def track(self, fraction: float = 1.0, generator: torch.Generator | None = None) -> Iterator[Tracker]:
        """Sum squared per-example gradients inside the scope, from zero.

        Args:
            fraction: Part of each batch, in (0, 1], from which the sums of linear and convolution
                weights are estimated.
            generator: Source of that part.
        """
        self.clear()
        self._part = None
        if fraction < 1:
            device = None if generator is None else generator.device
            self._part = Part(fraction, float(torch.rand((), generator=generator, device=device)))
        before = {layer: layer.leaves for layer in self.layers.values()}
        try:
            for name, layer in self.layers.items():
                layer.leaves = self._leaves_of(name, layer)
            yield self
        finally:
            for layer, leaves in before.items():
                layer.leaves = leaves

    def _leaves_of(self, name: str, layer: BayesianLayer) -> Leaves:
        """Return the leaves of one layer, those of its frozen parameters None."""
        if name not in self._tallies:
            tally = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            tally.register_hook(partial(self._check, name or type(layer).__name__, layer))
            self._tallies[name] = tally
        prefix = f"{name}." if name else ""
        weight, bias = (self._leaf(prefix + key, layer._parameters.get(key)) for key in ("weight", "bias"))
        return Leaves(weight, bias, self._tallies[name], self._part)

    def _leaf(self, name: str, parameter: Tensor | None) -> Tensor | None:
        """Return a leaf with the parameter's shape and no memory of its own, the last one if it still fits."""
        if parameter is None or not parameter.requires_grad:
            self.leaves.pop(name, None)
            return None
        leaf = self.leaves.get(name)
        if leaf is None or (leaf.device, leaf.dtype) != (parameter.device, parameter.dtype):
            zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
            leaf = self.leaves[name] = zero.expand(parameter.shape).requires_grad_()
        return leaf

    def _check(self, name: str, layer: BayesianLayer, tally: Tensor) -> None:
        """Refuse a backward pass whose per-example gradients are not those of one batch of examples.

        A reentrant checkpoint runs a backward pass of its own inside the outer one, to which its
        uses belong: it is the pass in which the forward was recomputed.
        """
        examples, uses = (int(x) for x in tally.tolist())
        current = torch._C._current_graph_task_id() if layer.recomputed_in == -1 else layer.recomputed_in
        uses = self._uses[name, current] = self._uses.get((name, current), 0) + uses
        if uses > 1:
            raise RuntimeError(
                f"layer '{name}' must run once in each backward pass, ran {uses} times: per-example gradients "
                "of a reused layer add up before they are squared. Call backward after each forward, or "
                "exclude the layer from the Bayesian ones."
            )
        first, expected = self._passes.setdefault(current, (name, examples))
        if examples != expected:
            raise RuntimeError(
                f"dimension 0 of the input of layer '{name}' must run over the examples, got {examples} there "
                f"and {expected} in layer '{first}'. Keep examples in dimension 0 (a linear layer takes "
                "(n, *, features)), or exclude the layer from the Bayesian ones."
            )
