"""Several posteriors merged into one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bayeslayers.distributions import gaussian
from bayeslayers.distributions.gaussian import in_double
from bayeslayers.layers import STRUCTURE, BayesianLayer
from bayeslayers.likelihoods import likelihood_of
from bayeslayers.method import DEFAULT_METHOD, method_of
from bayeslayers.sampling import Site, posterior, sites_of
from bayeslayers.sampling.placement import at_means
from bayeslayers.storage.card import ABOUT_DATA, Card
from bayeslayers.unwrap import unwrapped


def merge(posteriors: Sequence[nn.Module], method: Literal["product", "average"] = "product") -> nn.Module:
    """Return one model whose posterior combines those of several models of equal architecture.

    "product" is for posteriors from separate shards of data under one prior. Each of the K posteriors
    contains the prior once, so the prior is divided out K - 1 times. The result is the posterior given
    all shards; it is exact where the likelihood is Gaussian in the weights with a diagonal precision
    (`gaussian.product`). "average" is for posteriors of the same data: it gives the Gaussian with
    the mean and variance of their uniform mixture (`gaussian.mixture`).

    Weights are combined entry by entry, which makes sense only for networks whose units correspond,
    because they were trained from common weights. A matrix-variate posterior enters with the marginal
    precision of each entry, and the result is diagonal. What has no posterior is averaged: deterministic
    parameters by their mean, BatchNorm statistics by the mean and variance of their mixture. For the
    product, these statistics are correct if the shards have equal size. Other buffers must be equal.

    Args:
        posteriors: Models, left unchanged, on any devices; the result is on that of the first.
        method: "product" or "average".

    Returns:
        A new model, in the mode of the first. Its card describes the network and has no metrics. Models in
        torch's wrappers are merged without them.

    Raises:
        TypeError: If the list is empty, or an item is not a model.
        ValueError: If the method is unknown, the models differ in architecture, prior or fixed
            buffers, or the product has a precision that is not positive, as where a posterior is less
            certain than the prior.

    Example:
        >>> import torch, bayeslayers as bl
        >>> layers = [bl.BayesLinear(2, 1, prior_precision=1.0, init_precision=3.0) for _ in range(2)]
        >>> float(bl.merge(layers).bias_precision)  # 3 + 3 - 1
        5.0
    """
    models = list(posteriors)
    if not models or not all(isinstance(model, nn.Module) for model in models):
        found = ", ".join(type(model).__name__ for model in models) or "none"
        raise TypeError(f"posteriors must be one model or more, got {found}.")
    if method not in ("product", "average"):
        raise ValueError(f"method must be 'product' or 'average', got {method!r}.")
    meaning, models = likelihood_of(models[0]), [unwrapped(model) for model in models]
    found = [sites_of(models[0], "posteriors"), *(posterior(model) for model in models[1:])]
    sites = [{site.name: site for site in of_model} for of_model in found]
    _check_architecture(models)
    with at_means(models[0]):
        merged = copy.deepcopy(models[0])
    for layer in merged.modules():
        if isinstance(layer, BayesianLayer):
            layer.drop_roots()
            layer.drop_prior_roots()
    own = {name for of_site in map(_names, sites[0].values()) for name in of_site}
    with torch.no_grad():
        for site in posterior(merged):
            _merge_site(site, [each[site.name] for each in sites], method)
        _merge_others(merged, models, own)
    if isinstance(card := getattr(merged, "card", None), Card):
        merged.__dict__["card"] = _merged_card(card, models, method)
    if likelihood_of(merged) != meaning:
        merged.__dict__["likelihood"] = meaning
    return merged


def _names(site: Site) -> tuple[str, ...]:
    return (site.name, *(f"{site.name}_{part}" for part in ("precision", "prior_mean", "prior_precision")))


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors without the correlations of their Gaussians: their precisions are merged instead."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(STRUCTURE)}


def _check_architecture(models: Sequence[nn.Module]) -> None:
    """Raise unless all models have the tensor names and shapes of the first; priors may be scalars or tensors."""
    first = _state(models[0])
    for number, model in enumerate(models[1:], start=1):
        other = _state(model)
        if odd := sorted(first.keys() ^ other.keys()):
            raise ValueError(
                f"posteriors must be of one architecture, got tensor '{odd[0]}' in only one of 0 and {number}."
            )
        for name, tensor in first.items():
            if tensor.shape != other[name].shape and "_prior_" not in name:
                raise ValueError(
                    f"posteriors must be of one architecture, got '{name}' of shape {tuple(tensor.shape)} in "
                    f"posterior 0 and {tuple(other[name].shape)} in posterior {number}."
                )


def _merge_site(merged: Site, sites: Sequence[Site], method: str) -> None:
    """Write the combination of one tensor's posteriors to `merged`, computed in float64."""
    prior_mean, prior_precision = (in_double(tensor) for tensor in (sites[0].prior_mean, sites[0].prior_precision))
    for number, site in enumerate(sites[1:], start=1):
        for part, expected in (("prior_mean", prior_mean), ("prior_precision", prior_precision)):
            if not torch.allclose(in_double(getattr(site, part)), expected, rtol=1e-6, atol=0):
                raise ValueError(
                    f"posteriors must have one prior, got another {part} of '{site.name}' in posterior {number}."
                )
    means = torch.stack([in_double(site.mean) for site in sites])
    precisions = torch.stack([in_double(site.precision) for site in sites])
    if method == "product":
        mean, precision = gaussian.product(means, precisions, prior_mean, prior_precision)
    else:
        mean, precision = gaussian.mixture(means, precisions)
    if not (precision > 0).all():
        raise ValueError(
            f"the product's precision must be > 0, got {float(precision.min()):.4g} in '{merged.name}': there the "
            "posteriors are less certain than their prior. Use method='average'."
        )
    merged.mean.copy_(mean)
    merged.precision.copy_(precision)


def _merge_others(merged: nn.Module, models: Sequence[nn.Module], own: set[str]) -> None:
    """Write the combination of what has no posterior: statistics, deterministic parameters, fixed buffers."""
    states = [_state(model) for model in models]
    target = merged.state_dict()
    parameters = {name for name, _ in merged.named_parameters()}
    for path, module in merged.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None and module.running_var is not None:
            mean, variance, count = (
                f"{path}.{key}" if path else key for key in ("running_mean", "running_var", "num_batches_tracked")
            )
            variances = torch.stack([in_double(state[variance]) for state in states])
            pooled, precision = gaussian.mixture(
                torch.stack([in_double(state[mean]) for state in states]), 1 / variances
            )
            target[mean].copy_(pooled)
            target[variance].copy_(1 / precision)
            if count in target:
                target[count].copy_(sum(state[count].cpu() for state in states))
            own = own | {mean, variance, count}
    for name in target.keys() - own:
        values = torch.stack([in_double(state[name]) for state in states])
        if name in parameters:
            target[name].copy_(values.mean(0))
        elif not (values == values[0]).all():
            raise ValueError(f"posteriors must agree in buffer '{name}', which has no posterior, got others.")


def _merged_card(card: Card, models: Sequence[nn.Module], method: str) -> Card:
    """Return a card with what is known of the merged network without measuring it."""
    names = ", ".join(str(getattr(getattr(model, "card", None), "name", "a model")) for model in models)
    kept = {key: getattr(card, key) for key in (*ABOUT_DATA, "builder", "kwargs")}
    predicts = {method_of(model) for model in models}
    kept["method"] = predicts.pop() if len(predicts) == 1 else DEFAULT_METHOD
    return Card(**kept, notes=f"Merged from {names} by {method}.")
