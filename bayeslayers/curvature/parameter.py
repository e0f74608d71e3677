"""Curvature of a parameter that a module reads itself, as a class token or the scale of a small norm.

While curvature is tracked such a read gives a `Lifted` tensor, with a copy of the parameter for each example: the
gradient of a copy is the example's. It goes wherever an output that does not depend on the batch can go.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.curvature.accumulate import Leaves, sum_of_squares
from bayeslayers.curvature.lifted import Lifted
from bayeslayers.curvature.linear import LINEAR
from bayeslayers.curvature.meetings import bound
from bayeslayers.curvature.op import EagerOp, Plan, is_eager
from bayeslayers.curvature.refusal import Origin
from bayeslayers.curvature.rule import CurvatureRule, Tensors, Use
from bayeslayers.curvature.watch import AS_WEIGHT


class _Parameter(CurvatureRule):
    """A copy of one tensor for each entry of the input `(n,)`, of which only the length counts."""

    tensors = ("value",)
    casts = False

    def forward(self, inputs: tuple[Tensor, ...], tensors: Any, settings: Any) -> Tensor:
        (marks,), (value,) = inputs, tensors
        rows = value.expand(len(marks), *value.shape)
        return rows.clone() if len(marks) == 1 else rows  # an op in place must not reach the parameter

    def per_example(self, use: Use, g: Tensor) -> Tensors:
        return (g,)

    def squares(self, use: Use, g: Tensor) -> Sequence[Tensor | None]:
        return None, g.sum(0), sum_of_squares(g)


PARAMETER = _Parameter()


def read(value: Tensor, leaves: Leaves) -> Tensor:
    """Return what a module computes with where it reads one of its parameters, while curvature is tracked.

    Args:
        value: The parameter, or its sample.
        leaves: Where its curvature goes.
    """
    watch = leaves.watch
    if watch is None or not is_eager():
        return value
    origin, looks = Origin("parameter", leaves.name), watch.observed is not None
    if looks and watch.meetings.observed is not None and watch.examples is not None:
        lifted = Lifted.of(value.detach().expand(watch.examples, *value.shape), watch.meetings, origin)
        lifted.as_weight = partial(_as_weight, value, leaves)
        return lifted
    if looks or not value.requires_grad or (place := watch.enter_read(leaves.name)) is None:
        return value
    plan = Plan(PARAMETER, 1, (), leaves.kind, None, leaves.passes, place)
    with torch._C.DisableTorchFunction():
        rows: Any = EagerOp.apply(plan, value.new_empty(place.examples), value, leaves.tensors.get("value"), None)
    if place.examples == 1:
        return rows[0]
    lifted = Lifted.of(rows, watch.meetings, origin, place.call is not None)
    lifted.as_weight = partial(_as_weight, value, leaves)
    return lifted


def _as_weight(value: Tensor, leaves: Leaves, func: Any, args: Any, kwargs: Any) -> Any:
    """Return the output of a linear map with the parameter as its weight, by the rule, without a copy of it."""
    if func is not F.linear or value.dim() != 2:
        return NotImplemented
    x, _, bias = bound(args, kwargs, "input", "weight", "bias")
    own = leaves._replace(
        tensors=dict(zip(("weight",), leaves.tensors.values(), strict=False)), name=leaves.name + AS_WEIGHT
    )
    y = LINEAR((x,), (value, None), own)
    return y if bias is None else y + bias
