"""What a card may claim about its model: the model's likelihood, and metrics that its posterior gave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bayeslayers.distributions.gaussian import POINT_PRECISION
from bayeslayers.layers import POSTERIOR_STRUCTURE
from bayeslayers.sampling import Site, posterior
from bayeslayers.storage.card import Card, likelihood_fields, likelihood_in

_WITHOUT_PRECISIONS = ("mean", "dropout")  # methods of `predict` that read only the means


def chosen_likelihood(network: nn.Module, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the card fields of the likelihood that a network is saved with.

    This is `network.likelihood` if it differs from the network's card, else that of `fields`, else the card's.

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
    """Raise if metrics were sampled from precisions which no method has written, or if training is not finalized.

    Gradients reveal a network that was trained in this process. For any other network, metrics are accepted unless
    they name a number of samples. The precisions of a point estimate reveal an optimizer that writes its posterior in
    `finalize`.

    Raises:
        ValueError: If all precisions still equal the initial value of `attach_posterior`.
    """
    claims = (card.metrics, card.verification)
    sampled = any(metrics.get("num_samples", 1) > 1 for metrics in claims)
    trained = any(claims) and any(parameter.grad is not None for parameter in network.parameters())
    if card.method in _WITHOUT_PRECISIONS:
        return
    value = _untouched([*posterior(network)])
    if value == POINT_PRECISION:
        raise ValueError(
            "posterior must be written before it is saved, got precisions of a point estimate. Call "
            "optimizer.finalize() at the end of training, or save the means with method='mean'."
        )
    if value is not None and (sampled or trained):
        raise ValueError(
            f"posterior must be trained before it is evaluated, got precisions that are all {value:g}, the initial "
            "value. Train with an optimizer that writes them, such as bl.VOGN or bl.IVON, or call bl.laplace; or "
            "evaluate the means, and save with method='mean'."
        )


def _untouched(sites: list[Site]) -> float | None:
    """Return the common value of all entries of all precisions, None if they differ."""
    if any(root in site.module._buffers for site in sites for root in POSTERIOR_STRUCTURE):
        return None
    spans = [site.precision.aminmax() for site in sites if site.precision.numel() > 1]
    values = {float(value) for span in spans for value in span}
    return values.pop() if len(values) == 1 else None
