"""Ops in which a tensor that is the same for all examples meets one that is not: which copy each row gets there.

An op may be met if the rows of each example can be told apart in its result, and depend on no other example's copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bayeslayers.curvature.layout import Layout

# Ops whose result has in each row what their operands have there, after these were broadcast.
_ROW_BY_ROW = frozenset(
    "add add_ __add__ __radd__ __iadd__ sub sub_ __sub__ __rsub__ rsub __isub__ mul mul_ multiply __mul__ __rmul__ "
    "__imul__ div div_ true_divide __truediv__ __rtruediv__ where maximum minimum pow __pow__ lerp addcmul addcdiv "
    "masked_fill clamp".split()
)
_PRODUCTS = frozenset("matmul __matmul__ __rmatmul__ bmm".split())
_JOINS = frozenset("cat concat concatenate".split())

# Ops of which another tensor gives the shape, the dtype or the device alone.
METADATA = frozenset("to type_as expand_as view_as reshape_as".split())


def target_shape(name: str, args: Any, kwargs: Any, operand: Tensor, layout: Layout) -> Sequence[int] | None:
    """Return the shape to which an operand may be broadcast, so that the op treats each example by itself.

    None if the op mixes rows of several examples, or is not known.

    Args:
        name: Name of the op.
        args: Its arguments.
        kwargs: Likewise.
        operand: The tensor among them that is the same for all examples.
        layout: Where the examples are in the op's result.
    """
    tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    if name in _ROW_BY_ROW:
        return torch.broadcast_shapes(*[v.shape for v in tensors])
    if name in _JOINS:
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        return operand.shape if dim % operand.dim() != layout.dim else None
    if name in _PRODUCTS and all(v.dim() > 1 for v in tensors):
        return _batched(tensors, operand, layout)
    if name == "scaled_dot_product_attention":
        queries, keys, values = bound(args, kwargs, "query", "key", "value")
        if any(operand is each for each in (queries, keys, values)):
            return _batched([queries, keys, values], operand, layout)
        return (*queries.shape[:-1], keys.shape[-2])  # of the mask
    return None


def _batched(tensors: Sequence[Tensor], operand: Tensor, layout: Layout) -> Sequence[int] | None:
    """Return the shape of an operand of a batch of products, whose batch dimensions are broadcast."""
    batch = torch.broadcast_shapes(*[v.shape[:-2] for v in tensors])
    return (*batch, *operand.shape[-2:]) if layout.dim < len(batch) else None


def bound(args: Any, kwargs: Any, *names: str) -> list[Any]:
    """Return the first arguments of a call, wherever they are given; None for one that is not.

    Args:
        args: Arguments by position.
        kwargs: Arguments by name.
        *names: Their names.
    """
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def own_copies(rows: Tensor, layout: Layout, shape: Sequence[int]) -> Tensor | None:
    """Return a tensor, to be broadcast to a shape, in which the rows of each example are those of its copy.

    None if the shape has no room for the examples.

    Args:
        rows: The copies, `(n, *)`.
        layout: Where the examples are in the shape.
        shape: What the tensor is broadcast to.
    """
    examples, dim = len(rows), layout.dim
    if dim < 0 or dim >= len(shape) or shape[dim] != examples * layout.before * layout.after:
        return None
    rows = rows.reshape(examples, *[1] * (len(shape) + 1 - rows.dim()), *rows.shape[1:])
    if rows.shape[dim + 1] == 1:
        own = rows.movedim(0, dim).squeeze(dim + 1).unsqueeze(dim).unsqueeze(dim + 2)
        sizes = [layout.before, examples, layout.after]
        return own.expand(*own.shape[:dim], *sizes, *own.shape[dim + 3 :]).flatten(dim, dim + 2)
    if rows.shape[dim + 1] != shape[dim]:
        return None
    rows = rows.unflatten(dim + 1, (layout.before, examples, layout.after))
    return rows.diagonal(0, 0, dim + 2).movedim(-1, dim + 1).flatten(dim, dim + 2)


def own_product(x: Tensor, rows: Tensor, layout: Layout) -> Tensor | None:
    """Return x W in which each example has its own W, None if the examples are among what is summed.

    Args:
        x: `(*, i)`.
        rows: The copies of W, `(n, i, o)`.
        layout: Where the examples are in x.
    """
    dim = layout.dim
    if not 0 <= dim < x.dim() - 1 or x.shape[dim] != len(rows) * layout.before * layout.after:
        return None
    unfolded = x.unflatten(dim, (layout.before, len(rows), layout.after)).movedim(dim + 1, 0)
    y = (unfolded.flatten(1, -2) @ rows).unflatten(1, unfolded.shape[1:-1])
    return y.movedim(0, dim + 1).flatten(dim, dim + 2)


def own_einsum(equation: str, operands: Sequence[Any], copies: dict[int, Tensor], layout: Layout) -> Tensor | None:
    """Return an einsum in which each example gets its own copy of some operands, None if it sums over examples.

    Args:
        equation: Of the einsum, in letters.
        operands: Its operands.
        copies: By place, the copies `(n, *)` of those that are the same for all examples.
        layout: Where the examples are in the result.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    letters = left.split(",")
    if not arrow or "." in equation or len(letters) != len(operands):
        return None
    example, own = right[layout.dim], list(operands)
    for i, rows in copies.items():
        if example in letters[i]:
            own[i] = own_copies(rows, layout._replace(dim=letters[i].index(example)), own[i].shape)
        else:
            size = len(rows) * layout.before * layout.after
            own[i] = own_copies(rows[:, None], layout._replace(dim=0), (size, *rows.shape[1:]))
            letters[i] = example + letters[i]
        if own[i] is None:
            return None
    return torch.einsum(f"{','.join(letters)}->{right}", *own)


def without_affine_part(func: Any, args: Any, kwargs: Any, is_copied: Any) -> Any:
    """Return the result of an op whose weight or bias is copied, by an op without them; None if there is no such.

    Args:
        func: The op.
        args: Its arguments.
        kwargs: Likewise.
        is_copied: Returns whether an argument has a copy for each example.
    """
    if func is F.prelu and is_copied(args[1]) and not is_copied(args[0]):
        x, weight = args
        return x.clamp(min=0) + x.clamp(max=0) * _over_channels(weight, x)
    names, channels = _AFFINE.get(func, ((), False))
    if not names:
        return None
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    weight, bias = given.get("weight"), given.get("bias")
    if is_copied(given["input"]):
        return None
    scales = func not in _LINEAR
    if not (is_copied(bias) or (scales and is_copied(weight))):
        return None
    plain = {name: value for name, value in given.items() if not (name == "bias" or (scales and name == "weight"))}
    y = func(**plain)
    for op, value in ((torch.mul, weight if scales else None), (torch.add, bias)):
        if value is not None:
            y = op(y, _over_channels(value, y) if channels else value)
    return y


def _over_channels(value: Tensor, x: Tensor) -> Tensor:
    """Return a value for each channel, with dimensions of size 1 for the positions of `(n, c, *)`."""
    return value.unflatten(0, (-1, *[1] * (x.dim() - 2))) if x.dim() > 2 else value


_LINEAR = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_AFFINE: dict[Any, tuple[tuple[str, ...], bool]] = {
    F.linear: (("input", "weight", "bias"), False),
    **dict.fromkeys(_LINEAR[1:], (_CONVOLUTION, True)),
    F.layer_norm: (("input", "normalized_shape", "weight", "bias", "eps"), False),
    F.rms_norm: (("input", "normalized_shape", "weight", "eps"), False),
    F.group_norm: (("input", "num_groups", "weight", "bias", "eps"), True),
    F.batch_norm: (
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        True,
    ),
}
