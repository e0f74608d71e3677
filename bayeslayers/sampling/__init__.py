"""Scopes: `sampled(model)` computes with drawn weights, `tracked(model)` sums squared per-example gradients."""

from bayeslayers.sampling.sampler import Sampler, sampled
from bayeslayers.sampling.sharing import evaluation_mode
from bayeslayers.sampling.sites import Site, kl_divergence, posterior, sites_of
from bayeslayers.sampling.tracker import Tracker, tracked
from bayeslayers.sampling.units import layers_with_curvature

__all__ = [
    "Sampler",
    "Site",
    "Tracker",
    "evaluation_mode",
    "kl_divergence",
    "layers_with_curvature",
    "posterior",
    "sampled",
    "sites_of",
    "tracked",
]
