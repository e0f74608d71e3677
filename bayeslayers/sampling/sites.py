"""The uncertain tensors of a model, and the divergence of its posterior from its prior."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayeslayers.distributions import dense_gaussian, gaussian, matrix_gaussian
from bayeslayers.layers import BayesianLayer
from bayeslayers.layers.base import HALF_PRECISIONS
from bayeslayers.layers.scope import NOTHING, scope_for


@dataclass(frozen=True)
class Site:
    """One uncertain tensor of a model: `name` is its parameter's name in `model.named_parameters()`.

    The tensors are read from the module each time, so they follow `model.to(...)`. `places` are all
    modules that hold the parameter, each with its name there, and `names` its names in the model; tied weights share
    one sample.
    """

    name: str
    module: nn.Module
    key: str
    places: tuple[tuple[nn.Module, str], ...]
    names: tuple[str, ...]

    @property
    def mean(self) -> nn.Parameter:
        return self.module._parameters[self.key]  # pyright: ignore[reportReturnType]

    @property
    def value(self) -> Tensor:
        """The tensor that a call computes with: the sample inside a scope, the mean outside."""
        return scope_for(self.module).drawn.get(self.module, NOTHING).get(self.key, self.mean)

    @property
    def precision(self) -> Tensor:
        return self.module._buffers[f"{self.key}_precision"]  # pyright: ignore[reportReturnType]

    @property
    def deviation(self) -> Tensor:
        """The posterior's standard deviation, in the mean's dtype."""
        return self.precision.rsqrt().to(self.mean.dtype)

    @property
    def padding_row(self) -> int | None:
        """The padding row of an embedding, which is deterministic; None if there is none."""
        return self.module.padding_idx if isinstance(self.module, nn.Embedding | nn.EmbeddingBag) else None

    @property
    def prior_mean(self) -> Tensor:
        return self.module._buffers[f"{self.key}_prior_mean"]  # pyright: ignore[reportReturnType]

    @property
    def prior_precision(self) -> Tensor:
        return self.module._buffers[f"{self.key}_prior_precision"]  # pyright: ignore[reportReturnType]

    @property
    def prior_is_posterior(self) -> bool:
        """Whether the prior is an earlier posterior, as `posterior_to_prior` makes it: a tensor, not one number."""
        return self.prior_precision.dim() > 0


def posterior(model: nn.Module) -> Iterator[Site]:
    """Yield the uncertain tensors of `model`, in the order of its parameters.

    A parameter of any module is uncertain if it has a precision beside it; `attach_posterior` adds one.

    Raises:
        ValueError: If two Bayesian layers share a parameter: it cannot have two posteriors.
        TypeError: If a precision has been cast to half precision.
    """
    found: dict[nn.Parameter, dict[str, tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(parameter, {})[f"{path}.{key}" if path else key] = (module, key)
    for places in found.values():
        names = [name for name, (module, key) in places.items() if f"{key}_precision" in module._buffers]
        if len(names) > 1:
            raise ValueError(
                f"parameter '{names[1]}' must belong to one Bayesian layer, got that of '{names[0]}' too. Use the same "
                "layer twice, or ordinary layers for tied weights."
            )
        if names:
            site = Site(names[0], *places[names[0]], tuple(places.values()), tuple(places))
            if site.precision.dtype in HALF_PRECISIONS:
                raise TypeError(
                    f"the precision of '{site.name}' must be in float32 or wider, got {site.precision.dtype}, in which "
                    "large values overflow. Cast the network before it gets its posterior, or use autocast."
                )
            yield site


def sites_of(model: nn.Module, argument: str = "model") -> list[Site]:
    """Return the uncertain tensors of a model, which must have at least one.

    Args:
        model: Model.
        argument: Name of the caller's argument, for the message.

    Raises:
        ValueError: If it has none, and as for `posterior`.
    """
    if sites := list(posterior(model)):
        return sites
    raise ValueError(
        f"{argument} must have Bayesian layers, got none. Build it from layers such as BayesLinear, or "
        "convert it by bl.to_bayesian."
    )


def kl_divergence(model: nn.Module) -> Tensor:
    """Return KL(posterior || prior) of all Bayesian layers, in nats; with correlations where layers have them."""
    by_module: dict[nn.Module, dict[str, Site]] = {}
    for site in sites_of(model):
        by_module.setdefault(site.module, {})[site.key] = site
    terms = []
    for module, sites in by_module.items():
        joint: tuple[str, ...] = ()
        if isinstance(module, BayesianLayer) and (joint := module.correlated_tensors()):
            terms.append(_kl_of_joint(module, [sites[key] for key in joint]))
        terms += [
            gaussian.kl_divergence(s.mean, s.precision, s.prior_mean, s.prior_precision)
            for key, s in sites.items()
            if key not in joint
        ]
    return torch.stack(terms).sum()


def _kl_of_joint(layer: BayesianLayer, sites: list[Site]) -> Tensor:
    """Return the divergence of tensors of a layer that are correlated."""
    values = [[getattr(s, name).expand_as(s.mean) for s in sites] for name in ("mean", "prior_mean", "prior_precision")]
    if (root := layer.dense_root) is not None:
        mean, prior_mean, precision = (torch.cat([part.flatten() for part in parts]) for parts in values)
        prior_root = layer.prior_dense_root
        prior_root = precision.rsqrt() if prior_root is None else prior_root
        return dense_gaussian.kl_divergence(mean, root, prior_mean, prior_root).to(mean)
    mean, prior_mean, precision = (matrix_gaussian.as_matrix(*parts) for parts in values)
    roots, prior_roots, scale = layer.roots, layer.prior_roots, layer.root_scale
    assert roots is not None
    if prior_roots is not None and len(prior_roots[0]) == len(roots[0]):
        return matrix_gaussian.divergence_of_matrices(mean, roots, prior_mean, prior_roots, scale).to(mean)
    return matrix_gaussian.kl_divergence(mean, *roots, prior_mean, precision, scale)
