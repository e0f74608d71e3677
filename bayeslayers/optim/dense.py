"""The step of a layer whose curvature is one dense block: all entries move together, and are correlated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayeslayers.convert.selection import Selectors, select
from bayeslayers.curvature.accumulate import BLOCK
from bayeslayers.distributions import dense_gaussian
from bayeslayers.distributions.gaussian import in_double
from bayeslayers.layers import BayesianLayer
from bayeslayers.layers.correlated import DENSE_ROOT, LARGEST_BLOCK
from bayeslayers.optim.averages import corrected_weight
from bayeslayers.sampling import Site


@dataclass(frozen=True, eq=False)
class DenseBlock:
    """A layer whose tensors have one dense curvature H `(d, d)`, a mean over examples, and one Gaussian posterior.

        N(m, R R^T),  (R R^T)^-1 = ess H + P0

    Attributes:
        sites: The layer's tensors, one after the other as they are in H.
        name: The layer's name.
    """

    sites: Sequence[Site]
    name: str

    @property
    def layer(self) -> Any:
        """The layer."""
        return self.sites[0].module

    @property
    def statistic(self) -> str:
        """Name of the curvature among a scope's statistics."""
        return f"{self.name}.{BLOCK}" if self.name else BLOCK

    @property
    def is_whole(self) -> bool:
        """Whether no tensor is frozen; the others of a layer with a frozen one have diagonal posteriors."""
        return all(site.mean.requires_grad for site in self.sites)

    def averaged(self, old: Mapping[str, Any], found: Tensor, factor_lr: float, ess: float, fades: bool) -> dict:
        """Return the state with a new curvature in its moving average.

        Args:
            old: State of the layer's first tensor.
            found: The new curvature.
            factor_lr: Its weight.
            ess: Effective sample size.
            fades: Whether what the precision at the start is above the prior's is added, and fades.
        """
        if "block" not in old:
            start = [(s.precision - s.prior_precision).expand_as(s.mean).flatten() / ess for s in self.sites]
            return {"updates": 1, "block": found, "start": torch.cat(start).clamp_min(0) * fades}
        weight = corrected_weight(factor_lr, old["updates"] + 1)
        return {**old, "block": old["block"].to(found).lerp(found, weight), "updates": old["updates"] + 1}

    def solved(self, state: Mapping[str, Any], factor_lr: float, ess: float, damping: float) -> dict[str, Tensor]:
        """Return the inverse that a step multiplies by, in units of the mean loss, and the posterior's root.

        Args:
            state: With the average, as `averaged` returns it.
            factor_lr: Weight of a new curvature.
            ess: Effective sample size.
            damping: Added to the curvature in the step.
        """
        rest = in_double(state["start"]) * (1 - factor_lr) ** state["updates"]
        curvature = in_double(state["block"]) + rest.diag()
        root, _ = dense_gaussian.posterior_root(ess * curvature, self._prior_root())
        covariance = root @ root.mT
        if damping:
            unit = torch.eye(len(covariance)).to(covariance)
            covariance = torch.linalg.solve(unit + ess * damping * covariance, covariance)
        kind = self.sites[0].precision.dtype
        return {"inverse": (ess * covariance).to(state["block"].dtype), "root": root.to(kind)}

    def pull(self) -> Tensor:
        """Return the gradient `(d,)` of the prior's minus log density."""
        differences = torch.cat([(s.mean - s.prior_mean).flatten() for s in self.sites])
        root = self._prior_root()
        if root.dim() == 1:
            return differences / root.square().to(differences)
        return torch.cholesky_solve(in_double(differences)[:, None], _lower(root))[:, 0].to(differences)

    def move(self, step: Tensor, root: Tensor | None) -> None:
        """Move the means by a step `(d,)`, and give the layer a new posterior root, unless that is None.

        Args:
            step: What is added.
            root: R.
        """
        sizes = [site.mean.numel() for site in self.sites]
        precision = None if root is None else dense_gaussian.marginal_precision(root).split(sizes)
        for i, (site, part) in enumerate(zip(self.sites, step.split(sizes), strict=True)):
            site.mean.add_(part.view(site.mean.shape))
            if precision is not None:
                site.precision.copy_(precision[i].view(site.mean.shape))
        if root is not None:
            self.layer.set_correlations({DENSE_ROOT: root})

    def _prior_root(self) -> Tensor:
        """Return the root of the prior's covariance, or the standard deviations of its independent entries."""
        if (root := self.layer.prior_dense_root) is not None:
            return in_double(root)
        if self.layer.prior_roots is not None:
            raise ValueError(
                f"the prior of layer '{self.name}' must be dense or of independent entries under dense=, got a "
                "matrix-variate one. Leave the layer out of dense."
            )
        return in_double(torch.cat([s.prior_precision.expand_as(s.mean).flatten() for s in self.sites])).rsqrt()


def dense_blocks(
    model: nn.Module, selectors: Selectors | None, sites: Mapping[nn.Parameter, Site]
) -> Iterator[DenseBlock]:
    """Yield the selected layers.

    Args:
        model: The model.
        selectors: Which layers; None for none.
        sites: The uncertain tensors by their parameters.

    Raises:
        ValueError: If a selected layer has no such curvature, shares a tensor, or has too many entries.
    """
    if selectors is None:
        return
    chosen = select(model, selectors, "dense", lambda module: isinstance(module, BayesianLayer))
    for name, layer in model.named_modules():
        if layer not in chosen or not any(True for _ in layer.parameters(recurse=False)):
            continue
        if not isinstance(layer, BayesianLayer) or layer.factor_sizes() is None:
            raise ValueError(
                f"dense must select linear layers and convolutions, got '{name}', a {type(layer).__name__}. Leave it "
                "out."
            )
        tensors = layer.own_tensors().values()
        own = [sites[x] for x in tensors if isinstance(x, nn.Parameter) and x in sites]
        if len(own) < len(tensors) or any(len(site.places) > 1 for site in own):
            raise ValueError(f"dense must select layers that own their tensors, got '{name}'. Leave it out.")
        if (entries := sum(x.numel() for x in tensors)) > LARGEST_BLOCK:
            raise ValueError(
                f"dense must select layers of at most {LARGEST_BLOCK:,} weights, got '{name}' with {entries:,}. Leave "
                "it out: its curvature is in Kronecker factors then."
            )
        yield DenseBlock(own, name)


def _lower(root: Tensor) -> Tensor:
    return torch.linalg.cholesky(root @ root.mT)
