"""Sampling scopes: inside `sampled(model)` the model computes with sampled weights."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayeslayers.curvature.kernels.draw import StandardNormal, fits
from bayeslayers.curvature.op import is_eager
from bayeslayers.layers import BayesianLayer, can_draw_output
from bayeslayers.layers.perturbation import PERTURBATIONS, Estimator, Perturbation
from bayeslayers.sampling.flat import SMALL, Scratch, bundles, gather, moved, spread
from bayeslayers.sampling.large import drawn
from bayeslayers.sampling.placement import placed
from bayeslayers.sampling.sites import Site, posterior

TOGETHER = 2**16  # values of a tensor up to which its noise is made together with that of others


@dataclass
class Small:
    """Small sites that are sampled together.

    Attributes:
        sites: The sites.
        places: Where they are among all.
        noise: Memory for their noise, flat.
        noise_of: Its parts by the sites' names.
        change: Memory for what the noise adds to the means.
        changes: Its parts, one for each site; to view them in each sample would take longer than the arithmetic.
        deviation: Their standard deviations likewise, if these are kept.
    """

    sites: Sequence[Site]
    places: Sequence[int]
    noise: Tensor
    noise_of: dict[str, Tensor]
    change: Tensor
    changes: list[Tensor]
    deviation: Tensor | None = None

    @classmethod
    def of(cls, bundle: Sequence[tuple[int, Site]]) -> Small:
        """Return sites, with their places, and memory for their noise."""
        places, sites = zip(*bundle, strict=True)
        means = [site.mean for site in sites]
        noise, change = (torch.empty_like(gather(means)) for _ in range(2))
        parts = {site.name: part for site, part in zip(sites, spread(noise, means), strict=True)}
        return cls(sites, places, noise, parts, change, spread(change, means))


def sites_together(sites: Sequence[Site], alone: Container[nn.Module] = ()) -> list[list[tuple[int, Site]]]:
    """Return bundles of sites, each with its place; a bundle gets its noise at once, and bundles in this order.

    Args:
        sites: The sites.
        alone: Modules whose sites stand for themselves, as those with a padding row do.
    """

    def kind(item: tuple[int, Site]) -> Hashable:
        place, site = item
        apart = site.padding_row is not None or site.module in alone
        return site.mean.dtype, site.mean.device, place if apart else None

    return bundles(enumerate(sites), lambda item: item[1].mean, kind, TOGETHER)


def sampled(
    model: nn.Module,
    generator: torch.Generator | None = None,
    noise: Mapping[str, Tensor] | None = None,
    estimator: Estimator = "weights",
    how: Estimator | None = None,
) -> AbstractContextManager[None]:
    """Compute with one posterior sample of the weights inside the scope, and with the means again after it.

    The sample is kept beside the means, which are never overwritten. The gradient with respect to the
    sampled weight arrives in the mean's `.grad`. Scopes nest, and the innermost sample is used.

    Args:
        model: Model with Bayesian layers.
        generator: Source of the noise, on the model's device; torch's default one if None.
        noise: Standard normal values by parameter name, in place of random ones (for antithetic
            pairs, for example). It must have values for every site.
        estimator: "weights" samples each weight once for the scope. "local" and "flipout" sample the outputs of
            linear layers and convolutions, example by example (`perturbation.LocalReparameterization`,
            `perturbation.Flipout`), and the weights of other layers and of matrix-variate posteriors. These two
            do not allow curvature to be tracked; "local" takes no `noise`.
        how: The former name of `estimator`, which it replaces if given.
    """
    return Sampler(list(posterior(model)), generator, estimator=estimator if how is None else how).draw(noise)


class Sampler:
    """Draws samples of the weights of some sites, one after the other.

    Args:
        sites: The uncertain tensors to sample.
        generator: Source of the noise; torch's default one if None.
        frozen: The posterior will not change between samples, so that standard deviations can be kept.
        estimator: What is sampled; see `sampled`.
        differentiable: Let backward passes reach the standard deviations, through `leaves`.
        keeps_noise: Keep the values of a sample after it. Without, those of large tensors that need not be moved
            together take no memory.

    Attributes:
        leaves: If `differentiable`, by site name, a leaf of the last sample's graph that is proportional to
            the standard deviation.
        noise: By site name, the standard normal values of the last sample, kept until the next.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        generator: torch.Generator | None = None,
        frozen: bool = False,
        estimator: Estimator = "weights",
        differentiable: bool = False,
        keeps_noise: bool = True,
    ):
        if estimator not in ("weights", *PERTURBATIONS):
            raise ValueError(f"estimator must be 'weights', 'local' or 'flipout', got {estimator!r}.")
        self.sites = sites
        self.generator = generator
        self.estimator: Estimator = estimator
        self.differentiable = differentiable
        self.keeps_noise = keeps_noise
        self.leaves: dict[str, Tensor] = {}
        self.noise: dict[str, Tensor] = {}
        tied = {module for site in sites if len(site.places) > 1 for module, _ in site.places}
        self._layers: dict[BayesianLayer, dict[str, Site]] = {}
        for site in sites:
            if isinstance(site.module, BayesianLayer):
                self._layers.setdefault(site.module, {})[site.key] = site
        self._perturbed = [
            m for m in self._layers if estimator in PERTURBATIONS and m not in tied and can_draw_output(m)
        ]
        # Memory is kept from sample to sample: on a CPU its allocation costs as much as the arithmetic.
        self._noise: dict[str, Tensor] = {}
        self._deviations = {site.name: site.deviation for site in sites} if frozen else None
        self._small: list[Small | Site] = []  # the sites, small ones that are sampled together as one
        self._small_kinds: list[Any] = []  # of the means, when they were found
        self._scratch = Scratch()

    @contextmanager
    def draw(self, noise: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Compute with a new sample inside the scope; see `sampled`."""
        if noise is not None and self.estimator == "local":
            raise ValueError(
                "noise must be None under estimator='local', which samples outputs, got values for weights."
            )
        normal = StandardNormal(self.generator)
        self.leaves, self.noise = {}, {}
        perturbations: dict[nn.Module, Perturbation] = {
            layer: PERTURBATIONS[self.estimator](self.estimator, self.generator) for layer in self._perturbed
        }
        apart = noise is not None or self.differentiable or not is_eager()
        together = [] if apart else self._small_sites(perturbations)
        correlated = [layer for layer in self._layers if layer.is_correlated and layer not in perturbations]
        joint = {self._layers[layer][key].name for layer in correlated for key in layer.correlated_tensors()}
        values: dict[str, Tensor] = {}
        for site in together or self.sites:
            if isinstance(site, Small):
                values |= self._draw_together(site, normal)
            elif noise is None and site.name in joint:
                self.noise[site.name] = self._noise_of(site, site.mean, normal)
            elif (value := self._draw_site(site, noise, normal, perturbations.get(site.module))) is not None:
                values[site.name] = value
        for layer in correlated:
            values |= self._correlated(layer)
        with placed(self.sites, values, perturbations):
            yield

    def _small_sites(self, perturbations: Mapping[nn.Module, Perturbation]) -> list[Small | Site]:
        """Return the sites, small ones together: those of the last draw, while the means are of one kind."""
        means = [site.mean for site in self.sites]
        kinds = [[mean.dtype for mean in means], [mean.device for mean in means]]
        if kinds != self._small_kinds:
            found = sites_together(self.sites, perturbations)
            self._small = [Small.of(bundle) if len(bundle) > 1 else bundle[0][1] for bundle in found]
            self._small_kinds = kinds
        return self._small

    def _draw_together(self, small: Small, normal: StandardNormal) -> dict[str, Tensor]:
        """Return the samples of small sites."""
        normal.fill_(small.noise)
        self.noise |= small.noise_of
        means = [site.mean for site in small.sites]
        deviation = small.deviation
        if self._deviations is None:
            precision = self._scratch.gather(small.places[0], [site.precision for site in small.sites])
            deviation = precision.rsqrt().to(means[0].dtype)
        elif deviation is None:
            deviation = small.deviation = gather([self._deviations[site.name] for site in small.sites])
        torch.mul(small.noise, deviation, out=small.change)
        return dict(zip(small.noise_of, moved(means, small.changes, small.places), strict=True))

    def _draw_site(
        self,
        site: Site,
        noise: Mapping[str, Tensor] | None,
        normal: StandardNormal,
        perturbation: Perturbation | None,
    ) -> Tensor | None:
        """Return the sample of a site; None if its layer samples the output, for which it gets its values here."""
        mean = site.mean
        if noise is None and perturbation is None and self._is_drawn_at_once(site):
            return self._drawn(site, normal)
        deviation = site.deviation if self._deviations is None else self._deviations[site.name]
        if perturbation is not None and self.estimator == "local":
            perturbation.values[site.key] = self._leaf(site, deviation)
            return None
        values = self.noise[site.name] = self._noise_of(site, mean, normal) if noise is None else _given(noise, site)
        if perturbation is not None:
            perturbation.values[site.key] = self._leaf(site, values * deviation)
            return None
        if self.differentiable:
            return mean + self._leaf(site, values * deviation)
        # The node of addcmul keeps nothing for the mean: several backward passes may go through it.
        return torch.addcmul(mean, values, deviation)

    def _is_drawn_at_once(self, site: Site) -> bool:
        return not self.differentiable and site.padding_row is None and fits(site.mean, site.precision)

    def _drawn(self, site: Site, normal: StandardNormal) -> Tensor:
        """Return the sample of a large site, whose noise is kept where somebody asks for it."""
        noise = self._memory(site, site.mean) if self.keeps_noise else None
        if noise is not None:
            self.noise[site.name] = noise
        deviation = None if self._deviations is None else self._deviations[site.name]
        return drawn(site.mean, site.precision, deviation, noise, normal)

    def _correlated(self, layer: BayesianLayer) -> dict[str, Tensor]:
        """Return the samples of a layer's tensors that are correlated, made of their noise."""
        sites = self._layers[layer]
        noise = {key: self.noise[site.name] for key, site in sites.items()}
        return {sites[key].name: sites[key].mean + change for key, change in layer.change(noise).items()}

    def _leaf(self, site: Site, value: Tensor) -> Tensor:
        """Return the value, recorded as the site's leaf if gradients must reach it."""
        if self.differentiable and site.mean.requires_grad:
            self.leaves[site.name] = value.requires_grad_()
        return value

    def _noise_of(self, site: Site, mean: Tensor, normal: StandardNormal) -> Tensor:
        """Return values for one site, in reused memory."""
        noise = normal.fill_(self._memory(site, mean))
        if site.padding_row is not None:
            noise[site.padding_row] = 0
        return noise

    def _memory(self, site: Site, mean: Tensor) -> Tensor:
        """Return the memory of a site's noise."""
        noise = self._noise.get(site.name)
        if noise is None or (noise.device, noise.dtype) != (mean.device, mean.dtype):  # new, or the model has moved
            noise = self._noise[site.name] = torch.empty_like(mean)
        return noise

    def take_noise(self, site: Site) -> tuple[Tensor, bool]:
        """Return what `noise` holds of a site, and whether the caller may overwrite it, for it is no longer kept."""
        values = self.noise[site.name]
        alone = values.numel() > SMALL and self._noise.get(site.name) is values
        if alone:
            del self._noise[site.name]
        return values, alone


def _given(noise: Mapping[str, Tensor], site: Site) -> Tensor:
    values = noise.get(site.name)
    if values is None or values.shape != site.mean.shape:
        got = "none" if values is None else f"shape {tuple(values.shape)}"
        raise ValueError(f"noise must hold '{site.name}' of shape {tuple(site.mean.shape)}, got {got}.")
    if site.padding_row is None:
        return values
    return values.index_fill(0, torch.tensor(site.padding_row, device=values.device), 0)
