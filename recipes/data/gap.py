"""A curve of one input with a gap, in which there are no training examples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GAP, INSIDE = "gap", "inside-gap"
EDGES = (-1.0, 0.7)  # of the gap, in which nothing is known
ENDS = (-2.5, 2.5)  # of the inputs
NOISE = 0.1


@dataclass(frozen=True)
class Gap:
    """Noisy points of a sine and a line, none in the gap.

    Attributes:
        examples: Training examples.
        test_examples: Test examples, which are not in the gap either.
        seed: Of inputs and noise.
    """

    examples: int = 200
    test_examples: int = 200
    seed: int = 0

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return inputs `(n, 1)` and targets `(n, 1)`, the training examples first."""
        generator = torch.Generator().manual_seed(self.seed)
        count = self.examples + self.test_examples
        place = torch.rand(count, 1, generator=generator) * (ENDS[1] - EDGES[1] + EDGES[0] - ENDS[0]) + ENDS[0]
        x = torch.where(place < EDGES[0], place, place + EDGES[1] - EDGES[0])
        return x, curve(x) + NOISE * torch.randn(count, 1, generator=generator)

    def tests(self) -> Tensor:
        """Return the rows of the test examples, those of one split, `(1, m)`."""
        return torch.arange(self.examples, self.examples + self.test_examples)[None]


def curve(x: Tensor) -> Tensor:
    """Return the targets without noise."""
    return (2.5 * x).sin() + 0.3 * x


def inside(count: int) -> Tensor:
    """Return inputs in the middle half of the gap, `(n, 1)`."""
    low, high = EDGES
    return torch.linspace(low + (high - low) / 4, high - (high - low) / 4, count)[:, None]
