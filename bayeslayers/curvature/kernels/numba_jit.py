"""How the kernels of the CPU are compiled, how they see a tensor, and how threads share a large one."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numba
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

_SHARE = 2**19  # values of a thread, at least: with fewer, handing them over takes longer than it saves

_config: Any = numba.config  # pyright: ignore[reportPrivateImportUsage]

T = TypeVar("T")


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return a function compiled when it is first called; the machine code is kept in the user's cache on disk.

    Numba would keep it in the package's own folder, where it stays when the package is uninstalled. `NUMBA_CACHE_DIR`
    and `XDG_CACHE_HOME` in the environment name other places; where none can be written, nothing is kept.

    Args:
        function: The function, on arrays and numbers.
        **options: Options of Numba.
    """
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}, **options}
    place = _config.CACHE_DIR
    folder = place or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "bayeslayers")
    _config.CACHE_DIR = folder
    try:
        return numba.njit(function, cache=_is_writable(folder), **options)
    finally:
        _config.CACHE_DIR = place


def _is_writable(folder: str) -> bool:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


@intrinsic
def _pointer(typing_context, address):  # pyright: ignore[reportUnusedParameter]
    def code(context, builder, signature, values):
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), code


@jit
def floats(address, size):
    """Return the memory of float32 values as an array: to make one of a tensor in Python takes ten times as long."""
    return numba.carray(_pointer(address), size)  # pyright: ignore[reportCallIssue, reportPrivateImportUsage]


def places(tensors: Sequence[Tensor | None], start: int) -> list[int]:
    """Return the addresses of the values of tensors from one place on; 0 for none, and that of a single value.

    Args:
        tensors: Float32 tensors that fill their memory in one order, and single values.
        start: The place.
    """
    return [0 if x is None else x.data_ptr() + (4 * start if x.numel() > 1 else 0) for x in tensors]


def in_parts(size: int, run: Callable[[int, int], T], unit: int = 1) -> list[T]:
    """Return what a function returns for parts of a tensor, at once where torch uses several threads.

    Args:
        size: Number of values.
        run: Takes the first place of a part, and how many there are; what it does must release Python's lock. It holds
            the tensors, not their addresses alone: it may still run when the caller has been interrupted.
        unit: What the first place of each part is a multiple of.
    """
    count = min(torch.get_num_threads(), size // _SHARE)
    if count < 2:
        return [run(0, size)]
    share = math.ceil(size / count / unit) * unit
    return list(_threads().map(lambda start: run(start, min(share, size - start)), range(0, size, share)))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "bayeslayers")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has no threads but its own
