"""The values that VOGN and IVON choose together where no `lr` is given, from dataset_size and the layers' fan-in.

With N examples at temperature T, ess = N / T:

    P = max(ess, 250 fan_in)                    precision of the posterior at the start (IVON: w times as much)
    prior_precision = ess / 1000                a weight decay of 1e-3 (VOGN; IVON has its own, 1e-4)
    lr = 0.5 w P / ess                          an entry of the mean moves by 0.5 w gradients (IVON: 0.3 w) ...
    clip_radius = 0.003 w^-1.4 / lr             ... and by 0.003 w^-1.4 at most
    w = max(1, fan_in / 700)                    how wide the network is

P is one value for all layers, with `fan_in` the mean over their weights. Noise of variance 1/P on the weights of a
unit with n inputs adds n / P times their mean square to what it sums: at P = ess this swamps wide layers
wherever there are few examples, at P = 250 fan_in it is 1/16 of the inputs. The temperature stays 1: the
precision starts high and then follows the data at `precision_lr`, so a short run ends before it has reached its
fixed point, and its posterior is narrower than that of a long one.

The bound on the step makes it that of Adam's size where gradients are large, whatever the scale of the
loss, and keeps the step small as the precision leaves its start. What a unit sums moves by at most fan_in times
the bound, so the bound falls with the width; gradients of wide networks are smaller, so the factor rises. VOGN's
precisions rise with the squared gradients from the first step on. IVON's Hessians are too noisy for that, so that the
noise of a wide network stays what it was at the start, and must start smaller. All three were chosen on a
ResNet-18, whose w is 5. The prior weighs prior_precision T / N against the data: with 50,
what layers are built with, 450 examples do not move the weights far from 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bayeslayers.checks import positive, size
from bayeslayers.layers.base import DEFAULT_INIT_PRECISION, DEFAULT_PRIOR_PRECISION
from bayeslayers.sampling import Site

LR = 0.5
LARGEST_MOVE = 3e-3
WIDE = 700.0
PRECISION_LR = 1e-3
START = 250.0
PRIOR = 1e-3
ADAM_LR = 1e-3  # of parameters that are not Bayesian


def fan_in(parameter: Tensor) -> int:
    """Return the number of a unit's inputs; 1 for a bias or the scale of a norm."""
    return parameter.shape[1:].numel()


def mean_fan_in(parameters: Iterable[Tensor]) -> float:
    """Return the mean over all weights of their units' numbers of inputs; 0 without weights."""
    weights = [p for p in parameters if p.dim() > 1]
    return sum(p.numel() * fan_in(p) for p in weights) / max(1, sum(p.numel() for p in weights))


def start_precision(parameters: Iterable[Tensor], ess: float) -> float:
    """Return the precision P that a posterior starts at."""
    return max(ess, START * mean_fan_in(parameters))


def width_of(parameters: Iterable[Tensor]) -> float:
    """Return how wide a network is, w >= 1."""
    return max(1.0, mean_fan_in(parameters) / WIDE)


def step_size(width: float, factor: float = LR) -> tuple[float, float]:
    """Return by how many gradients an entry of the mean moves in a step, and by how much at most."""
    return factor * width, LARGEST_MOVE / width**1.4


def chosen_for_ivon(
    model: object, dataset_size: int, temperature: float, hess_init: float | None, weight_decay: float, factor: float
) -> tuple[float, float, float]:
    """Return `hess_init`, unless given, by how many gradients a weight moves in a step, and the bound on the step."""
    # What is not a network has no parameters here, and is refused later.
    trained = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    width = width_of(trained)
    if hess_init is None:
        ess = size("dataset_size", dataset_size) / positive("temperature", temperature)
        hess_init = width * start_precision(trained, ess) / ess
    moves, largest = step_size(width, factor)
    return hess_init, moves, largest / (moves * (hess_init + weight_decay))


def fill_untrained(sites: Sequence[Site], ess: float, *, prior: bool, precision: bool) -> float:
    """Write prior and first precision where the layers have theirs by default; return the mean precision over ess.

    A trained or loaded posterior keeps both: its precisions differ from entry to entry. So does a layer that was
    built with other values than the default ones, and a prior that is a tensor, as continual learning makes it.

    Args:
        sites: The uncertain tensors.
        ess: Effective sample size.
        prior: Whether to choose priors.
        precision: Whether to choose precisions.
    """
    start, total = start_precision([site.mean for site in sites], ess), 0.0
    for site in sites:
        values = site.precision.flatten()
        if values.numel() and bool((values == values[0]).all()):
            if prior and site.prior_precision.dim() == 0 and float(site.prior_precision) == DEFAULT_PRIOR_PRECISION:
                site.prior_precision.fill_(PRIOR * ess)
            if precision and float(values[0]) == DEFAULT_INIT_PRECISION:
                site.precision.fill_(start)
        total += float(site.precision.sum())
    return total / sum(site.mean.numel() for site in sites) / ess


def prior_hessian(sites: Sequence[Site], ess: float) -> float:
    """Return the mean precision over ess where all priors are earlier posteriors, else 0."""
    if not sites or not all(site.prior_is_posterior for site in sites):
        return 0.0
    return sum(float(site.precision.sum()) for site in sites) / sum(site.mean.numel() for site in sites) / ess


def with_plain_steps(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return groups of which those with an `lr` of their own have no bound on the step unless they name one."""
    return [{"clip_radius": float("inf"), **group} if "lr" in group else dict(group) for group in groups]


def warn_of_prior(prior_precision: float, ess: float) -> None:
    """Warn where the given prior counts for more than all examples together."""
    if prior_precision > ess:
        warnings.warn(
            f"prior_precision {prior_precision:g} outweighs the data, dataset_size / temperature = {ess:g}: the "
            "weights will stay near the prior's mean. Lower prior_precision, or the temperature.",
            stacklevel=6,
        )
