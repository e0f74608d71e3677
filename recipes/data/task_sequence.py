"""Sequences of tasks for continual learning, made from one data set: its pixels permuted, or its classes split.

"permuted-mnist" has ten tasks, each with the pixels of all images in another order (`zoo.permutation`); "split-mnist"
has five, of two digits each. Inputs are flat, `(n, 784)`. For a network with a head for each task they are `(n, 785)`:
the number of the task follows the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import zoo
from bayeslayers.checks import did_you_mean
from recipes.data.split import Split, load_split
from zoo.permutations import PIXELS, TASKS

CLASSES_PER_TASK = 2
BASES = ("mnist", "fashion-mnist")  # of 28 x 28 grey pixels
NAMES = tuple(f"{kind}-{base}" for kind in ("permuted", "split") for base in BASES)


@dataclass(frozen=True)
class TaskExamples:
    """The examples of one task.

    Attributes:
        split: Images and labels.
        order: Permutation of the pixels `(784,)`; None to leave them in theirs.
        head: Number that follows the pixels; None for no number.
    """

    split: Split
    order: Tensor | None = None
    head: int | None = None

    def __len__(self) -> int:
        return len(self.split)

    @property
    def targets(self) -> Tensor:
        """The labels."""
        return self.split.labels

    def inputs(self, index: Tensor | slice) -> Tensor:
        """Return inputs `(n, 784)` or `(n, 785)`, pixels in [0, 1]."""
        x = self.split.inputs(index).flatten(1)
        x = x if self.order is None else x[:, self.order]
        return x if self.head is None else torch.cat([x, x.new_full((len(x), 1), self.head)], 1)

    def limited(self, limit: int | None) -> TaskExamples:
        """Return some of the examples, as `Split.limited`."""
        return replace(self, split=self.split.limited(limit))

    def held_out(self, count: int) -> tuple[TaskExamples, TaskExamples]:
        """Return the examples without some, and these, as `Split.held_out`."""
        rest, held = self.split.held_out(count)
        return replace(self, split=rest), replace(self, split=held)


@dataclass(frozen=True)
class Joined:
    """The examples of several tasks, one after another."""

    parts: Sequence[TaskExamples]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def targets(self) -> Tensor:
        """The labels."""
        return torch.cat([part.targets for part in self.parts])

    @property
    def task(self) -> Tensor:
        """The number of each example's task."""
        return torch.arange(len(self.parts)).repeat_interleave(torch.tensor([len(part) for part in self.parts]))

    def inputs(self, index: Tensor | slice) -> Tensor:
        """Return inputs, each as its task has them."""
        chosen = torch.arange(len(self))[index]
        task, edges = self.task[chosen], torch.tensor([0, *(len(part) for part in self.parts)]).cumsum(0)
        positions = {k: (task == k).nonzero().flatten() for k in task.unique().tolist()}
        if not positions:
            return self.parts[0].inputs(chosen)
        found = [self.parts[k].inputs(chosen[position] - edges[k]) for k, position in positions.items()]
        return torch.cat(found)[torch.cat([*positions.values()]).argsort()]


def base_of(name: str) -> str:
    """Return the data set that a sequence is made from.

    Raises:
        ValueError: If there is no such sequence.
    """
    if name not in NAMES:
        raise ValueError(f"unknown sequence of tasks {name!r}.{did_you_mean(name, NAMES)} Known: {', '.join(NAMES)}.")
    return name.partition("-")[2]


def number_of_tasks(name: str) -> int:
    """Return how many tasks a sequence has."""
    base_of(name)
    return TASKS if name.startswith("permuted") else 10 // CLASSES_PER_TASK


def sequence(name: str, split: Split, features: int) -> list[TaskExamples]:
    """Return the tasks that a sequence makes of a data set's split.

    Args:
        name: One of `NAMES`.
        split: Images and labels.
        features: Numbers of an input: 784, or 785 with that of the head.

    Raises:
        ValueError: If there is no such sequence, or inputs cannot have so many numbers.
    """
    if features not in (PIXELS, PIXELS + 1):
        raise ValueError(
            f"model.input_size must be [{PIXELS}], or [{PIXELS + 1}] with a head a task, got [{features}]."
        )
    numbers, heads = range(number_of_tasks(name)), features > PIXELS
    if name.startswith("permuted"):
        if heads:
            raise ValueError(f"model must have one head for {name}, whose tasks have the same classes. Use mlp.")
        return [TaskExamples(split, zoo.permutation(task)) for task in numbers]
    own = [(split.labels // CLASSES_PER_TASK == task).nonzero().flatten() for task in numbers]
    return [TaskExamples(split.taken(own[task]), None, task if heads else None) for task in numbers]


def load_sequence(
    name: str, root: str | Path | None, *, train: bool, features: int, limit: int | None = None
) -> list[TaskExamples]:
    """Return the tasks of a sequence, read from the data set that it is made from.

    Args:
        name: One of `NAMES`.
        root: Folder of data, as for `load_split`.
        train: The training split, else the test split.
        features: As for `sequence`.
        limit: Examples of each task.

    Raises:
        ValueError: As `sequence` and `load_split` do.
    """
    split = load_split(base_of(name), root, train=train)
    return [task.limited(limit) for task in sequence(name, split, features)]
