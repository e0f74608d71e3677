"""The state of each uncertain tensor of a network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayeslayers.optim import IVON, OGN, VOGN
from bayeslayers.sampling import Site
from bayeslayers.sampling.sites import sites_of

_UNTOUCHED = 2.0  # a precision below twice the prior's: the data has told less than the prior


@dataclass(frozen=True)
class TensorDiagnosis:
    """What one uncertain tensor of a network holds.

    Attributes:
        name: Name of the parameter.
        shape: Its shape.
        signal_to_noise: Median of abs(mean) / standard deviation.
        undecided: Share of entries with abs(mean) below the standard deviation, whose sign is open.
        noise: Root mean square of the standard deviations over that of the means.
        precision_over_prior: Median of the precision over the prior's.
        precision_range: Greatest precision over the least; 1 where no step has moved them.
        untouched: Share of entries whose precision is below twice the prior's: most of it is the prior.
        at_prior: Share of entries that are untouched, and whose mean is within half of the prior's standard deviation
            of the prior's mean: they carry nothing.
        prior_is_posterior: Whether the prior is an earlier posterior, as in continual learning.
        effective_lr: Median of lr ess / precision, by how many gradients an entry of the mean moves in a step; NaN
            without an optimizer.
    """

    name: str
    shape: tuple[int, ...]
    signal_to_noise: float
    undecided: float
    noise: float
    precision_over_prior: float
    precision_range: float
    untouched: float
    at_prior: float
    prior_is_posterior: bool
    effective_lr: float = math.nan

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@torch.no_grad()
def tensors_of(model: nn.Module, optimizer: VOGN | OGN | IVON | None = None) -> Iterator[TensorDiagnosis]:
    """Yield the state of each uncertain tensor of a model."""
    for site in sites_of(model):
        mean, precision, prior_mean, prior_precision = _entries(site)
        deviation = precision.rsqrt()
        snr, ratio = mean.abs() / deviation, precision / prior_precision
        untouched = ratio < _UNTOUCHED
        at_prior = untouched & ((mean - prior_mean).abs() < prior_precision.rsqrt() / 2)
        lr = math.nan if optimizer is None else float(optimizer.effective_lr(site.mean).median())
        yield TensorDiagnosis(
            site.name,
            tuple(site.mean.shape),
            float(snr.median()),
            _share(snr < 1),
            float(deviation.square().mean().sqrt() / mean.square().mean().sqrt()),
            float(ratio.median()),
            float(precision.max() / precision.min()),
            _share(untouched),
            _share(at_prior),
            site.prior_is_posterior,
            lr,
        )


def _entries(site: Site) -> list[Tensor]:
    """Return mean, precision and prior of the entries that have a posterior, each `(entries,)`, in float64."""
    parts = (site.mean, site.precision, site.prior_mean, site.prior_precision)
    whole = [part.expand_as(site.mean).detach().double() for part in parts]
    if site.padding_row is not None:
        kept = torch.arange(len(site.mean), device=site.mean.device) != site.padding_row
        whole = [part[kept] for part in whole]
    return [part.flatten() for part in whole]


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())
