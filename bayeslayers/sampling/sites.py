"""The uncertain tensors of a model, and the divergence of its posterior from its prior."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayeslayers import gaussian
from bayeslayers.layers import BayesianLayer


@dataclass(frozen=True)
class Site:
    """One uncertain tensor of a model: `name` is its parameter's name in `model.named_parameters()`.

    The tensors are read from the module each time, so they follow `model.to(...)`. `places` are all
    modules that hold the parameter, each with its name there: of tied weights there is one draw.
    """

    name: str
    module: nn.Module
    key: str
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def mean(self) -> nn.Parameter:
        return self.module._parameters[self.key]  # pyright: ignore[reportReturnType]

    @property
    def value(self) -> Tensor:
        """The tensor that a call computes with: the scope's draw, the mean outside one."""
        return self.module.value(self.key) if isinstance(self.module, BayesianLayer) else getattr(self.module, self.key)

    @property
    def precision(self) -> Tensor:
        return getattr(self.module, f"{self.key}_precision")

    @property
    def prior_mean(self) -> Tensor:
        return getattr(self.module, f"{self.key}_prior_mean")

    @property
    def prior_precision(self) -> Tensor:
        return getattr(self.module, f"{self.key}_prior_precision")


def posterior(model: nn.Module) -> Iterator[Site]:
    """Yield the uncertain tensors of `model`, in the order of its parameters.

    A parameter of any module is uncertain that has a precision beside it, as `attach_posterior` gives it.

    Raises:
        ValueError: If two Bayesian layers share a parameter: it cannot have two posteriors.
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
                f"parameter '{names[1]}' must belong to one Bayesian layer, got that of '{names[0]}'. Use the same "
                "layer twice, or ordinary layers for tied weights."
            )
        if names:
            yield Site(names[0], *places[names[0]], tuple(places.values()))


def kl_divergence(model: nn.Module) -> Tensor:
    """Return KL(posterior || prior) of all Bayesian layers of `model`, in nats."""
    sites = posterior(model)
    terms = [gaussian.kl_divergence(s.mean, s.precision, s.prior_mean, s.prior_precision) for s in sites]
    if not terms:
        raise ValueError("model must have Bayesian layers, got none. Build it from them, as BayesLinear.")
    return torch.stack(terms).sum()
