"""How the kernels of the CPU are compiled, and how they see a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba import types
from numba.extending import intrinsic


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return a function compiled when it is first called; the machine code is kept on disk where a place is found.

    Args:
        function: The function, on arrays and numbers.
        **options: Options of Numba.
    """
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}, **options}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return numba.njit(function, **options)


@intrinsic
def _pointer(typing_context, address):  # pyright: ignore[reportUnusedParameter]
    def code(context, builder, signature, values):
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), code


@jit
def floats(address, size):
    """Return the memory of float32 values as an array: to make one of a tensor in Python takes ten times as long."""
    return numba.carray(_pointer(address), size)  # pyright: ignore[reportCallIssue, reportPrivateImportUsage]
