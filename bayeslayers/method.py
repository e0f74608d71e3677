"""The method by which a model predicts when the caller names none."""

from __future__ import annotations

import dataclasses

from torch import nn

from bayeslayers.storage.card import Card
from bayeslayers.unwrap import unwrapped, unwrapping

DEFAULT_METHOD = "sample"


def method_of(model: nn.Module) -> str:
    """Return the method that a model's card names, else "sample"; torch's wrappers are looked through.

    `laplace` writes "linearised" to the card, and a loaded posterior has the card that it was saved with.
    """
    cards = (getattr(module, "card", None) for module in unwrapping(model))
    return next((card.method for card in cards if isinstance(card, Card)), DEFAULT_METHOD)


def predict_by_samples(model: nn.Module) -> None:
    """Let a Laplace posterior predict by samples after an optimiser has moved it.

    Its curvature is then no longer that of the network linearised at the means.
    """
    network = unwrapped(model)
    card = getattr(network, "card", None)
    if isinstance(card, Card) and card.method == "linearised" and card.optimizer.get("name") == "Laplace":
        network.__dict__["card"] = dataclasses.replace(card, method=DEFAULT_METHOD)
