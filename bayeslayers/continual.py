"""Continual learning: the posterior becomes the prior for the next task."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from bayeslayers.checks import positive
from bayeslayers.distributions.dense_gaussian import marginal_precision as dense_precision
from bayeslayers.distributions.dense_gaussian import strengthened as dense_strengthened
from bayeslayers.distributions.matrix_gaussian import marginal_precision, strengthened, without_scale
from bayeslayers.layers import PRIOR_ROOTS, BayesianLayer
from bayeslayers.layers.correlated import PRIOR_DENSE_ROOT
from bayeslayers.sampling import Site, sites_of


@torch.no_grad()
def posterior_to_prior(model: nn.Module, strength: float = 1.0) -> None:
    """Make the posterior of every uncertain tensor its prior, in place, before training on the next task.

        prior_mean      <- mean
        prior_precision <- prior_precision + strength (precision - prior_precision)

    Training on the next task then starts from what the previous tasks have taught. With strength 1, KL(posterior ||
    prior) is 0, and this is Bayes' rule. A larger strength counts the evidence of the last task that often: a diagonal
    precision, which knows no correlations, lets the weights forget less then. An entry whose precision is below its
    prior's is strengthened at most once, so that the precision stays positive.

    A matrix-variate posterior (`NoisyKFAC`, `KFAC`) becomes a matrix-variate prior, which these methods use as such,
    and so does `laplace`, whose "kron" posterior is rounded to the nearest Kronecker product. A dense posterior
    (`laplace(curvature="full")`) becomes a dense prior. Other methods use the precisions entry by entry.
    Prior means and precisions become tensors of the weights'
    shape, saved with the posterior. An optimiser made for the next task keeps them, whatever its `prior_precision`,
    and one that goes on begins again without momentum.

    A mixture of past posteriors serves as a prior too: `posterior_to_prior(bl.merge(posteriors, "average"))`.

    Source: Nguyen et al. 2018 (arXiv 1710.10628), variational continual learning, Eq. 2; Ritter et al. 2018
    (arXiv 1805.07810) for Kronecker factors.

    Args:
        model: Model with Bayesian layers.
        strength: How often the evidence of the last task counts, > 0.

    Warns:
        UserWarning: If the model has parameters without a posterior, which get no prior and may forget.

    Raises:
        ValueError: If no layer is Bayesian, or the strength is not > 0.

    Example:
        >>> import bayeslayers as bl
        >>> layer = bl.BayesLinear(2, 1, prior_precision=1.0, init_precision=3.0)
        >>> bl.posterior_to_prior(layer, strength=4.0)
        >>> float(layer.bias_prior_precision)  # 1 + 4 (3 - 1)
        9.0
    """
    positive("strength", strength)
    sites = sites_of(model)
    _warn_of_deterministic(model, sites)
    by_module: dict[nn.Module, list[Site]] = {}
    for site in sites:
        by_module.setdefault(site.module, []).append(site)
    for module, own in by_module.items():
        structure = _prior_structure(module, own, strength) if isinstance(module, BayesianLayer) else {}
        for site in own:
            setattr(module, f"{site.key}_prior_precision", _strengthened(site, strength))
            setattr(module, f"{site.key}_prior_mean", site.mean.detach().clone())
        if isinstance(module, BayesianLayer):
            module.set_prior_correlations(structure)
            _set_precisions(module, own)
        vars(module)["prior_version"] = getattr(module, "prior_version", 0) + 1  # optimisers begin again


def _strengthened(site: Site, strength: float) -> Tensor:
    """Return the prior's precision of one tensor of a diagonal posterior."""
    before = site.prior_precision.expand_as(site.mean)
    gained = site.precision - before
    return before + torch.where(gained > 0, strength, min(strength, 1.0)) * gained


def _prior_structure(layer: BayesianLayer, sites: list[Site], strength: float) -> dict[str, Tensor]:
    """Return the correlations of a layer's next prior; none where the posterior is diagonal."""
    if (root := layer.dense_root) is not None:
        if (before := layer.prior_dense_root) is None:
            before = torch.cat([site.prior_precision.expand_as(site.mean).flatten() for site in sites]).rsqrt()
        return {PRIOR_DENSE_ROOT: root.clone() if strength == 1.0 else dense_strengthened(root, before, strength)}
    if (roots := layer.roots) is None:
        return {}
    roots = without_scale(*roots, layer.root_scale)
    if strength != 1.0:
        earlier = layer.prior_roots
        if earlier is None or len(earlier[0]) != len(roots[0]):
            precision = torch.cat([site.prior_precision.expand_as(site.mean).flatten() for site in sites]).mean()
            earlier = (
                torch.eye(len(roots[0])).to(roots[0]) * precision.rsqrt(),
                torch.eye(len(roots[1])).to(roots[1]),
            )
        roots = strengthened(roots, earlier, strength)
    return {name: root.clone() for name, root in zip(PRIOR_ROOTS, roots, strict=True)}


def _set_precisions(layer: BayesianLayer, sites: list[Site]) -> None:
    """Set the prior's precisions of entries that are correlated, as their correlations say."""
    if (root := layer.prior_dense_root) is not None:
        parts = dense_precision(root).split([site.mean.numel() for site in sites])
        for site, part in zip(sites, parts, strict=True):
            getattr(layer, f"{site.key}_prior_precision").copy_(part.view(site.mean.shape))
    if (roots := layer.prior_roots) is None:
        return
    precisions = marginal_precision(*roots)
    columns = layer.get_parameter("weight").shape[1:].numel()
    for site in sites:
        part = precisions[:, :columns] if site.key == "weight" else precisions[:, columns:]
        if part.numel():  # of a bias that the roots do not include there is none
            getattr(layer, f"{site.key}_prior_precision").copy_(part.reshape(site.mean.shape))


def _warn_of_deterministic(model: nn.Module, sites: list[Site]) -> None:
    """Warn of parameters in training that get no prior."""
    uncertain = {site.mean for site in sites}
    names = tuple(name for name, p in model.named_parameters() if p.requires_grad and p not in uncertain)
    if names:
        some = ", ".join(f"'{name}'" for name in names[:3]) + (", ..." if len(names) > 3 else "")
        warnings.warn(
            f"{len(names)} parameters have no posterior and so get no prior ({some}): they may forget earlier tasks. "
            "Freeze them, or convert their layers by bl.to_bayesian.",
            stacklevel=3,
        )
