"""The inputs of a network: one tensor, or the arguments of a forward that takes several, nested as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

TARGETS = ("labels", "label")  # keys of a batch that hold its targets, as tokenizers' loaders name them


class Inputs:
    """A batch of inputs for a forward that takes more than one tensor.

    The network is called as `network(*args, **kwargs)`. Tensors may be nested in tuples, lists and mappings; each
    has the examples in dimension 0, except for tensors without dimensions. Other values are passed as they are.

    Args:
        *args: Positional arguments of the forward.
        **kwargs: Keyword arguments of the forward.

    Example:
        >>> import torch, bayeslayers as bl
        >>> batch = bl.Inputs(torch.randn(5, 3), mask=torch.ones(5, 3))
        >>> len(batch)
        5
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.args, self.kwargs = args, kwargs

    def __len__(self) -> int:
        return next((len(x) for x in leaves((self.args, self.kwargs)) if x.dim()), 0)

    def __repr__(self) -> str:
        parts = [*map(_shown, self.args), *(f"{key}={_shown(value)}" for key, value in self.kwargs.items())]
        return f"Inputs({', '.join(parts)})"


Batch: TypeAlias = Tensor | Inputs


def is_batch(value: object) -> bool:
    """Return whether a value is one batch of inputs: a tensor, `Inputs`, or a mapping of keyword arguments."""
    return isinstance(value, Tensor | Inputs | Mapping)


def as_batch(value: object) -> Batch | None:
    """Return the batch that a value stands for, None if it is none.

    A mapping holds keyword arguments, of which the targets are left out; a tuple or a list holds positional ones.
    """
    if isinstance(value, Tensor | Inputs):
        return value
    if isinstance(value, Mapping):
        batch = Inputs(**{str(key): part for key, part in value.items() if key not in TARGETS})
    elif isinstance(value, tuple | list):
        batch = Inputs(*value)
    else:
        return None
    return batch if next(leaves((batch.args, batch.kwargs)), None) is not None else None


def call(network: Callable[..., Any], batch: Batch) -> Any:
    """Return what a network returns for a batch."""
    return network(batch) if isinstance(batch, Tensor) else network(*batch.args, **batch.kwargs)


def leaves(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, mappings and `Inputs`, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Inputs):
        yield from leaves((value.args, value.kwargs))
    elif isinstance(value, Mapping):
        yield from leaves(list(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from leaves(part)


def on_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return a value of the same nesting, with a function applied to its tensors; mappings become dictionaries."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Inputs):
        return Inputs(*on_tensors(function, value.args), **on_tensors(function, value.kwargs))
    if isinstance(value, Mapping):
        return {key: on_tensors(function, part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [on_tensors(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def on_rows(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Return a batch with a function applied to its tensors that have examples, those of one dimension or more."""
    return on_tensors(lambda x: function(x) if x.dim() else x, batch)


def split(batch: Any, size: int) -> list[Any]:
    """Return a batch in pieces of at most `size` examples.

    Raises:
        ValueError: If tensors have other numbers of rows, so that a piece would not hold its examples.
    """
    if isinstance(batch, Tensor):
        return list(batch.split(size))
    rows = {len(x) for x in leaves(batch) if x.dim()}
    if (number := max(rows, default=0)) <= size:
        return [batch]
    if len(rows) > 1:
        raise ValueError(
            f"every tensor of the inputs must have the examples in dimension 0, got sizes {sorted(rows)}. Give "
            "batch_size=None, which passes batches whole."
        )
    return [on_rows(lambda x, start=start: x[start : start + size], batch) for start in range(0, number, size)]


def repeated(batch: Any, number: int) -> Any:
    """Return a batch of `number` copies of all examples, one after the other."""
    return on_rows(lambda x: x.repeat(number, *[1] * (x.dim() - 1)), batch)


def check_inputs(batch: Batch) -> None:
    """Raise if a batch holds no example, or values that are not numbers.

    Several inputs may hold infinite values, such as those of an attention mask; one tensor may not.

    Raises:
        ValueError: If so.
    """
    alone = isinstance(batch, Tensor)
    if (alone and batch.dim() == 0) or len(batch) == 0:
        found = f"shape {tuple(batch.shape)}" if alone else repr(batch)
        raise ValueError(f"x must hold at least one example in dimension 0, got {found}.")
    for x in leaves(batch):
        if x.is_floating_point() and (bad := int((~x.isfinite() if alone else x.isnan()).sum())):
            rule, found = ("finite", "NaN or infinite") if alone else ("numbers", "NaN")
            raise ValueError(f"x must be {rule}, got {bad} of {x.numel()} values that are {found}.")


def _shown(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def device_of(batch: Batch) -> torch.device:
    """Return the device of a batch."""
    return next(x.device for x in leaves(batch))
