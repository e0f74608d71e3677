"""Ranks that are forks of the test's process, which have torch imported: a pair of them costs a tenth of a second."""

from __future__ import annotations

import json
import os
import socket
import traceback

import torch

import bayeslayers as bl

WHAT_FORKS_SAY = "ignore:.*fork:DeprecationWarning"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def places(size: int) -> list[dict[str, str]]:
    """Return the variables that SLURM sets for so many ranks on one machine."""
    port = str(free_port())
    shared = {"SLURM_NTASKS": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(size)]


def run_ranks(work, folder, size=2, timeout=20.0, survivors=None):
    """Return what `work(world, folder)` returns on each rank, as JSON holds it; an error as "NAME: its message".

    Args:
        work: What each rank does.
        folder: Where ranks may write.
        size: Ranks.
        timeout: Seconds that they wait for each other.
        survivors: Ranks that come to an end by themselves; None for all.
    """
    children = []
    for rank, environment in enumerate(places(size)):
        if (child := os.fork()) == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                with bl.distributed.start("cpu", timeout, environment) as world:
                    found = work(world, folder)
                status = 0
            except BaseException as error:
                if not isinstance(error, RuntimeError | ValueError | ArithmeticError | OSError | KeyboardInterrupt):
                    traceback.print_exc()
                found = f"{type(error).__name__}: {error}"
            finally:
                (folder / f"result{rank}").write_text(json.dumps(found))
                os._exit(status)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    kept = range(size) if survivors is None else survivors
    return [json.loads((folder / f"result{rank}").read_text()) for rank in kept]
