"""Whether a Triton kernel runs, and what happens where it cannot."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from bayeslayers.curvature.op import is_eager

DEVICES = {"cuda"}  # ROCm's devices have this name too
LARGE = 2**16  # values from which an elementwise kernel is launched: a guess, no GPU has been timed

T = TypeVar("T")


class _State:
    """What the process has chosen and met: whether kernels are on, and which of them have failed."""

    on = True
    failed: set[str] = set()  # noqa: RUF012  (there is one state)


def use_triton(on: bool = True) -> None:
    """Turn the Triton kernels on or off, in the whole process. They are on where Triton can be imported.

    Kernels run on CUDA devices alone. A kernel that cannot be compiled or launched is replaced by torch ops from then
    on, with one warning; turning the kernels on again tries it again.

    Args:
        on: Whether to use them.
    """
    _State.on = bool(on)
    _State.failed.clear()


def runs(name: str, *tensors: Tensor) -> bool:
    """Return whether a kernel may run on tensors: ordinary ones on a GPU, which neither vmap nor a compiler looks at.

    Args:
        name: Of the kernel.
        *tensors: What it reads and writes.
    """
    return (
        all(x.device.type in DEVICES and type(x) in (Tensor, nn.Parameter) for x in tensors)
        and _State.on
        and name not in _State.failed
        and is_eager()
        and _has_triton()
    )


def attempt(name: str, launch: Callable[[], T]) -> T | None:
    """Return what a function that launches a kernel returns; None, after a warning, where it fails.

    Args:
        name: Of the kernel, which is not tried again then.
        launch: The function; it changes nothing before the kernel runs.
    """
    if name in _State.failed:
        return None
    try:
        return launch()
    except torch.OutOfMemoryError:  # the torch ops take no less
        raise
    except Exception as error:  # of Triton's compiler, a C compiler or a driver: they have no common class
        _State.failed.add(name)
        text = (str(error).strip().splitlines() or ["no message"])[0][:200].rstrip(".")
        warnings.warn(
            f"the Triton kernel '{name}' must compile and run, got {type(error).__name__}: {text}. Torch ops replace "
            "it from now on. Turn the kernels off by bayeslayers.curvature.kernels.use_triton(False).",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def in_one_order(first: Tensor, *others: Tensor) -> bool:
    """Return whether tensors fill their memory in one order, so that a kernel can take them for flat ones.

    Args:
        first: A tensor.
        *others: More of them.
    """
    return all(x.stride() == first.stride() and x.shape == first.shape for x in others) and (
        first.is_contiguous() or (first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last))
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
