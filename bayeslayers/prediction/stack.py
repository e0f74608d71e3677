"""Samples of large weights, and of many small ones together, in memory that is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayeslayers.curvature.kernels.draw import StandardNormal
from bayeslayers.sampling import Site
from bayeslayers.sampling.flat import gather


class Stack:
    """Samples of some sites, of one that is large or of many small ones in a flat tensor.

    Args:
        sites: The sites.

    Attributes:
        mean: Their mean, `(*)`.
        values: By site, its noise or, later, its samples `(s, *)`.
    """

    def __init__(self, sites: Sequence[Site]):
        self.sites, self.padding = sites, sites[0].padding_row
        self.mean = gather([site.mean.detach() for site in sites])
        self._deviation = gather([site.deviation for site in sites])
        self._memory = self.mean.new_empty(0)
        self.values: dict[Site, Tensor] = {}

    def hold(self, count: int) -> None:
        """Provide memory for so many samples, that of earlier ones if it suffices."""
        if len(self._memory) >= count:
            return
        self._memory, self.values = self.mean.new_empty(0), {}
        one = torch.empty_like(self.mean)  # the order of noise depends on the layout
        self._memory = one.new_empty(count * one.numel()).as_strided((count, *one.shape), (one.numel(), *one.stride()))
        self.values = {self.sites[0]: self._memory}
        if len(self.sites) > 1:
            parts = self._memory.split([site.mean.numel() for site in self.sites], 1)
            self.values = {
                site: part.view(count, *site.mean.shape) for site, part in zip(self.sites, parts, strict=True)
            }

    def fill(self, index: int | slice, normal: StandardNormal, antithetic: bool, noise: bool) -> None:
        """Write a sample, or several from one stream of noise.

        Args:
            index: Its number, or theirs.
            normal: Source of the noise.
            antithetic: Write a second one, of the next number, with the opposite noise.
            noise: Write noise alone.
        """
        rows = self._memory[index]
        if isinstance(index, int) and not (antithetic or noise) and self.padding is None:
            normal.sample_(rows, self.mean, self._deviation, self._deviation, None)
            return
        normal.fill_(rows)
        if self.padding is not None:
            rows.select(-self.mean.dim(), self.padding).zero_()
        for sign in (-1, 1)[not antithetic :]:
            out = rows if sign > 0 or isinstance(index, slice) else self._memory[index + 1]
            if noise:
                torch.mul(rows, sign, out=out)
            else:
                torch.addcmul(self.mean, rows, self._deviation, value=sign, out=out)
