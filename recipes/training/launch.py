"""What a run by several processes says between its ranks, beside the steps of its optimiser.

A process alone calls the same functions, which then say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bayeslayers.distributed import World, gather_text, is_distributed
from bayeslayers.distributed.messages import Kind, exchange
from bayeslayers.optim.ranks import weighted_sum

T = TypeVar("T")
_stops: list[Callable[[], bool]] = []


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Return for each flag whether any rank has set it."""
    if not is_distributed():
        return flags
    rows = exchange(Kind.STEP, *map(float, flags))
    return tuple(any(row.numbers[place] for row in rows) for place in range(len(flags)))


def share_of_ranks(weight: float) -> float:
    """Return a rank's share of the weights of all ranks."""
    return weight / sum(row.numbers[0] for row in exchange(Kind.STEP, weight)) if is_distributed() else 1.0


@contextmanager
def leader_first(world: World) -> Iterator[None]:
    """Run the scope on the first rank, which may download data or write files, and then on the others."""
    if not world.leads:
        exchange(Kind.STEP)
    yield
    if world.leads and world.size > 1:
        exchange(Kind.STEP)


def decided_by_leader(world: World, decide: Callable[[], bool]) -> bool:
    """Return what the first rank decides."""
    return gather_text(str(world.leads and decide()))[0] == str(True)


@contextmanager
def stopping_by(stopped: Callable[[], bool]) -> Iterator[None]:
    """Let `stoppable` stop inside the scope, where a signal has come."""
    _stops.append(stopped)
    try:
        yield
    finally:
        _stops.remove(stopped)


def stoppable(batches: Iterable[T]) -> Iterator[T]:
    """Yield batches; between two of them a signal of any rank stops all.

    Raises:
        KeyboardInterrupt: If one has come.
    """
    for batch in batches:
        if is_distributed() and any(stopped() for stopped in _stops):
            exchange(Kind.STOPPED)
            raise KeyboardInterrupt
        yield batch


@dataclass(frozen=True)
class Totals:
    """What a rank has added up in an epoch.

    Attributes:
        sums: Losses and seconds.
        tally: Numbers of the task's tally.
        tensors: Its tensors.
    """

    sums: Mapping[str, float]
    tally: Mapping[str, float]
    tensors: Mapping[str, Tensor]

    def of_all_ranks(self) -> Totals:
        """Return the totals of all ranks on the first of them, nothing on the others; seconds are the first's."""
        if not is_distributed():
            return self
        names = [key for key in self.sums if key != "seconds"]
        numbers = torch.tensor([*(self.sums[key] for key in names), *self.tally.values()], dtype=torch.float64)
        tensors = [tensor.double().clone() for tensor in self.tensors.values()]
        exchange(Kind.STEP)
        weighted_sum([numbers, *tensors], 1.0)
        leads = dist.get_rank() == 0
        values = [value * leads for value in numbers.tolist()]
        sums = dict(zip(names, values, strict=False)) | {"seconds": self.sums["seconds"] * leads}
        tally = dict(zip(self.tally, values[len(names) :], strict=True))
        return Totals(
            {key: sums[key] for key in self.sums},
            tally,
            {key: tensor * leads for key, tensor in zip(self.tensors, tensors, strict=True)},
        )


def rank_states() -> list[Tensor]:
    """Return the states of torch's default generators on the ranks behind the first."""
    if not is_distributed():
        return []
    texts = gather_text(torch.get_rng_state().numpy().tobytes().hex())
    return [torch.from_numpy(np.frombuffer(bytes.fromhex(text), dtype=np.uint8).copy()) for text in texts[1:]]


def restore_rank_state(world: World, states: Sequence[Tensor], seed: int) -> None:
    """Give a rank behind the first the state of its default generator, or one of its own where there were fewer ranks.

    Args:
        world: The ranks.
        states: As `rank_states` returned them.
        seed: Of the run.
    """
    if world.leads:
        return
    if world.rank <= len(states):
        torch.set_rng_state(states[world.rank - 1])
    else:
        torch.manual_seed(world.seed(seed))
