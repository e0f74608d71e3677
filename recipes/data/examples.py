"""A split of a data set as tasks, `evaluate` and `verify` see it: inputs and targets, of whatever kind they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Targets(Protocol):
    """Targets that are read when they are asked for, such as a label for each pixel of many images."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor | slice, /) -> Tensor:
        """Return the targets of some examples, `(n, *)`."""
        ...

    def digest(self) -> str:
        """Return a word that tells them from others."""
        ...


class Examples(Protocol):
    """Some examples with their targets."""

    def __len__(self) -> int: ...

    @property
    def targets(self) -> Tensor | Targets:
        """Targets, `(n, *)`: class indices, a label for each pixel, real numbers."""
        ...

    def inputs(self, index: Tensor | slice) -> Tensor:
        """Return inputs as a network takes them, `(n, *)`, floating point."""
        ...


@dataclass(frozen=True)
class Points:
    """Examples that a network takes as they are.

    Attributes:
        x: Inputs `(n, *)`, floating point.
        labels: Targets `(n, *)`: class indices `(n,)`, or of yes or no `(n, 1)`; real numbers `(n, k)`.
    """

    x: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @property
    def targets(self) -> Tensor:
        """The labels."""
        return self.labels

    def inputs(self, index: Tensor | slice) -> Tensor:
        """Return inputs, as those of a `Split` are."""
        return self.x[index]


@dataclass(frozen=True)
class InOrder:
    """Batches of inputs and targets in the order of the examples, as often as they are asked for.

    Attributes:
        examples: The examples.
        batch_size: Examples per batch; the last one may have fewer.
        device: Where they are wanted.
        first: Number of the first batch.
        every: Batches from one to the next; the others are those of other ranks.
    """

    examples: Examples
    batch_size: int
    device: torch.device
    first: int = 0
    every: int = 1

    def _starts(self) -> range:
        return range(self.first * self.batch_size, len(self.examples), self.every * self.batch_size)

    def __len__(self) -> int:
        return len(self._starts())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in self._starts():
            batch = slice(start, start + self.batch_size)
            yield self.examples.inputs(batch).to(self.device), self.examples.targets[batch].to(self.device)


def num_batches(count: int, batch_size: int) -> int:
    """Return how many batches `shuffled` yields of so many examples from the start of an epoch."""
    return max(1, count // batch_size)


def limited_index(count: int, limit: int) -> Tensor:
    """Return the numbers of `limit` of `count` examples, in order and always the same.

    One is drawn from each of `limit` stretches: sets often lie class by class, which the first ones would see
    one class of; classes that take turns could be missed by examples at equal distances.
    """
    edges = torch.arange(limit + 1) * count // limit
    return edges[:-1] + torch.randint(2**62, (limit,), generator=torch.Generator().manual_seed(0)) % edges.diff()


def held_out_index(count: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of `count` examples without those held out, and these: at random, but always the same.

    Raises:
        ValueError: If none would be left.
    """
    if held_out >= count:
        raise ValueError(f"validation must leave training examples, got {held_out} of {count}.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[held_out:].sort().values, order[:held_out].sort().values


def shuffled(
    count: int, batch_size: int, seed: int, epoch: int, start: int = 0
) -> Iterator[tuple[Tensor, torch.Generator]]:
    """Yield the indices of an epoch's full batches in random order, from number `start` on.

    Each comes with a generator for what else is drawn for the batch. Both depend on seed, epoch and number alone, so
    a resumed run sees what an uninterrupted one does. A last batch that is not full is left out, unless it is the
    only one.
    """
    stream = seed * 100_003 + epoch
    order = torch.randperm(count, generator=torch.Generator().manual_seed(stream))
    for number in range(start, num_batches(count, batch_size)):
        generator = torch.Generator().manual_seed((stream * 1_000_003 + number) % 2**63)
        yield order[number * batch_size : (number + 1) * batch_size], generator


def digest(data: Examples) -> str:
    """Return a word for the targets of a split, which tells data sets of one name apart."""
    targets = data.targets
    whole = isinstance(targets, Tensor)
    return hashlib.sha256(targets.numpy().tobytes()).hexdigest()[:16] if whole else targets.digest()
