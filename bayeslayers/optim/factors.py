"""What a step with Kronecker factors keeps of a layer: averages of its factors, their inverses and roots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bayeslayers.distributions.low_rank import Inverse, damped_inverse
from bayeslayers.distributions.matrix_gaussian import damp, damping_shares, inverse, inverse_root
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
) -> dict[str, Any]:
    """Return what a layer's state keeps of the inverses that a step multiplies by, and the roots of the posterior.

    Args:
        site: The layer's weight.
        factors: The averages of A and G.
        prior: The layer's prior, if it is matrix-variate.
        ess: Effective sample size.
        damping: Added to the curvature in the step.
        tolerance: Largest relative error of the step's inverses.
    """
    inputs = len(factors[0])
    if prior is None:
        precision = _mean_over_matrix(site.module, "prior_precision", inputs) / ess
    else:
        factors, precision, damping = prior.whitened(*factors), 1 / ess, prior.damping(damping)
    of_posterior, of_step = damp(*factors, precision), damp(*factors, precision + damping)
    roots = inverse_root(of_posterior[0]), inverse_root(of_posterior[1]) * ess**-0.5
    if prior is None:
        shares = damping_shares(*factors, precision + damping)
        found = [damped_inverse(*each, tolerance) for each in zip(of_step, shares, strict=True)]
    else:
        roots = prior.restored(*roots)
        pairs = zip((prior.input_root, prior.output_root), of_step, strict=True)
        found = [Inverse(root @ inverse(each) @ root.mT) for root, each in pairs]
    kept = {f"{name}_inverse": each.matrix for name, each in zip(FACTORS, found, strict=True)}
    rest = {f"{name}_rest": each.rest for name, each in zip(FACTORS, found, strict=True)}
    return {**kept, **rest, "roots": roots}


def inverse_in(state: Mapping[str, Any], name: str) -> Inverse:
    """Return one of the inverses that a layer's state keeps.

    Args:
        state: The layer's.
        name: One of `FACTORS`.
    """
    return Inverse(at_least_float32(state[f"{name}_inverse"]), state[f"{name}_rest"])


def _mean_over_matrix(layer: Any, name: str, inputs: int) -> float:
    """Return the mean of a buffer over a layer's matrix of so many columns: factors have room for one number."""
    columns = layer.weight.shape[1:].numel()
    total = float(getattr(layer, f"weight_{name}").mean()) * columns
    if inputs > columns:
        total += float(getattr(layer, f"bias_{name}").mean())
    return total / inputs
