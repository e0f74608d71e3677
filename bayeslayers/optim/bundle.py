"""Uncertain parameters that move together in a step."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from bayeslayers.sampling import Site
from bayeslayers.sampling.flat import filled, gather, scatter


class Bundle:
    """Uncertain parameters that move together, their tensors gathered when they are first asked for.

    Args:
        parameters: The parameters: one, or small ones of one kind.
        sites: Their sites.
        statistics: Statistics of the step by parameter.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], sites: Mapping[Any, Site], statistics: Mapping[Any, Tensor]
    ) -> None:
        self.parameters = parameters
        self.sites = [sites[p] for p in parameters]
        self._statistics = statistics

    @functools.cached_property
    def mean(self) -> Tensor:
        return gather(self.parameters)

    @functools.cached_property
    def precision(self) -> Tensor:
        return gather([site.precision for site in self.sites])

    @functools.cached_property
    def prior_mean(self) -> Tensor:
        return filled([site.prior_mean for site in self.sites], self.parameters)

    @functools.cached_property
    def prior_precision(self) -> Tensor:
        return filled([site.prior_precision for site in self.sites], self.parameters)

    @functools.cached_property
    def grad(self) -> Tensor:
        return gather([cast(Tensor, p.grad) for p in self.parameters])

    @functools.cached_property
    def statistic(self) -> Tensor:
        return gather([self._statistics[p] for p in self.parameters])

    def write(self) -> None:
        """Write back the mean and the precision, which have been changed in place."""
        scatter(self.mean, self.parameters)
        scatter(self.precision, [site.precision for site in self.sites])
