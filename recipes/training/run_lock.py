"""One training for a run folder: a lock that the system releases when its process ends, however it ends."""

from __future__ import annotations

import os
import re
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

LOCK = "run.lock"
_FAR = 2**30  # Windows locks bytes, which nobody else can read: one beyond the text
_HOLDER = re.compile(rb"process \d{1,20} on [\w.-]{1,255}")
# What torchrun, Slurm, Open MPI, MPICH and MVAPICH say of how many processes they have started.
_SIZES = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def refuse_many_processes(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to be one of several processes: each of them would train the whole network.

    Args:
        environment: Environment variables.

    Raises:
        ValueError: If a launcher says that it has started more than one.
    """
    for name in _SIZES:
        value = environment.get(name, "")
        if value.isdecimal() and int(value) > 1:
            raise ValueError(
                f"training must be one process, got {name}={value}: each would train the whole network. Start it "
                f"without a launcher, or set {name} to 1."
            )


_held: list[BinaryIO] = []  # open lock files of this process


def _close_in_child() -> None:
    """Close the lock files in a fork, such as a worker that reads data: it may outlive a training that is killed."""
    for file in _held:
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other trainings out of a run folder; folders that are made for it go if they stay empty.

    Args:
        folder: Run folder, made if need be.

    Raises:
        BlockingIOError: If another training holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = _acquired(folder)
    _held.append(file)
    try:
        yield
    finally:
        _held.remove(file)
        _release(folder, file)
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def _acquired(folder: Path) -> BinaryIO:
    """Return the open lock file of a folder, locked."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # whoever made it has removed it between `mkdir` and its look at what is there
            if folder.is_file():
                raise
            continue
        with suppress(FileNotFoundError):  # likewise
            file = open(folder / LOCK, "a+b")
            try:
                _lock(file, folder)
                if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                    file.flush()
                    return file
            except BaseException:
                file.close()
                raise
            file.close()  # its holder has removed it meanwhile


def _lock(file: BinaryIO, folder: Path) -> None:
    """Lock the file; warn where the file system has no locks."""
    try:
        _lock_or_raise(file)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = _HOLDER.search(file.read(1000))
        raise BlockingIOError(
            f"output must be a folder that no other training uses, got {folder}, which "
            f"{holder[0].decode() if holder else 'another process'} holds. Wait for it, or choose another --output."
        ) from None
    except OSError as error:
        warnings.warn(
            f"{folder} cannot be locked ({error.strerror}): a second training into it would not be noticed.",
            stacklevel=4,
        )


if sys.platform == "win32":
    import msvcrt

    def _lock_or_raise(file: BinaryIO) -> None:
        file.seek(_FAR)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

    def _release(folder: Path, file: BinaryIO) -> None:
        file.close()
        with suppress(OSError):  # the next holder has it open
            (folder / LOCK).unlink()

else:
    import fcntl

    def _lock_or_raise(file: BinaryIO) -> None:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _release(folder: Path, file: BinaryIO) -> None:
        with suppress(OSError):
            (folder / LOCK).unlink()  # while it is locked: whoever waits for this file sees that it has gone
        file.close()
