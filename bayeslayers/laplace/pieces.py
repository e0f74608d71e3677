"""The independent pieces of a posterior: a tensor with a diagonal curvature, or a layer with one that is structured.

Each piece knows the eigenvalues of its curvature, how much it lowers the evidence, and how it is written to its layer.
With a prior N(m0, R0 R0^T), the eigenvalues x of R0^T H R0 for its curvature H, and the distance
d = |R0^-1 (m - m0)|^2, it lowers the evidence by 1/2 [ d + sum log(1 + x) ].
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayeslayers.distributions import dense_gaussian, matrix_gaussian
from bayeslayers.distributions.gaussian import in_double
from bayeslayers.layers import BayesianLayer
from bayeslayers.layers.correlated import DENSE_ROOT
from bayeslayers.sampling import Site


@dataclass(frozen=True)
class Piece(abc.ABC):
    """Tensors of one layer whose posterior is independent of all others.

    Attributes:
        sites: Their sites.
    """

    sites: Sequence[Site]

    @property
    def layer(self) -> str:
        """The layer's name."""
        return self.sites[0].name.rpartition(".")[0]

    @property
    def distance(self) -> float:
        """The sum of squared distances of the means to the prior's."""
        return sum(float((in_double(s.mean) - in_double(s.prior_mean)).square().sum()) for s in self.sites)

    @abc.abstractmethod
    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues of the curvature."""

    @abc.abstractmethod
    def write(self) -> float:
        """Write the posterior to the layer; return by how much the piece lowers the evidence."""


@dataclass(frozen=True)
class Diagonal(Piece):
    """One tensor with a diagonal curvature.

    Attributes:
        curvature: Of each entry.
    """

    curvature: Tensor

    def eigenvalues(self) -> Tensor:
        return self.curvature

    def write(self) -> float:
        site = self.sites[0]
        site.precision.copy_(self.curvature + site.prior_precision)
        prior_precision = in_double(site.prior_precision)
        scatter = prior_precision * (in_double(site.mean) - in_double(site.prior_mean)).square()
        return 0.5 * float((scatter + (in_double(self.curvature) / prior_precision).log1p()).sum())


@dataclass(frozen=True)
class Dense(Piece):
    """A layer with a dense curvature of all of its entries.

    Attributes:
        curvature: `(d, d)`.
    """

    curvature: Tensor

    def eigenvalues(self) -> Tensor:
        return torch.linalg.eigvalsh(in_double(self.curvature)).clamp_min(0)

    def write(self) -> float:
        layer: Any = self.sites[0].module
        prior_root = layer.prior_dense_root
        if prior_root is None:
            prior_root = torch.cat([s.prior_precision.expand_as(s.mean).flatten() for s in self.sites]).rsqrt()
        prior_root = in_double(prior_root)
        root, values = dense_gaussian.posterior_root(in_double(self.curvature), prior_root)
        parts = dense_gaussian.marginal_precision(root).split([s.mean.numel() for s in self.sites])
        for site, part in zip(self.sites, parts, strict=True):
            site.precision.copy_(part.view(site.mean.shape))
        layer.set_correlations({DENSE_ROOT: root.to(self.sites[0].precision.dtype)})
        differences = torch.cat([(in_double(s.mean) - in_double(s.prior_mean)).flatten() for s in self.sites])
        distance = dense_gaussian.in_prior_units(prior_root, differences[:, None]).square().sum()
        return 0.5 * float(distance + values.log1p().sum())


@dataclass(frozen=True)
class Kronecker(Piece):
    """A layer with a curvature A (x) G of its matrix [weight | bias].

    Attributes:
        input_factor: A, `(i, i)`.
        output_factor: G, `(o, o)`.
    """

    input_factor: Tensor
    output_factor: Tensor

    def eigenvalues(self) -> Tensor:
        values = (torch.linalg.eigvalsh(in_double(x)).clamp_min(0) for x in (self.output_factor, self.input_factor))
        return torch.outer(*values)

    def write(self) -> float:
        layer: Any = self.sites[0].module
        of_input, of_output = self._prior_roots(layer)
        inner, outer = in_double(self.input_factor), in_double(self.output_factor)
        a, q = torch.linalg.eigh(of_input.mT @ inner @ of_input)
        g, u = torch.linalg.eigh(of_output.mT @ outer @ of_output)
        values = torch.outer(g.clamp_min(0), a.clamp_min(0))
        dtype = self.sites[0].precision.dtype
        roots = of_input @ q, of_output @ u, (1 + values).rsqrt()
        layer.set_roots(*(root.to(dtype) for root in roots))
        precision, columns = matrix_gaussian.marginal_precision(*roots), self.sites[0].mean.shape[1:].numel()
        for site, part in zip(self.sites, (precision[:, :columns], precision[:, columns:]), strict=False):
            site.precision.copy_(part.reshape(site.mean.shape))
        difference = matrix_gaussian.as_matrix(*(in_double(s.mean) - in_double(s.prior_mean) for s in self.sites))
        distance = torch.linalg.solve(of_input, torch.linalg.solve(of_output, difference).mT).square().sum()
        return 0.5 * float(distance + values.log1p().sum())

    def _prior_roots(self, layer: BayesianLayer) -> tuple[Tensor, Tensor]:
        """Return the roots of the prior's covariance, which must be a Kronecker product."""
        i, o = len(self.input_factor), len(self.output_factor)
        if (roots := layer.prior_roots) is not None and len(roots[0]) == i:
            return in_double(roots[0]), in_double(roots[1])
        precisions = [in_double(site.prior_precision).flatten() for site in self.sites]
        if roots is not None or layer.prior_dense_root is not None or any(len(p) > 1 for p in precisions):
            raise ValueError(
                f"the prior of layer '{self.layer}' must be one precision or a Kronecker product under "
                "curvature='kron', got another. Use curvature='diagonal' or 'full'."
            )
        columns = torch.cat([precisions[0].expand(i - len(precisions) + 1), *precisions[1:]])
        return columns.rsqrt().diag(), torch.eye(o).to(columns)


def pieces(sites: Sequence[Site], curvature: Mapping[str, Tensor], examples: int, temperature: float) -> list[Piece]:
    """Return the pieces of a posterior from the sums of a pass over the data.

    Args:
        sites: All uncertain tensors.
        curvature: Sums over examples by the names of the tracker's leaves.
        examples: Number of examples.
        temperature: T; the likelihood counts 1/T times.
    """
    by_layer: dict[str, list[Site]] = {}
    for site in sites:
        by_layer.setdefault(site.name.removesuffix(site.key), []).append(site)
    found: list[Piece] = []
    for prefix, own in by_layer.items():
        factors = [curvature.get(f"{prefix}weight_{side}_factor") for side in ("input", "output")]
        if (block := curvature.get(f"{prefix}block")) is not None:
            found.append(Dense(own, block / temperature))
        elif factors[0] is not None and factors[1] is not None:
            found.append(Kronecker(own, factors[0] / examples, factors[1] / temperature))
        else:
            for site in own:
                square = curvature.get(site.name)
                square = torch.zeros_like(site.precision) if square is None else square / temperature
                found.append(Diagonal([site], square))
    return found
