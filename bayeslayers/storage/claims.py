"""What a card may claim of the model that it is saved with: its likelihood, and figures that its posterior gave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bayeslayers.layers import ROOTS
from bayeslayers.sampling import Site, posterior
from bayeslayers.storage.card import Card, likelihood_fields, likelihood_in

_WITHOUT_PRECISIONS = ("mean", "dropout")  # methods of `predict` that read the means alone


def chosen_likelihood(network: nn.Module, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that say which likelihood a network is saved with.

    That is `network.likelihood` where it says more than the network's card, else that of `fields`, else the card's.

    Args:
        network: Network.
        fields: Fields of the card that the user gave; `likelihood` may be a name or a likelihood.

    Raises:
        ValueError: If the two contradict each other, or no card can name the likelihood.
    """
    given = {key: fields[key] for key in ("likelihood", "likelihood_parameters") if fields.get(key) is not None}
    if not isinstance(given.get("likelihood", ""), str):
        given |= likelihood_fields(given["likelihood"])
    card, own = getattr(network, "card", None), getattr(network, "likelihood", None)
    of_card = likelihood_in(card) if isinstance(card, Card) else None
    if own is None or own == of_card:
        known = {} if of_card is None else likelihood_fields(of_card)
        same_kind = given.get("likelihood", known.get("likelihood")) == known.get("likelihood")
        return {"likelihood_parameters": {}} | (known if same_kind else {}) | given
    stated = likelihood_fields(own)
    if any(stated[key] != value for key, value in given.items()):
        raise ValueError(
            f"likelihood must be the model's, {own}, got {fields.get('likelihood', given)!r}. Set model.likelihood, or "
            "leave the argument out."
        )
    return stated


def refuse_unwritten(network: nn.Module, card: Card) -> None:
    """Refuse a card with figures that were sampled from precisions which no method has written.

    A trained network shows by its gradients. Of another, any figures may be claimed that name no number of samples.

    Raises:
        ValueError: If all precisions are still the one number that `attach_posterior` put there.
    """
    figures = (card.metrics, card.verification)
    sampled = any(found.get("num_samples", 1) > 1 for found in figures)
    trained = any(figures) and any(parameter.grad is not None for parameter in network.parameters())
    if card.method in _WITHOUT_PRECISIONS or not (sampled or trained):
        return
    if (value := _untouched([*posterior(network)])) is not None:
        raise ValueError(
            f"posterior must be written before it is measured, got precisions that are all {value:g}, as at the start. "
            "Train by an optimizer that writes them, as bl.VOGN or bl.IVON, or call bl.laplace; or measure the means, "
            "and save with method='mean'."
        )


def _untouched(sites: list[Site]) -> float | None:
    """Return the number that all entries of all precisions are, None if they differ."""
    if any(root in site.module._buffers for site in sites for root in ROOTS):
        return None
    spans = [site.precision.aminmax() for site in sites if site.precision.numel() > 1]
    values = {float(value) for span in spans for value in span}
    return values.pop() if len(values) == 1 else None
