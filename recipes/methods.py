"""The training methods that a configuration knows by name, each a change of one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import bayeslayers as bl
from bayeslayers.checks import near


@dataclass(frozen=True)
class Method:
    """A way to train a network.

    Attributes:
        make: Function of (model, dataset size, generator, options) to the optimizer.
        predict: How the trained network predicts, as in `bl.predict`: a posterior by draws, a point
            estimate by its means.
        point: Whether it trains the means alone, and leaves the layers' precisions as they are.
    """

    make: Callable[[nn.Module, int, torch.Generator, Mapping[str, Any]], torch.optim.Optimizer]
    predict: str
    point: bool = False


def _posterior(kind: Callable[..., torch.optim.Optimizer], predict: str = "sample") -> Method:
    def make(model: nn.Module, size: int, generator: torch.Generator, options: Mapping[str, Any]):
        return kind(model, size, generator=generator, **options)

    return Method(make, predict)


def _point(kind: Callable[..., torch.optim.Optimizer]) -> Method:
    """Train the means alone: the deterministic twin. Option `decay_norms`: false spares scale and shift of norms."""

    def make(model: nn.Module, size: int, generator: torch.Generator, options: Mapping[str, Any]):
        rest = {key: value for key, value in options.items() if key != "decay_norms"}
        if options.get("decay_norms", True):
            return kind(model.parameters(), **rest)
        norms = [model.get_submodule(name) for name in bl.norms(dict(model.named_modules()))]
        spared = [parameter for norm in norms for parameter in norm.parameters()]
        known = {id(parameter) for parameter in spared}
        others = [parameter for parameter in model.parameters() if id(parameter) not in known]
        return kind([{"params": others}, {"params": spared, "weight_decay": 0.0}], **rest)

    return Method(make, "mean", point=True)


METHODS = {
    "vogn": _posterior(bl.VOGN),
    "ogn": _posterior(bl.OGN),
    "ivon": _posterior(bl.IVON),
    "bbb": _posterior(bl.BBB),
    "noisykfac": _posterior(bl.NoisyKFAC),
    "kfac": _posterior(bl.KFAC, "mean"),
    "adam": _point(torch.optim.Adam),
    "adamw": _point(torch.optim.AdamW),
    "sgd": _point(torch.optim.SGD),
}


def method_of(optimizer: Mapping[str, Any]) -> Method:
    """Return the method that `optimizer["name"]` names.

    Raises:
        ValueError: If there is no such method.
    """
    name = optimizer.get("name")
    if name not in METHODS:
        raise ValueError(f"optimizer must be one of {', '.join(METHODS)}, got {name!r}.{near(str(name), METHODS)}")
    return METHODS[name]


def make_optimizer(
    optimizer: Mapping[str, Any], model: nn.Module, dataset_size: int, seed: int
) -> torch.optim.Optimizer:
    """Return the configured optimizer.

    Args:
        optimizer: `name` of the method, and its options.
        model: The network.
        dataset_size: Training examples.
        seed: Of the draws.
    """
    options = {key: value for key, value in optimizer.items() if key != "name"}
    generator = torch.Generator(next(model.parameters()).device)
    return method_of(optimizer).make(model, dataset_size, generator.manual_seed(seed), options)
