"""Outputs that do not depend on the batch, as of position tables: one copy for each example, until they meet one.

Autograd sums the gradient of such an output over the examples where it is broadcast, which is too early: per-example
gradients are squared first. A `Lifted` tensor looks like the output and holds a copy for each example. Ops on it alone
run on all copies, by `vmap`. Where it meets a tensor that depends on the batch, in an op that treats the rows of
each example by themselves, each example gets its own copy; any other op raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from bayeslayers.curvature.layout import CONSTANT, Layout

if TYPE_CHECKING:
    from collections.abc import Callable

# Ops whose result has in each row what their operands have there, after these were broadcast.
_ROW_BY_ROW = frozenset(
    "add add_ __add__ __radd__ __iadd__ sub sub_ __sub__ __rsub__ __isub__ mul mul_ __mul__ __rmul__ __imul__ div div_ "
    "true_divide __truediv__ where maximum minimum".split()
)


class Meetings:
    """Where lifted tensors meet others in a call of a model, one meeting after the other.

    Attributes:
        layouts: Where the examples are in the result of each; `CONSTANT` where the others depend on no example either.
        observed: Where a look at the model collects the results, None outside of one.
        index: The next one.
        name: Of the layer that was lifted last, for messages.
    """

    def __init__(self) -> None:
        self.layouts: list[Layout | None] = []
        self.observed: list[Tensor] | None = None
        self.index, self.name = 0, ""

    def next(self) -> Layout | None:
        """Return the layout of the next meeting, None if it is unknown."""
        self.index += 1
        return self.layouts[self.index - 1] if self.index <= len(self.layouts) else None


class Lifted(Tensor):
    """A tensor that is the same for all examples, with a copy for each.

    Attributes:
        rows: The copies, `(n, *shape)`.
        meetings: Of the call.
    """

    rows: Tensor
    meetings: Meetings

    @staticmethod
    def of(rows: Tensor, meetings: Meetings) -> Lifted:
        """Return the tensor of which there are these copies."""
        lifted: Any = torch.Tensor._make_subclass(Lifted, rows.detach()[0])
        lifted.rows, lifted.meetings = rows, meetings
        return lifted

    @property
    def plain(self) -> Tensor:
        """The tensor that it looks like."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, args, kwargs or {})


def _call(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    values, structure = tree_flatten((args, kwargs))
    places = [i for i, v in enumerate(values) if isinstance(v, Lifted)]
    meetings = values[places[0]].meetings

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
        rows = torch.func.vmap(run)(*[values[i].rows for i in places])
        return tree_map_only(Tensor, lambda each: Lifted.of(each, meetings), rows)

    name = getattr(func, "__name__", str(func))
    if name.endswith("_") and not name.endswith("__") and 0 in places:
        raise _refused(meetings, name)
    if not any(isinstance(v, Tensor) and i not in places for i, v in enumerate(values)):
        result = plain()
        tensors = any(isinstance(x, Tensor) for x in tree_flatten(result)[0])
        return lifted() if tensors and name not in ("detach", "data") else result
    layout = meetings.next()
    if layout == CONSTANT:
        return lifted()
    if meetings.observed is not None:
        result = plain()
        meetings.observed.append(result.detach().clone() if isinstance(result, Tensor) else torch.empty(0))
        return result
    shape = _shape(name, args, kwargs)
    if layout is None or shape is None:
        raise _refused(meetings, name)
    return run(*[_own_copies(values[i].rows, layout, shape, meetings, name) for i in places])


def _shape(name: str, args: Any, kwargs: Any) -> torch.Size | None:
    """Return what lifted operands are broadcast to in an op, None if it does not treat rows by themselves."""
    if name in _ROW_BY_ROW:
        return torch.broadcast_shapes(*[v.shape for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)])
    if name == "scaled_dot_product_attention" and not any(isinstance(x, Lifted) for x in args[:3]) and len(args) > 2:
        return torch.Size((*args[0].shape[:-1], args[1].shape[-2]))  # of the mask
    return None


def _own_copies(rows: Tensor, layout: Layout, shape: torch.Size, meetings: Meetings, name: str) -> Tensor:
    """Return a tensor, to be broadcast to a shape, in which the rows of each example are those of its copy."""
    examples, dim = len(rows), layout.dim
    rows = rows.reshape(examples, *[1] * (len(shape) + 1 - rows.dim()), *rows.shape[1:])
    folded = layout.before * layout.after
    if dim >= len(shape) or shape[dim] != examples * folded:
        raise _refused(meetings, name)
    if rows.shape[dim + 1] == 1:
        own = rows.movedim(0, dim).squeeze(dim + 1).unsqueeze(dim).unsqueeze(dim + 2)
        sizes = [layout.before, examples, layout.after]
        return own.expand(*own.shape[:dim], *sizes, *own.shape[dim + 3 :]).flatten(dim, dim + 2)
    if rows.shape[dim + 1] != shape[dim]:
        raise _refused(meetings, name)
    rows = rows.unflatten(dim + 1, (layout.before, examples, layout.after))
    return rows.diagonal(0, 0, dim + 2).movedim(-1, dim + 1).flatten(dim, dim + 2)


def _refused(meetings: Meetings, op: str) -> RuntimeError:
    return RuntimeError(
        f"the output of layer '{meetings.name}', whose input does not depend on the batch, must be added to or "
        f"multiplied with what does, got it in {op!r}: its gradients cannot be told apart by examples there. Exclude "
        "the layer from the Bayesian ones, or use IVON."
    )
