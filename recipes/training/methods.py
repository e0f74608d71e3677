"""The training methods that a configuration knows by name, each a change of one line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import bayeslayers as bl
from bayeslayers.checks import did_you_mean
from bayeslayers.distributed import is_distributed

_NO_OPTIONS = ("model", "params", "dataset_size", "generator", "groups", "likelihood")  # objects, or of the run


@dataclass(frozen=True)
class Method:
    """A way to train a network.

    Attributes:
        make: Function of (model, dataset size, generator, options) to the optimizer.
        predict: How the trained network predicts, as in `bl.predict`: a posterior by draws, a point
            estimate by its means.
        options: Names of the options that a configuration may give.
        point: Whether it trains the means alone, and leaves the layers' precisions as they are.
    """

    make: Callable[[nn.Module, int, torch.Generator, Mapping[str, Any]], torch.optim.Optimizer]
    predict: str
    options: tuple[str, ...]
    point: bool = False


def _options(kind: Callable[..., torch.optim.Optimizer]) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(kind).parameters if name not in _NO_OPTIONS)


def _posterior(kind: Callable[..., torch.optim.Optimizer], predict: str = "sample") -> Method:
    draws = "generator" in inspect.signature(kind).parameters

    def make(model: nn.Module, size: int, generator: torch.Generator, options: Mapping[str, Any]):
        several = is_distributed()
        own = {key: value for key, value in options.items() if several or key != "shard"}  # one process has all
        sync = options.get("sync", True) if several else False
        return kind(model, size, **({"generator": generator} if draws else {}), **{**own, "sync": sync})

    return Method(make, predict, _options(kind))


def _point(kind: Callable[..., torch.optim.Optimizer]) -> Method:
    """Train the means alone, as a baseline. Option `decay_norms`: false spares scale and shift of norms."""

    def make(model: nn.Module, size: int, generator: torch.Generator, options: Mapping[str, Any]):
        rest = {key: value for key, value in options.items() if key != "decay_norms"}
        groups = model.parameters() if options.get("decay_norms", True) else _norms_apart(model)
        try:
            return kind(groups, **rest)
        except (TypeError, ValueError, LookupError) as error:  # torch compares and indexes whatever it gets
            reason = str(error).rstrip(".")
            raise ValueError(
                f"optimizer must have options that torch's {kind.__name__} takes, got {rest}: {reason}."
            ) from None

    return Method(make, "mean", (*_options(kind), "decay_norms"), point=True)


def _norms_apart(model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters in two groups, that of the norms without weight decay."""
    norms = [model.get_submodule(name) for name in bl.norms(dict(model.named_modules()))]
    spared = [parameter for norm in norms for parameter in norm.parameters()]
    known = {id(parameter) for parameter in spared}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [{"params": others}, {"params": spared, "weight_decay": 0.0}]


METHODS = {
    "vogn": _posterior(bl.VOGN),
    "ogn": _posterior(bl.OGN),
    "ivon": _posterior(bl.IVON),
    "bbb": _posterior(bl.BBB),
    "noisykfac": _posterior(bl.NoisyKFAC),
    "swag": _posterior(bl.SWAG),
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
        raise ValueError(
            f"optimizer must be one of {', '.join(METHODS)}, got {name!r}.{did_you_mean(str(name), METHODS)}"
        )
    return METHODS[name]


def check_options(name: str, options: Iterable[str], advice: str = "") -> None:
    """Refuse options that a method does not have.

    Args:
        name: Of the method.
        options: Names of the options.
        advice: What to do, as a sentence after a space.

    Raises:
        ValueError: If there are any.
    """
    known = METHODS[name].options
    if unknown := [str(key) for key in options if key not in known]:
        meant = did_you_mean(unknown[0], known) if len(unknown) == 1 else ""
        raise ValueError(
            f"optimizer {name!r} must get arguments among {', '.join(known)}, got {', '.join(unknown)}.{meant}{advice}"
        )


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
