"""Ranks that are gone: who they are, once a collective has failed.

A collective that fails says which connection broke, not which rank is gone. So each rank of a started world shows in
the rendezvous store that it lives: a thread counts there. A rank whose collective fails reports that, and looks whose
count has stopped.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch.distributed as dist
from torch._C._distributed_c10d import Store

BEAT = 0.5  # seconds between two counts
_SILENCE = 2.0  # seconds without any, after which a rank counts as gone


class RankError(RuntimeError):
    """A step that all ranks stop at, because of some of them.

    Attributes:
        ranks: Those ranks.
        refused: Whether the step was refused by all, and changed nothing: they can go on.
    """

    def __init__(self, message: str, ranks: Sequence[int] = (), refused: bool = False):
        super().__init__(message)
        self.ranks, self.refused = tuple(ranks), refused


class NumbersError(RankError, FloatingPointError):
    """A step that all ranks refuse, because numbers of some of them are not finite."""


@dataclass
class Roll:
    """Who is there, as the store says.

    Attributes:
        store: The store.
        rank: This process's rank.
        size: Processes in all.
        hosted: Whether the process of rank 0 is the store's server.
        patience: Seconds that rank 0 waits for the others to have asked, before the store goes with it.
    """

    store: Store
    rank: int
    size: int
    hosted: bool
    patience: float = 60.0
    _ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        self.store.set(f"name/{self.rank}", f"{socket.gethostname()}, process {os.getpid()}")
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the store is gone
            while not self._ended.wait(BEAT):
                self.store.add(f"beat/{self.rank}", 1)

    def end(self) -> None:
        """Count no more."""
        self._ended.set()

    def gone(self) -> list[int]:
        """Return the ranks that have stopped counting and have not reported a failed collective."""
        try:
            self.store.set(f"failed/{self.rank}", "")
            before = self._beats()
            time.sleep(_SILENCE)
            after = self._beats()
            others = [rank for rank in range(self.size) if rank != self.rank]
            silent = [rank for rank in others if before[rank] == after[rank]]
            found = [rank for rank in silent if not self.store.check([f"failed/{rank}"])]
            self.store.set(f"asked/{self.rank}", "")
            if self.hosted and self.rank == 0:
                self._wait_for(rank for rank in others if rank not in found)
            return found
        except RuntimeError:
            return [0] if self.hosted and self.rank != 0 else []

    def _wait_for(self, ranks: Iterable[int]) -> None:
        """Wait until these ranks have asked too."""
        keys, until = [f"asked/{rank}" for rank in ranks], time.monotonic() + self.patience
        while keys and not self.store.check(keys) and time.monotonic() < until:
            time.sleep(BEAT / 5)

    def _beats(self) -> list[int]:
        return [self.store.add(f"beat/{rank}", 0) for rank in range(self.size)]

    def name(self, rank: int) -> str:
        """Return a rank in words, with host and process where the store still has them."""
        with suppress(RuntimeError):
            if self.store.check([f"name/{rank}"]):
                return f"rank {rank} ({self.store.get(f'name/{rank}').decode()})"
        return f"rank {rank}"


_roll: list[Roll] = []  # that of the world that was started, while it is


@contextmanager
def calling_the_roll(roll: Roll) -> Iterator[None]:
    """Know who is there inside the scope."""
    _roll.append(roll)
    try:
        yield
    finally:
        _roll.remove(roll)
        roll.end()


@contextmanager
def naming_the_lost() -> Iterator[None]:
    """Turn the error of a collective into a sentence that names the ranks that are gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        if not _roll:
            raise RankError(f"all ranks must take part in each step, but one is gone: {reason}.") from error
        roll = _roll[-1]
        with suppress(RuntimeError, ValueError):
            dist.destroy_process_group()  # which ends the others' waiting for this rank
        gone = roll.gone()
        if gone:
            who = " and ".join(roll.name(rank) for rank in gone)
            raise RankError(f"{who} must take part in each step, but is gone. All ranks stop.", gone) from error
        raise RankError(f"all ranks must take part in each step, but one did not in time: {reason}.") from error
