"""Batches of what a user passes as data: a loader, another iterable of batches, or tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeAlias

from torch import Tensor

Labelled: TypeAlias = Iterable[Any] | tuple[Tensor, Tensor]
Unlabelled: TypeAlias = Iterable[Any] | Tensor


def labelled_batches(name: str, data: Labelled) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches (x, y) of `data`; a tuple of two tensors is one batch.

    Raises:
        TypeError: If it yields anything else.
        ValueError: If it is empty.
    """
    whole = isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data)
    for batch in _batches(name, data, whole):
        if not (
            isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
        ):
            raise TypeError(f"{name} must yield batches (x, y) of tensors, got {_kind(batch)}.")
        yield batch[0], batch[1]


def input_batches(name: str, data: Unlabelled) -> Iterator[Tensor]:
    """Yield the inputs of the batches of `data`, which are x or (x, ...); a tensor is one batch.

    Raises:
        TypeError: If it yields anything else.
        ValueError: If it is empty.
    """
    for batch in _batches(name, data, isinstance(data, Tensor)):
        x = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must yield tensors x or batches (x, y), got {_kind(batch)}.")
        yield x


def _batches(name: str, data: Iterable[Any], whole: bool) -> Iterator[Any]:
    if not isinstance(data, Iterable):
        raise TypeError(f"{name} must be a loader, another iterable of batches, or tensors, got {_kind(data)}.")
    empty = True
    for batch in (data,) if whole else data:
        empty = False
        yield batch
    if empty:
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
