"""What the loss functions of torch average: how many elements of how many examples count in one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Number: TypeAlias = Tensor | float
Reduction = Literal["mean", "sum"]

IGNORED = -100  # the label that counts nowhere, unless a loss is given another


class Count(NamedTuple):
    """What one loss is made of.

    Attributes:
        elements: Elements that the loss averages, M; of weighted ones their effective number.
        examples: Rows of dimension 0 that have such an element.
        rows: All rows.
    """

    elements: Number
    examples: Number
    rows: int


def count(function: Callable[..., Tensor], args: Any, kwargs: Mapping[str, Any]) -> tuple[Count, Reduction] | None:
    """Return what a call of a loss function is made of, and whether it is their mean or their sum.

    It is None of a function that is no loss of torch, and under `reduction="none"`.

    Args:
        function: A function of `torch.nn.functional`.
        args: Its arguments.
        kwargs: Likewise.
    """
    if (counter := _COUNTERS.get(function)) is None:
        return None
    call = _signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    own = SimpleNamespace(**call.arguments)
    reduction = own.reduction
    if getattr(own, "size_average", None) is not None or getattr(own, "reduce", None) is not None:  # of old
        reduction = "none" if own.reduce is False else "sum" if own.size_average is False else "mean"
    if reduction == "batchmean":
        return Count(len(own.input), len(own.input), len(own.input)), "mean"
    return (counter(own), reduction) if reduction in ("mean", "sum") else None


_signature = lru_cache(inspect.signature)


def effective_number(weights: Tensor, total: Number) -> Tensor:
    """Return Kish's effective number of elements in the loss sum_e w_e loss_e / total.

        total sum_e w_e / sum_e w_e^2,  which is (sum_e w_e)^2 / sum_e w_e^2 of a weighted mean

    Source: Kish 1965 ("Survey Sampling"), section 11.7.

    Args:
        weights: Those of all elements, >= 0.
        total: What the sum is divided by.
    """
    return total * weights.sum() / weights.square().sum()


def _classes(own: SimpleNamespace) -> Count:
    """Count labels, of which those of `ignore_index` are in no mean."""
    if own.input.dim() == 1:
        own.input, own.target = own.input.unsqueeze(0), own.target.unsqueeze(0)
    rows = len(own.input)
    if own.target.is_floating_point():  # probabilities of the classes
        weights = None if own.weight is None else own.target.movedim(1, -1) @ own.weight
        elements = own.target.numel() / max(own.target.shape[1], 1)
        return Count(elements if weights is None else effective_number(weights, elements), rows, rows)
    counts = own.target != own.ignore_index
    elements = counts.sum()
    examples = elements if counts.dim() == 1 else counts.flatten(1).any(1).sum()
    if own.weight is not None:
        weights = own.weight[own.target.where(counts, 0)] * counts
        elements = effective_number(weights, weights.sum())
    return Count(elements, examples, rows)


def _values(own: SimpleNamespace) -> Count:
    """Count the elements of outputs and targets that have the same shape."""
    shape = torch.broadcast_shapes(own.input.shape, own.target.shape)
    rows = shape[0] if shape else 1
    return Count(float(shape.numel()), rows, rows)


def _weighted_values(own: SimpleNamespace) -> Count:
    """Count elements whose weights are in the sum alone."""
    plain = _values(own)
    weights: Any = own.weight
    if getattr(own, "pos_weight", None) is not None:
        weights = (1 if weights is None else weights) * (1 + (own.pos_weight - 1) * own.target)
    if weights is None:
        return plain
    return plain._replace(elements=effective_number(weights.expand_as(own.input), plain.elements))


def _averaged_values(own: SimpleNamespace) -> Count:
    """Count elements whose weights are in the sum, and in what it is divided by."""
    plain = _values(own)
    return plain if own.weight is None else plain._replace(elements=effective_number(own.weight, own.weight.sum()))


_COUNTERS: dict[Any, Callable[[SimpleNamespace], Count]] = {
    **dict.fromkeys((F.cross_entropy, F.nll_loss), _classes),
    **dict.fromkeys((F.kl_div, F.gaussian_nll_loss, F.poisson_nll_loss, F.smooth_l1_loss), _values),
    **dict.fromkeys((F.soft_margin_loss, F.multilabel_soft_margin_loss), _values),
    **dict.fromkeys((F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.huber_loss), _weighted_values),
    **dict.fromkeys((F.mse_loss, F.l1_loss), _averaged_values),
}

LOSSES = frozenset(_COUNTERS)
