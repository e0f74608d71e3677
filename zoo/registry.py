"""The registry of networks: names and their builder functions; no code is looked up from a string."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from bayeslayers.checks import did_you_mean
from bayeslayers.storage.card import Card, likelihood_in
from bayeslayers.unwrap import unwrapped

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])
_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register(builder: Builder) -> Builder:
    """Register a function that builds a network under its own name."""
    name = builder.__name__
    if name in _BUILDERS:
        raise ValueError(f"model name must be new, got {name!r} again.")
    _BUILDERS[name] = builder
    return builder


def list_models() -> list[str]:
    """Return the names that `create` accepts, sorted."""
    return sorted(_BUILDERS)


def create(name: str, pretrained: bool | str = False, **kwargs: Any) -> nn.Module:
    """Build a network of Bayesian layers, untrained or with ordinary weights as its means.

    Args:
        name: One of `list_models()`, or "torchvision:NAME", "timm:NAME", "smp:ARCHITECTURE/ENCODER".
        pretrained: Load the library's ordinary weights, for a network of another library; for "smp:" also the name of
            the encoder's weights; for "smp:" and "efficientnet_lite0" also the path of a file of them.
        kwargs: Arguments of its builder, plain values, so that a posterior can record them; for a network of
            another library those of `zoo.backbones.build`.

    Returns:
        The network; its `card` records name and arguments, and its `likelihood` the meaning of the outputs.

    Raises:
        ValueError: If the name is unknown, or `pretrained` asks for weights that do not exist.
        TypeError: If the builder has no such argument, or it gets one value instead of a list.
    """
    if ":" in name:
        from zoo import backbones

        return describe(*backbones.build(name, pretrained, **kwargs))
    if name not in _BUILDERS:
        raise ValueError(f"unknown model {name!r}.{did_you_mean(name, _BUILDERS)} zoo.list_models() has them all.")
    builder = _BUILDERS[name]
    known = dict(inspect.signature(builder).parameters)
    fillable = known.pop("weights", None) is not None
    if unknown := [key for key in kwargs if key not in known]:
        raise TypeError(f"arguments of model {name!r} must be among {', '.join(known)}, got {unknown[0]!r}.")
    for key, value in kwargs.items():
        if isinstance(known[key].default, tuple) and not isinstance(value, Sequence):
            raise TypeError(f"{key} of model {name!r} must be a list, got {value!r}.")
    model = builder(**kwargs, **_weights(name, pretrained, fillable))
    size = list(kwargs.get("input_size", known["input_size"].default))
    return describe(model, Card(name=name, builder=name, kwargs=kwargs, input_size=size))


def _weights(name: str, pretrained: bool | str, fillable: bool) -> dict[str, str]:
    """Return the argument by which one of the zoo's own networks gets a file of ordinary weights."""
    if pretrained is False:
        return {}
    if not fillable:
        raise ValueError(f"pretrained must be False for {name!r}: it has no ordinary weights. zoo.load has posteriors.")
    if pretrained is True:
        raise ValueError(f"pretrained must be False or a file of weights for {name!r}, got True: it downloads none.")
    return {"weights": pretrained}


def rebuild(card: Card) -> nn.Module:
    """Build the network that a card describes, which may be untrusted: nothing is downloaded.

    Args:
        card: Card with the name of a builder.

    Raises:
        ValueError: If the builder or an argument is not what `create` takes.
        TypeError: If the builder has no such argument.
    """
    if unknown := {"name", "pretrained"} & card.kwargs.keys():
        raise ValueError(f"a card must not have the argument {min(unknown)!r}.")
    return create(str(card.builder), **card.kwargs)


def describe(model: nn.Module, card: Card) -> nn.Module:
    """Give a network its card, and the card's likelihood."""
    model.__dict__.update(card=card, likelihood=likelihood_in(card))
    return model


def card_of(model: nn.Module) -> Card:
    """Return the card of a network of the zoo, also inside torch's wrappers.

    Raises:
        TypeError: If it has no card.
    """
    card = getattr(unwrapped(model), "card", None)
    if not isinstance(card, Card):
        raise TypeError(f"model must come from zoo.create or zoo.load, got a {type(model).__name__} without a card.")
    return card
