"""Tensors that do not depend on the batch, as of position tables: one copy for each example, until they meet one.

Autograd sums the gradient of such a tensor over the examples where it is broadcast, which is too early: per-example
gradients are squared first. A `Lifted` tensor looks like the output of a layer, or a parameter that a module reads, and
holds a copy for each example. Ops on it alone run on all copies, by `vmap`. Where it meets a tensor that depends on the
batch, in an op that treats the rows of each example by themselves, each example gets its own copy (`meetings`); any
other op raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from bayeslayers.curvature.layout import CONSTANT, Layout
from bayeslayers.curvature.meetings import (
    METADATA,
    bound,
    own_copies,
    own_einsum,
    own_product,
    target_shape,
    without_affine_part,
)
from bayeslayers.curvature.refusal import CurvatureRefusal, Origin


class Meetings:
    """Where lifted tensors meet others in a call of a model, one meeting after the other.

    Attributes:
        layouts: The op of each, and where the examples are in its result; `CONSTANT` where the others depend on no
            example either.
        observed: Where a look at the model collects ops and results, None outside of one.
        index: The next one.
        constants: Storages of what the model owns, which does not depend on the batch.
    """

    def __init__(self) -> None:
        self.layouts: list[tuple[str, Layout | None]] = []
        self.observed: list[tuple[str, Tensor]] | None = None
        self.index = 0
        self.constants: frozenset[int] = frozenset()

    def next(self, op: str, in_call: bool = True) -> Layout | None:
        """Return the layout of the next meeting, None if it is unknown.

        Args:
            op: Name of its op.
            in_call: Whether the model is being called; else checkpointing runs a part of it again, of which nothing
                is known but what holds for all meetings.
        """
        if not in_call:
            known = {layout for _, layout in self.layouts}
            return known.pop() if len(known) == 1 else None
        self.index += 1
        expected, layout = self.layouts[self.index - 1] if self.index <= len(self.layouts) else ("", None)
        return layout if expected == op else None


class Lifted(Tensor):
    """A tensor that is the same for all examples, with a copy for each.

    Attributes:
        rows: The copies, `(n, *shape)`.
        meetings: Of the call.
        origin: The layer or parameter that it comes from.
        in_call: Whether it was made in a call of the model, not as checkpointing ran a part of it again.
        as_weight: Of a parameter itself, returns the result of an op that has a curvature rule for such a weight, and
            NotImplemented for other ops.
    """

    rows: Tensor
    meetings: Meetings
    origin: Origin
    in_call: bool
    as_weight: Callable[[Any, Any, Any], Any] | None

    @staticmethod
    def of(rows: Tensor, meetings: Meetings, origin: Origin, in_call: bool = True) -> Lifted:
        """Return the tensor of which there are these copies.

        Args:
            rows: The copies.
            meetings: Of the call.
            origin: The layer or parameter that it comes from.
            in_call: Whether the model is being called.
        """
        with torch._C.DisableTorchFunctionSubclass():
            plain = _Unseen.apply(rows[0], origin) if rows.requires_grad else rows.detach()[0]
            lifted: Any = plain.as_subclass(Lifted)
        lifted.rows, lifted.meetings, lifted.origin, lifted.in_call = rows, meetings, origin, in_call
        lifted.as_weight = None
        return lifted

    def like(self, rows: Tensor) -> Lifted:
        """Return a tensor that comes from this one."""
        return Lifted.of(rows, self.meetings, self.origin, self.in_call)

    @property
    def plain(self) -> Tensor:
        """The tensor that it looks like."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.detach().as_subclass(Tensor)

    def spread(self, layout: Layout, op: str) -> Tensor:
        """Return the tensor with each example's own copy in its rows, of which it has them all already.

        Args:
            layout: Where the examples are.
            op: What needs it, for the message.

        Raises:
            CurvatureRefusal: If its dimensions have no room for the examples.
        """
        with torch._C.DisableTorchFunctionSubclass():
            own = own_copies(self.rows, layout, self.rows.shape[1:])
        if own is None:
            raise refused(self.origin, op)
        return own

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (found := without_affine_part(func, args, kwargs, lambda x: isinstance(x, Lifted))) is not None:
            return found
        _, weight = bound(args, kwargs, "input", "weight")
        if isinstance(weight, Lifted) and weight.as_weight is not None:
            found = weight.as_weight(func, args, kwargs)
            if found is not NotImplemented:
                return found
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, args, kwargs)


class _Unseen(torch.autograd.Function):
    """What a function sees that takes a lifted tensor for an ordinary one: no gradient may come back from there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, origin: Origin) -> Tensor:
        ctx.origin = origin
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise refused(ctx.origin, "a function that torch cannot see into")


def _call(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    values, structure = tree_flatten((args, kwargs))
    places = [i for i, v in enumerate(values) if isinstance(v, Lifted)]
    first: Lifted = values[places[0]]
    meetings = first.meetings

    def run(*given: Any) -> Any:
        own = list(values)
        for i, value in zip(places, given, strict=True):
            own[i] = value
        positional, named = tree_unflatten(own, structure)
        return func(*positional, **named)

    def plain() -> Any:
        with torch.no_grad():
            return run(*[values[i].plain for i in places])

    def lifted() -> Any:
        rows = torch.func.vmap(run, randomness="same")(*[values[i].rows for i in places])
        return tree_map_only(Tensor, first.like, rows)

    name = getattr(func, "__name__", str(func))
    in_place = name.endswith("_") and not name.endswith("__")
    others = [v for i, v in enumerate(values) if isinstance(v, Tensor) and i not in places]
    constant = all(v.untyped_storage().data_ptr() in meetings.constants for v in others)
    if constant or (name in METADATA and places == [0]):
        if in_place:
            lifted()
            return first
        result = plain()
        tensors = any(isinstance(x, Tensor) for x in tree_flatten(result)[0])
        return lifted() if tensors and name not in ("detach", "data") else result
    if (in_place and 0 in places) or name == "__setitem__":
        raise refused(first.origin, name)
    layout = meetings.next(name, first.in_call)
    if layout == CONSTANT:
        return lifted()
    if meetings.observed is not None:
        result = plain()
        meetings.observed.append((name, result.detach().clone() if isinstance(result, Tensor) else torch.empty(0)))
        return result
    result = None if layout is None else _with_own_copies(name, args, kwargs, run, layout)
    if result is None:
        raise refused(first.origin, name)
    return result


def _with_own_copies(name: str, args: Any, kwargs: Any, run: Any, layout: Layout) -> Tensor | None:
    """Return the result of an op with each example's own copy of what is lifted in its rows, None if that cannot be."""
    if name == "einsum":
        copies = {i: x.rows for i, x in enumerate(args[1:]) if isinstance(x, Lifted)}
        return own_einsum(args[0], args[1:], copies, layout)
    if name == "linear":
        x, weight, bias = bound(args, kwargs, "input", "weight", "bias")
        y = own_product(x, weight.rows.mT, layout) if isinstance(weight, Lifted) else None
        return y if y is None or bias is None else y + bias
    if name in ("matmul", "__matmul__", "__rmatmul__"):
        x, weight = args[::-1] if name == "__rmatmul__" else args
        if isinstance(weight, Lifted) and weight.rows.dim() == 3 and not isinstance(x, Lifted):
            return own_product(x, weight.rows, layout)
    own = _own(name, args, kwargs, [v for v in tree_leaves((args, kwargs)) if isinstance(v, Lifted)], layout)
    return None if own is None else run(*own)


def _own(name: str, args: Any, kwargs: Any, lifted: list[Lifted], layout: Layout) -> list[Tensor] | None:
    """Return the lifted operands of an op with each example's own copy in its rows, None if that cannot be."""
    own = []
    for operand in lifted:
        shape = target_shape(name, args, kwargs, operand, layout)
        own.append(None if shape is None else own_copies(operand.rows, layout, shape))
    return None if any(x is None for x in own) else own  # pyright: ignore[reportReturnType]


def refused(origin: Origin, op: str) -> CurvatureRefusal:
    """Return the error for a lifted tensor in an op that mixes examples.

    Args:
        origin: The layer or parameter that the tensor comes from.
        op: Name of the op.
    """
    return CurvatureRefusal(
        origin.name,
        f"{origin}, which does not depend on the batch, must be added to or multiplied with what does, got it in "
        f"{op!r}: its gradients cannot be told apart by examples there. Exclude it from the "
        "Bayesian ones, or use IVON.",
    )
