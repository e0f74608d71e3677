"""What a step with Kronecker factors keeps of a layer: averages of its factors, their inverses and roots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bayeslayers.distributions.low_rank import Reduced, inverse_with_root
from bayeslayers.distributions.matrix_gaussian import damp, damping_shares, inverse, inverse_root, is_zero_product
from bayeslayers.dtypes import at_least_float32
from bayeslayers.optim.averages import corrected_weight
from bayeslayers.optim.matrix_prior import MatrixPrior
from bayeslayers.sampling import Site

FACTORS = ("input", "output")


def averaged(old: dict[str, Any], found: tuple[Tensor, Tensor], factor_lr: float) -> dict[str, Any]:
    """Return a layer's state with new factors in its averages.

    Args:
        old: The state; without averages, the first factors are theirs.
        found: The new factors.
        factor_lr: Their weight.
    """
    updates = old.get("updates", 0) + 1
    weight = corrected_weight(factor_lr, updates)
    pairs = zip(FACTORS, found, strict=True)
    new = {key: at_least_float32(old[key]).lerp(x, weight) if key in old else x for key, x in pairs}
    return {**old, **new, "updates": updates}


def starting_share(site: Site, input_factor: Tensor, ess: float) -> float:
    """Return the multiple of I that makes up a layer's precision as G, in the mean over the diagonal of A."""
    inputs, mean_input = len(input_factor), float(input_factor.diagonal().mean())
    precision, prior = (_mean_over_matrix(site.module, name, inputs) for name in ("precision", "prior_precision"))
    return (precision - prior) / ess / mean_input if precision > prior and mean_input > 0 else 0.0


def inverses(
    site: Site,
    factors: tuple[Tensor, Tensor],
    prior: MatrixPrior | None,
    ess: float,
    damping: float,
    tolerance: float,
    old: Mapping[str, Any],
    draws: bool,
) -> dict[str, Any]:
    """Return what a layer's state keeps of the inverses that a step multiplies by, and of the roots of the posterior.

    Args:
        site: The layer's weight.
        factors: The averages of A and G.
        prior: The layer's prior, if it is matrix-variate.
        ess: Effective sample size.
        damping: Added to the curvature in the step.
        tolerance: By how much of itself an eigenvalue of an inverse may be too large, and of a covariance's factor.
        old: What the state keeps of the last inverses and roots, near which the new ones are looked for.
        draws: Whether training multiplies noise by the roots; otherwise they are whole.
    """
    if prior is None:
        precision = _mean_over_matrix(site.module, "prior_precision", len(factors[0])) / ess
        found, roots = _reduced(factors, precision + damping, precision, tolerance, old, draws)
    else:
        found, roots = _with_matrix_prior(factors, prior, damping, ess)
    roots = roots[0], roots[1].scaled(ess**-0.5)
    kept = {f"{name}_inverse": each.matrix for name, each in zip(FACTORS, found, strict=True)}
    rest = {f"{name}_rest": each.rest for name, each in zip(FACTORS, found, strict=True)}
    return {**kept, **rest, "roots": roots}


def _reduced(
    factors: tuple[Tensor, Tensor],
    damping: float,
    precision: float,
    tolerance: float,
    old: Mapping[str, Any],
    draws: bool,
) -> tuple[list[Reduced], list[Reduced]]:
    """Return the inverses of damped factors, and the roots of those with the prior's precision alone."""
    if is_zero_product(*factors):
        factors = torch.zeros_like(factors[0]), torch.zeros_like(factors[1])
    dampings = zip(damping_shares(*factors, damping), damping_shares(*factors, precision), strict=True)
    pairs = [
        inverse_with_root(factor, *each, tolerance, _start(old, name, factor), draws)
        for name, factor, each in zip(FACTORS, factors, dampings, strict=True)
    ]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _start(old: Mapping[str, Any], name: str, factor: Tensor) -> Tensor | None:
    """Return the directions of a factor's last root or inverse, None where neither was reduced."""
    for kind in ("root", "inverse"):
        rest = "root_rest" if kind == "root" else "rest"
        if old.get(f"{name}_{rest}") and len(old[f"{name}_{kind}"]) == len(factor):
            return old[f"{name}_{kind}"].to(factor)
    return None


def _with_matrix_prior(
    factors: tuple[Tensor, Tensor], prior: MatrixPrior, damping: float, ess: float
) -> tuple[list[Reduced], list[Reduced]]:
    """Return the same, whole, under a matrix-variate prior, in whose coordinates factors are damped."""
    whitened, precision = prior.whitened(*factors), 1 / ess
    of_step = damp(*whitened, precision + prior.damping(damping))
    roots = prior.restored(*(inverse_root(each) for each in damp(*whitened, precision)))
    pairs = zip((prior.input_root, prior.output_root), of_step, strict=True)
    return [Reduced(root @ inverse(each) @ root.mT) for root, each in pairs], [Reduced(root) for root in roots]


def inverse_in(state: Mapping[str, Any], name: str) -> Reduced:
    """Return one of the inverses that a layer's state keeps.

    Args:
        state: The layer's.
        name: One of `FACTORS`.
    """
    return Reduced(at_least_float32(state[f"{name}_inverse"]), state[f"{name}_rest"])


def _mean_over_matrix(layer: Any, name: str, inputs: int) -> float:
    """Return the mean of a buffer over a layer's matrix of so many columns: factors have room for one number."""
    columns = layer.weight.shape[1:].numel()
    total = float(getattr(layer, f"weight_{name}").mean()) * columns
    if inputs > columns:
        total += float(getattr(layer, f"bias_{name}").mean())
    return total / inputs
