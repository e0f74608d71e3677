"""A split of a data set as tasks, `evaluate` and `verify` see it: inputs and targets, of whatever kind they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Examples(Protocol):
    """Some examples with their targets."""

    def __len__(self) -> int: ...

    @property
    def targets(self) -> Tensor:
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
    """

    examples: Examples
    batch_size: int
    device: torch.device

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.examples), self.batch_size):
            batch = slice(start, start + self.batch_size)
            yield self.examples.inputs(batch).to(self.device), self.examples.targets[batch].to(self.device)


def num_batches(count: int, batch_size: int) -> int:
    """Return how many batches `shuffled` yields of so many examples from the start of an epoch."""
    return max(1, count // batch_size)


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
