"""Scopes: `sampled(model)` computes with drawn weights, `tracked(model)` sums squared per-example gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bayeslayers import gaussian
from bayeslayers.curvature.accumulate import Leaves, Part
from bayeslayers.curvature.kronecker import Backward, KroneckerLeaves
from bayeslayers.layers import BayesianLayer, can_draw_output
from bayeslayers.matrix_gaussian import as_matrix, correlated
from bayeslayers.noise import StandardNormal
from bayeslayers.perturbation import PERTURBATIONS, How
from bayeslayers.placement import cleared, put, refresh, slots_of


@dataclass(frozen=True)
class Site:
    """One uncertain tensor of a model: `name` is its parameter's name in `model.named_parameters()`.

    The tensors are read from the module each time, so they follow `model.to(...)`. `places` are all
    modules that hold the parameter, each with its name there: of tied weights there is one draw.
    """

    name: str
    module: nn.Module
    key: str
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def mean(self) -> nn.Parameter:
        return self.module._parameters[self.key]  # pyright: ignore[reportReturnType]

    @property
    def value(self) -> Tensor:
        """The tensor that a call computes with: the scope's draw, the mean outside one."""
        return self.module.value(self.key) if isinstance(self.module, BayesianLayer) else getattr(self.module, self.key)

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

    A parameter of any module is uncertain that has a precision beside it, as `attach_posterior` gives it.

    Raises:
        ValueError: If two Bayesian layers share a parameter: it cannot have two posteriors.
    """
    found: dict[nn.Parameter, dict[str, tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(parameter, {})[f"{path}.{key}" if path else key] = (module, key)
    for places in found.values():
        names = [name for name, (module, key) in places.items() if f"{key}_precision" in module._buffers]
        if len(names) > 1:
            raise ValueError(
                f"parameter '{names[1]}' must belong to one Bayesian layer, got that of '{names[0]}'. Use the same "
                "layer twice, or ordinary layers for tied weights."
            )
        if names:
            yield Site(names[0], *places[names[0]], tuple(places.values()))


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
    how: How = "weights",
) -> AbstractContextManager[None]:
    """Compute with one draw of the posterior's weights inside the scope, with the means again after it.

    The draw is made beside the means, which are never overwritten, and the gradient with respect
    to the drawn weight arrives in the mean's `.grad`. Scopes nest: the inner draw holds.

    Args:
        model: Model with Bayesian layers.
        generator: Source of the noise, on the model's device; torch's default one if None.
        noise: Standard normal values by parameter name, in place of drawn ones (for antithetic
            pairs, say). It must name every site.
        how: "weights" draws each weight once for the scope. "local" and "flipout" draw the outputs of
            linear layers and convolutions, example by example (`perturbation.LocalReparameterization`,
            `perturbation.Flipout`), and other layers' weights as before. Under these two there is no
            curvature to track; "local" takes no `noise`. A matrix-variate posterior has its weight drawn.
    """
    return Sampler(list(posterior(model)), generator, how=how).draw(noise)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode inside the scope, and each of its modules back in its own mode after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class Sampler:
    """Draws of the weights of some sites, one after the other.

    Args:
        sites: The uncertain tensors to draw.
        generator: Source of the noise; torch's default one if None.
        frozen: The posterior will not change between draws, so that standard deviations are kept.
        how: What is drawn; see `sampled`.
        differentiable: Let backward passes reach the standard deviations, by `leaves`.

    Attributes:
        leaves: By site name a leaf of the last draw's graph that is proportional to the standard
            deviation, if `differentiable`.
        noise: By site name the values of the last draw, until the next, and the factor that makes them
            standard normal.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        generator: torch.Generator | None = None,
        frozen: bool = False,
        how: How = "weights",
        differentiable: bool = False,
    ):
        if how not in ("weights", *PERTURBATIONS):
            raise ValueError(f"how must be 'weights', 'local' or 'flipout', got {how!r}.")
        self.sites = sites
        self.generator = generator
        self.how: How = how
        self.differentiable = differentiable
        self.leaves: dict[str, Tensor] = {}
        self.noise: dict[str, tuple[Tensor, float]] = {}
        self._slots = slots_of(place for site in sites for place in site.places)
        tied = {module for site in sites if len(site.places) > 1 for module, _ in site.places}
        self._layers: dict[BayesianLayer, dict[str, Site]] = {}
        for site in sites:
            if isinstance(site.module, BayesianLayer):
                self._layers.setdefault(site.module, {})[site.key] = site
        self._perturbed = [m for m in self._layers if how in PERTURBATIONS and m not in tied and can_draw_output(m)]
        # Memory is kept from draw to draw: on a CPU its allocation costs as much as the arithmetic.
        self._noise: dict[str, Tensor] = {}
        self._deviations = {site.name: site.precision.rsqrt() for site in sites} if frozen else None

    @contextmanager
    def draw(self, noise: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Compute with a new draw inside the scope; see `sampled`."""
        if noise is not None and self.how == "local":
            raise ValueError("noise must be None under how='local', which draws outputs, got values for weights.")
        normal = StandardNormal(self.generator)
        self.leaves, self.noise = {}, {}
        with cleared(self._slots):
            for layer in self._perturbed:
                vars(layer)["perturbation"] = PERTURBATIONS[self.how](self.how, self.generator)
            for site in self.sites:
                self._draw_site(site, noise, normal)
            for layer in self._layers:
                if layer.roots is not None and layer.perturbation is None:
                    self._correlate(layer, *layer.roots)
            refresh(self._slots)
            yield

    def _draw_site(self, site: Site, noise: Mapping[str, Tensor] | None, normal: StandardNormal) -> None:
        """Give the modules of a site its draw, or its layer what outputs are drawn with."""
        mean = site.mean
        perturbation = site.module.perturbation if isinstance(site.module, BayesianLayer) else None
        deviation = site.precision.rsqrt() if self._deviations is None else self._deviations[site.name]
        if perturbation is not None and self.how == "local":
            perturbation.values[site.key] = self._leaf(site, deviation)
            return
        values, factor = self._noise_of(site.name, mean, normal) if noise is None else (_given(noise, site), 1.0)
        self.noise[site.name] = values, factor
        if perturbation is not None:
            perturbation.values[site.key] = self._leaf(site, values * deviation * factor)
            return
        if self.differentiable:
            drawn = mean + self._leaf(site, values * deviation * factor)
        else:
            # The node of addcmul keeps nothing for the mean: several backward passes may go through it.
            drawn = torch.addcmul(mean, values, deviation, value=factor)
        for place in site.places:
            put(place, drawn)

    def _correlate(self, layer: BayesianLayer, input_root: Tensor, output_root: Tensor) -> None:
        """Draw the weight of a matrix-variate posterior, and the bias that is in it, from the noise of both."""
        weight, bias = self._layers[layer]["weight"], self._layers[layer].get("bias")
        columns = weight.mean.shape[1:].numel()
        if len(input_root) == columns:
            bias = None
        noise = [values * factor for values, factor in (self.noise[site.name] for site in (weight, bias) if site)]
        change = correlated(as_matrix(*noise), input_root, output_root)
        for site, part in ((weight, change[:, :columns]), (bias, change[:, columns:])):
            if site is not None:
                for place in site.places:
                    put(place, site.mean + part.reshape(site.mean.shape))

    def _leaf(self, site: Site, value: Tensor) -> Tensor:
        """Return the value, as the site's leaf if gradients are to reach it."""
        if self.differentiable and site.mean.requires_grad:
            self.leaves[site.name] = value.requires_grad_()
        return value

    def _noise_of(self, name: str, mean: Tensor, normal: StandardNormal) -> tuple[Tensor, float]:
        """Return values for one site, in the memory of the last, and the factor that makes them standard normal."""
        noise = self._noise.get(name)
        if noise is None or (noise.device, noise.dtype) != (mean.device, mean.dtype):  # new, or the model has moved
            noise = self._noise[name] = torch.empty_like(mean)
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


def layers_with_curvature(sites: Iterable[Site]) -> dict[str, BayesianLayer]:
    """Return the layers of some sites by name, each of which has a curvature rule for what it owns.

    Raises:
        ValueError: If a parameter is not a Bayesian layer's, or several modules hold it.
    """
    layers: dict[str, BayesianLayer] = {}
    for site in sites:
        if not isinstance(site.module, BayesianLayer) or len(site.places) > 1:
            found = " and ".join(f"a {type(module).__name__}" for module, _ in site.places)
            raise ValueError(
                f"parameter '{site.name}' must belong to one Bayesian layer, which has a curvature rule, got {found}. "
                "Use IVON."
            )
        layers[site.name.rpartition(".")[0]] = site.module
    return layers


class Tracker:
    """Sums of squared per-example gradients of some layers, one scope after the other.

    Args:
        layers: Layers by their names.
        kronecker: Sum the Kronecker factors of the weights that have them (`BayesianLayer.factor_sizes`)
            in place of squares. A bias that is not frozen is in those of its weight.

    Attributes:
        leaves: Per parameter name, the leaf whose `.grad` is the sum of squares of the last scope,
            in the units of the loss that was back-propagated. Those of the factors of `NAME.weight`
            are `NAME.weight_input_factor` and `NAME.weight_output_factor`.
    """

    def __init__(self, layers: Mapping[str, BayesianLayer], kronecker: bool = False):
        self.layers = layers
        self.leaves: dict[str, Tensor] = {}
        self._tallies: dict[str, Tensor] = {}
        self._part: Part | None = None
        self._kronecker, self._backward = kronecker, Backward()
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
        self._backward.gradients = self._backward.factors = True
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

    def sums_of(self, loss: Tensor) -> tuple[dict[str, Tensor], int]:
        """Return the sums that a loss gives, by the leaves' names, and the number of its examples.

        The graph stays for the backward pass of another loss, the parameters' gradients are left
        alone, and that pass spends no time on factors.
        """
        leaves = {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}
        self._backward.gradients, self._backward.factors = False, True
        try:
            grads = torch.autograd.grad(
                loss, [*leaves.values(), *self._tallies.values()], retain_graph=True, allow_unused=True
            )
        finally:
            self._backward.gradients, self._backward.factors = True, False
        counts = [int(tally[0]) for tally in grads[len(leaves) :] if tally is not None]
        sums = {name: grad for name, grad in zip(leaves, grads, strict=False) if grad is not None}
        return sums, max(counts, default=0)

    def _leaves_of(self, name: str, layer: BayesianLayer) -> Leaves | KroneckerLeaves:
        """Return the leaves of one layer, those of its frozen parameters None."""
        if name not in self._tallies:
            tally = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            tally.register_hook(partial(self._check, name or type(layer).__name__, layer))
            self._tallies[name] = tally
        prefix, tally = f"{name}." if name else "", self._tallies[name]
        weight, bias = (layer._parameters.get(key) for key in ("weight", "bias"))
        sizes = layer.factor_sizes() if self._kronecker else None
        if sizes is None or weight is None or not weight.requires_grad:
            return Leaves(self._leaf(f"{prefix}weight", weight), self._leaf(f"{prefix}bias", bias), tally, self._part)
        joint = bias is not None and bias.requires_grad
        inputs, outputs = sizes[0] + joint, sizes[1]
        like = weight.detach()[:0].to(torch.promote_types(weight.dtype, torch.float32))
        return KroneckerLeaves(
            self._zeros(f"{prefix}weight_input_factor", like, torch.Size((inputs, inputs))),
            self._zeros(f"{prefix}weight_output_factor", like, torch.Size((outputs, outputs))),
            tally,
            self._backward,
        )

    def _leaf(self, name: str, parameter: Tensor | None) -> Tensor | None:
        """Return a leaf with the parameter's shape, None if that is absent or frozen."""
        if parameter is None or not parameter.requires_grad:
            self.leaves.pop(name, None)
            return None
        return self._zeros(name, parameter, parameter.shape)

    def _zeros(self, name: str, like: Tensor, shape: torch.Size) -> Tensor:
        """Return a leaf with no memory of its own, the last one if it still fits."""
        leaf = self.leaves.get(name)
        if leaf is None or (leaf.device, leaf.dtype, leaf.shape) != (like.device, like.dtype, shape):
            zero = torch.zeros((), dtype=like.dtype, device=like.device)
            leaf = self.leaves[name] = zero.expand(shape).requires_grad_()
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
