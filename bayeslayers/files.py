"""Files that are written whole or not at all, and folders that one writer at a time changes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that its old or its new content is there at any time, also after a power cut.

    Raises:
        OSError: If it cannot be written, as on a full disk; named by `path`, which is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def one_writer(folder: Path, *, reads: bool = False) -> Iterator[None]:
    """Wait for other writers of a folder, processes and threads, and keep them out; nothing is left in it.

    Where the system or the file system has no such locks, this does nothing.

    Args:
        folder: Folder.
        reads: Keep only writers out, for a reader of several files: it may run beside other readers.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = None
    try:
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_SH if reads else fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)
