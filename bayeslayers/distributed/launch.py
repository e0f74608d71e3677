"""How a process was started: alone, or as one of several by torchrun, mpirun or SLURM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Launcher = Literal["alone", "torchrun", "mpirun", "slurm"]

# What Open MPI, MPICH and MVAPICH tell the processes that they start. SLURM may set MPICH's PMI_SIZE too.
_MPI = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")
_LOWEST_PORT, _PORTS = 15_000, 20_000  # of a SLURM job, below those that systems hand out


@dataclass(frozen=True)
class Place:
    """Where a process stands among those that were started together.

    Attributes:
        launcher: What started them.
        rank: Its number, from 0.
        size: Processes in all.
        local_rank: Its number on its machine.
        local_size: Processes on its machine.
        address: Host of rank 0; empty where the launcher's own rendezvous says it.
        port: Port there; 0 for a free one.
    """

    launcher: Launcher = "alone"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    port: int = 0


def launcher_of(environment: Mapping[str, str]) -> Launcher:
    """Return what started this process, by the variables that it set.

    torchrun inside a job of SLURM or MPI comes first, then mpirun inside a job of SLURM.
    """
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        return "torchrun"
    slurm = {"SLURM_PROCID", "SLURM_NTASKS"} <= environment.keys()
    if any(name in environment for name in _MPI[: 3 if slurm else 4]):
        return "mpirun"
    return "slurm" if slurm else "alone"


def started_by_mpi(environment: Mapping[str, str]) -> int:
    """Return how many processes mpirun says that it has started, 1 where it says nothing.

    >>> started_by_mpi({"OMPI_COMM_WORLD_SIZE": "4"})
    4
    """
    sizes = (environment.get(name, "") for name in ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE"))
    return max((int(size) for size in sizes if size.isdecimal()), default=1)


def place_by_torchrun(environment: Mapping[str, str]) -> Place:
    """Return the place that torchrun's variables, or those of torch's `env://`, say."""
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    local_rank = _number(environment, "LOCAL_RANK", rank)
    return Place("torchrun", rank, size, local_rank, _number(environment, "LOCAL_WORLD_SIZE", size))


def place_by_slurm(environment: Mapping[str, str]) -> Place:
    """Return the place that the variables of `srun` say.

    Rank 0 runs on the first node of the job. Its port follows from the job's number, so that all ranks know it; the
    variables MASTER_ADDR and MASTER_PORT name others.
    """
    rank = _number(environment, "SLURM_PROCID")
    size = _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS"))
    job = _number(environment, "SLURM_JOB_ID", 0) + _number(environment, "SLURM_STEP_ID", 0)
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    return Place(
        "slurm",
        rank,
        size,
        _number(environment, "SLURM_LOCALID", 0),
        int(environment.get("SLURM_STEP_TASKS_PER_NODE", str(size)).partition("(")[0].partition(",")[0]),
        environment.get("MASTER_ADDR") or first_host(nodes),
        _number(environment, "MASTER_PORT", _LOWEST_PORT + job % _PORTS),
    )


def first_host(nodes: str) -> str:
    """Return the first host of a list of nodes, as SLURM writes it.

    >>> first_host("gpu[03-05,09],login"), first_host("a1,a2"), first_host("")
    ('gpu03', 'a1', '127.0.0.1')
    """
    match = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\])?([^,\[]*)", nodes)
    assert match is not None  # every part may be empty
    return "".join(part or "" for part in match.groups()) or "127.0.0.1"


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name)
    if value is None and default is not None:
        return default
    if value is None or not value.isdecimal():
        raise ValueError(f"{name} must be an integer >= 0, as the launcher sets it, got {value!r}.")
    return int(value)
