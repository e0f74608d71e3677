"""Several processes that train together: their start, and their end."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from bayeslayers.checks import positive
from bayeslayers.distributed.launch import (
    Launcher,
    Place,
    launcher_of,
    place_by_slurm,
    place_by_torchrun,
    started_by_mpi,
)
from bayeslayers.distributed.lost import Roll, calling_the_roll
from bayeslayers.distributed.messages import agree

_STRIDE = 1_000_003  # between the seeds of two ranks


@dataclass(frozen=True)
class World:
    """The processes that were started together, as one of them sees them.

    Attributes:
        rank: This process's number, from 0.
        size: How many there are.
        local_rank: Its number on its machine.
        device: Where it computes.
        launcher: What started them: "alone", "torchrun", "mpirun" or "slurm".
        restarts: How often torchrun has started them again.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    launcher: Launcher = "alone"
    restarts: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Return this rank's part of so many examples: parts are consecutive, and differ by one example at most."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def seed(self, seed: int) -> int:
        """Return a seed of this rank's own, that of rank 0 being the one given."""
        return seed + _STRIDE * self.rank


_started: list[World] = []  # the world that `start` has joined, while it is


@contextmanager
def start(
    device: str | torch.device | None = None,
    timeout: float = 60.0,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[World]:
    """Join the processes that torchrun, mpirun or SLURM has started together, for the scope.

    It finds out how this process was started, meets the others at rank 0, and refuses ranks of other library versions.
    A process that was started alone is a world of one, without any process group; a process group that is there
    already is used, and left as it is. torch's wheels know no MPI: mpirun, through mpi4py, is how processes find each
    other, and gloo and nccl carry what they say.

    Args:
        device: Where to compute; None for the GPU of the local rank, the CPU if there are not enough GPUs.
        timeout: Seconds that a rank waits for the others in each step, > 0.
        environment: Variables of the process.

    Raises:
        ValueError: If a launcher's variable is not a number, or the timeout not positive.
        ImportError: If mpirun has started the process and mpi4py is not installed.
        RankError: If the ranks' versions differ.

    Example:
        >>> import bayeslayers as bl
        >>> with bl.distributed.start() as world:
        ...     print(world.rank, world.size, world.launcher)
        0 1 alone
    """
    positive("timeout", timeout)
    if dist.is_available() and dist.is_initialized():
        yield _present(device, environment)
        return
    launcher, restarts = launcher_of(environment), int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    waiting = timedelta(seconds=timeout)
    if launcher == "torchrun":
        place = place_by_torchrun(environment)
        if place.size == 1:
            yield World(device=_device(device, place), launcher=launcher, restarts=restarts)
            return
        store = next(iter(rendezvous("env://", place.rank, place.size, timeout=waiting)))[0]
    elif launcher == "alone":
        yield World(device=_device(device, Place()))
        return
    else:
        place, store = _met_by_mpi(waiting) if launcher == "mpirun" else _met_by_slurm(environment, waiting)
        if store is None:
            yield World(device=_device(device, place), launcher=launcher)
            return
    where = _device(device, place)
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    own = PrefixStore(f"group/{restarts}", store)
    dist.init_process_group(backend, store=own, rank=place.rank, world_size=place.size, timeout=waiting)
    hosted = launcher != "torchrun" or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    roll = Roll(PrefixStore(f"roll/{restarts}", store), place.rank, place.size, hosted, timeout)
    try:
        with calling_the_roll(roll):
            agree(versions())
            _started.append(World(place.rank, place.size, place.local_rank, where, launcher, restarts))
            yield _started[-1]
    finally:
        _started.clear()
        with suppress(RuntimeError, ValueError, AssertionError):  # it is gone with a lost rank
            dist.destroy_process_group()


def _present(device: str | torch.device | None, environment: Mapping[str, str]) -> World:
    """Return the world of the process group that is there: the one that was started, or that of the user's."""
    if _started:
        return _started[-1] if device is None else replace(_started[-1], device=torch.device(device))
    local_rank, local_size = int(environment.get("LOCAL_RANK", 0)), int(environment.get("LOCAL_WORLD_SIZE", 1))
    place = Place(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank, local_size=local_size)
    return World(place.rank, place.size, place.local_rank, _device(device, place), launcher_of(environment))


def versions() -> dict[str, str]:
    """Return the versions that ranks must have in common."""
    own = sys.modules["bayeslayers"].__version__  # which imports this module
    return {"bayeslayers": own, "torch": str(torch.__version__), "python": platform.python_version()}


def _device(device: str | torch.device | None, place: Place) -> torch.device:
    """Return where a process computes: the GPU of its local rank, where each has one."""
    if device is None:
        enough = torch.cuda.is_available() and torch.cuda.device_count() >= place.local_size
        device = f"cuda:{place.local_rank}" if enough else "cpu"
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    return where


def _met_by_slurm(environment: Mapping[str, str], timeout: timedelta) -> tuple[Place, Store | None]:
    place = place_by_slurm(environment)
    if place.size == 1:
        return place, None
    return place, TCPStore(place.address, place.port, place.size, place.rank == 0, timeout)


def _met_by_mpi(timeout: timedelta) -> tuple[Place, Store | None]:
    """Return place and store of a process that mpirun has started: rank 0 opens a free port, and tells it by MPI."""
    try:
        from mpi4py import MPI  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "mpirun needs mpi4py for ranks to find each other, got no such package. Run pip install "
            "'bayeslayers[mpi]', or start by torchrun."
        ) from error
    import socket

    comm = MPI.COMM_WORLD
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    address = "127.0.0.1" if local.size == comm.size else socket.gethostname()
    place = Place("mpirun", comm.rank, comm.size, local.rank, local.size, address)
    if place.size == 1:
        if (started := started_by_mpi(os.environ)) > 1:
            raise ValueError(
                f"mpirun and mpi4py must be of one MPI, got {started} processes each of which sees itself alone. Run "
                "pip install mpi4py mpich, which gives an mpirun too."
            )
        return place, None
    store = None
    if place.rank == 0:
        store = TCPStore(address, 0, place.size, True, timeout, wait_for_workers=False)
    told = bytearray(f"{address} {store.port if store else 0}".encode().ljust(256))
    comm.Bcast(told)
    if store is None:
        host, port = told.decode().split()
        store = TCPStore(host, int(port), place.size, False, timeout)
    return place, store
