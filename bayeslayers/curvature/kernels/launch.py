"""Whether a kernel runs, in which language, and what happens where it cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bayeslayers.curvature.op import is_eager

LANGUAGES = {"cuda": "triton", "cpu": "numba"}  # by type of device; ROCm's devices are called "cuda" too
# Values from which an elementwise kernel is launched: a guess for Triton, as no GPU has been timed.
LARGE = {"triton": 2**16, "numba": 2**12}

T = TypeVar("T")


class _State:
    """What the process has chosen and met: which languages are off, and which of their kernels have failed."""

    off: set[str] = set()  # noqa: RUF012  (there is one state)
    failed: set[tuple[str, str]] = set()  # noqa: RUF012


def use_triton(on: bool = True) -> None:
    """Turn the Triton kernels on or off, in the whole process. They are on where Triton can be imported.

    Kernels run on CUDA devices alone. A kernel that cannot be compiled or launched is replaced by torch ops from then
    on, with one warning; turning the kernels on again tries it again.

    Args:
        on: Whether to use them.
    """
    _use("triton", on)


def use_numba(on: bool = True) -> None:
    """Turn the Numba kernels of the CPU on or off, in the whole process. They are on where Numba can be imported.

    A kernel is compiled when it first runs, which takes about a second, and kept on disk. One that cannot be compiled
    is replaced as those of `use_triton` are.

    Args:
        on: Whether to use them.
    """
    _use("numba", on)


def _use(language: str, on: bool) -> None:
    (_State.off.discard if on else _State.off.add)(language)
    _State.failed = {(used, name) for used, name in _State.failed if used != language}


def language_of(tensor: Tensor) -> str:
    """Return the language of the kernels for a tensor's device, "" for none.

    Args:
        tensor: The tensor.
    """
    return LANGUAGES.get(tensor.device.type, "")


def kernels_of(concept: str, tensor: Tensor) -> Any:
    """Return the module of the kernels for a tensor's device, which imports their language.

    Args:
        concept: What they compute: "draw" or "step".
        tensor: The tensor, of a device with a language.
    """
    return importlib.import_module(f"bayeslayers.curvature.kernels.{language_of(tensor)}_{concept}")


def is_large(tensor: Tensor) -> bool:
    """Return whether a kernel for the elements of a tensor is worth its launch.

    Args:
        tensor: The tensor.
    """
    least = LARGE.get(language_of(tensor))
    return least is not None and tensor.numel() >= least


def runs(name: str, first: Tensor, *tensors: Tensor) -> bool:
    """Return whether a kernel may run on tensors: ordinary ones of one device, and no vmap or compiler looks on.

    Args:
        name: Of the kernel.
        first: What it reads and writes.
        *tensors: More of it.
    """
    language, device = language_of(first), first.device
    if language == "" or language in _State.off or (language, name) in _State.failed:
        return False
    for x in (first, *tensors):
        if (type(x) is not Tensor and type(x) is not nn.Parameter) or x.device != device:
            return False
    return is_eager() and _has(language)


def takes(name: str, tensors: Sequence[Tensor]) -> bool:
    """Return whether an elementwise kernel may run on tensors: large ones of float32, as `runs` and `in_one_order` say.

    Args:
        name: Of the kernel.
        tensors: What it reads and writes; those of no dimension are single values.
    """
    first = tensors[0]
    if not is_large(first):
        return False
    shape, stride = first.shape, first.stride()
    for x in tensors:
        if x.dtype is not torch.float32 or (x.dim() > 0 and (x.stride() != stride or x.shape != shape)):
            return False
    return in_one_order(first) and runs(name, *tensors)


def attempt(name: str, tensor: Tensor, launch: Callable[[], T]) -> T | None:
    """Return what a function that launches a kernel returns; None, after a warning, where it fails.

    Args:
        name: Of the kernel, which is not tried again then.
        tensor: A tensor on its device.
        launch: The function; it changes nothing before the kernel runs.
    """
    language = language_of(tensor)
    if (language, name) in _State.failed:
        return None
    try:
        return launch()
    except torch.OutOfMemoryError:  # the torch ops take no less
        raise
    except Exception as error:  # of a compiler or a driver: they have no common class
        _State.failed.add((language, name))
        text = (str(error).strip().splitlines() or ["no message"])[0][:200].rstrip(".")
        warnings.warn(
            f"the {language.capitalize()} kernel '{name}' must compile and run, got {type(error).__name__}: {text}. "
            "Torch ops replace it from now on. Turn the kernels off by "
            f"bayeslayers.curvature.kernels.use_{language}(False).",
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
def _has(language: str) -> bool:
    return importlib.util.find_spec(language) is not None
