"""Counts what makes a GPU wait: reads of a tensor's values by Python, and ops whose shapes depend on values."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_READS = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.is_nonzero, aten.masked_select, aten._unique2}
_COPIES = ("tolist", "numpy")  # of values on the CPU, which no op sees
_ON_CPU = ("/kernels/numba_draw.py",)  # what reads tensors of the CPU alone


class _Reads(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in _READS or _selects(func.overloadpacket, args):
            _note(self._found, func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _selects(op, args) -> bool:
    """Return whether an op takes the elements that a mask names."""
    indexes = op in (aten.index, aten.index_put, aten.index_put_)
    return indexes and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _note(found: list[str], name: str) -> None:
    frames = reversed(traceback.extract_stack())
    caller = next(frame for frame in frames if "/torch/" not in frame.filename and frame.filename != __file__)
    if not caller.filename.endswith(_ON_CPU):
        found.append(f"{caller.filename}:{caller.lineno} {name}")


@contextmanager
def reads_of_device() -> Iterator[list[str]]:
    """Collect in the scope where values are read, as "file:line op"."""
    found: list[str] = []

    def counting(original):
        def read(self: Tensor, *args, **kwargs):
            _note(found, original.__name__)
            with torch._C.DisableTorchFunction():  # a mode would call this again
                return original(self, *args, **kwargs)

        return read

    patches = [patch.object(Tensor, name, counting(getattr(Tensor, name))) for name in _COPIES]
    for each in patches:
        each.start()
    try:
        with _Reads(found):
            yield found
    finally:
        for each in patches:
            each.stop()
