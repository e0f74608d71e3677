"""How the kernels of the CPU are compiled, and how they see a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from torch import Tensor


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled when it is first called; the machine code is kept on disk where a place is found.

    Args:
        function: The function, on arrays and numbers.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return numba.njit(function, **options)


def flat(tensor: Tensor) -> np.ndarray:
    """Return the memory of a tensor that fills it in some order, as an array of one dimension.

    Args:
        tensor: The tensor, on the CPU.
    """
    return tensor.detach().as_strided((tensor.numel(),), (1,)).numpy()
