"""Batches of what a user passes as data: a loader, another iterable of batches, or tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, TypeAlias

from torch import Tensor

from bayeslayers.inputs import TARGETS, Batch, as_batch, is_batch

Labelled: TypeAlias = Iterable[Any] | tuple[Any, Tensor]
Unlabelled: TypeAlias = Iterable[Any] | Batch | Mapping[str, Any]


def labelled_batches(name: str, data: Labelled, may_be_empty: bool = False) -> Iterator[tuple[Batch, Tensor]]:
    """Yield the batches (x, y) of `data`; a tuple (x, y) is one batch.

    x is a tensor, `Inputs`, a mapping of keyword arguments or a tuple of positional ones. A batch may also be one
    mapping whose targets have the key "labels" or "label", as loaders of tokenizers give them.

    Raises:
        TypeError: If it yields anything else.
        ValueError: If it is empty.
    """
    whole = isinstance(data, Mapping) or (
        isinstance(data, tuple)
        and (all(isinstance(part, Tensor) for part in data) or (len(data) == 2 and is_batch(data[0])))
        and isinstance(data[-1], Tensor)
    )
    for batch in _batches(name, data, whole, may_be_empty):
        x, y = _labelled(batch)
        if x is None or not isinstance(y, Tensor):
            raise TypeError(
                f"{name} must yield batches (x, y) of tensors, or mappings with the key 'labels', got {_kind(batch)}."
            )
        yield x, y


def _labelled(batch: Any) -> tuple[Batch | None, Any]:
    if isinstance(batch, Mapping):
        return as_batch(batch), next((batch[key] for key in TARGETS if key in batch), None)
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return as_batch(batch[0]), batch[1]
    return None, None


def input_batches(name: str, data: Unlabelled, may_be_empty: bool = False) -> Iterator[Batch]:
    """Yield the inputs of the batches of `data`, which are x or (x, ...); one batch x is taken whole.

    x is a tensor, `Inputs` or a mapping of keyword arguments, whose "labels" are left out; in (x, ...) also a tuple
    of positional ones.

    Raises:
        TypeError: If it yields anything else.
        ValueError: If it is empty.
    """
    for batch in _batches(name, data, is_batch(data), may_be_empty):
        x = as_batch(batch[0] if isinstance(batch, tuple | list) and batch else batch)
        if x is None:
            raise TypeError(f"{name} must yield tensors x or batches (x, y), got {_kind(batch)}.")
        yield x


def _batches(name: str, data: Any, whole: bool, may_be_empty: bool) -> Iterator[Any]:
    if not (whole or isinstance(data, Iterable)):
        raise TypeError(f"{name} must be a loader, another iterable of batches, or tensors, got {_kind(data)}.")
    empty = True
    for batch in (data,) if whole else data:
        empty = False
        yield batch
    if empty and not may_be_empty:
        raise ValueError(f"{name} must hold at least one batch, got none.")


def _kind(thing: object) -> str:
    if isinstance(thing, tuple | list):
        return f"{type(thing).__name__} of {', '.join(type(part).__name__ for part in thing) or 'nothing'}"
    return type(thing).__name__


def with_progress(name: str, batches: Iterable[Any], number: int | None = None) -> Iterable[Any]:
    """Return batches that move a progress bar on stderr.

    Args:
        name: Text of the bar.
        batches: Any iterable.
        number: Number of batches; None takes their length, if they have one.
    """
    from rich.console import Console
    from rich.progress import track

    if number is None and isinstance(batches, Sized):
        number = len(batches)
    return track(batches, name, number, console=Console(stderr=True), transient=True)
