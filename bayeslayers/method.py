"""By which method a model predicts when the caller names none."""

from __future__ import annotations

from torch import nn

from bayeslayers.card import Card
from bayeslayers.unwrap import unwrapping

DEFAULT_METHOD = "sample"


def method_of(model: nn.Module) -> str:
    """Return the method that the card of a model names, also of one that torch has wrapped, else "sample".

    `laplace` writes "linearised" there, and a loaded posterior has the card that it was saved with.
    """
    cards = (getattr(module, "card", None) for module in unwrapping(model))
    return next((card.method for card in cards if isinstance(card, Card)), DEFAULT_METHOD)
