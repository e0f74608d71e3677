"""Counts what would make a GPU wait: reads of a tensor's values by Python."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch import Tensor

READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy")


@contextmanager
def reads_of_device() -> Iterator[list[str]]:
    """Collect in the scope where tensors are read, as "file:line function"."""
    found: list[str] = []

    def counting(original):
        def read(self: Tensor, *args, **kwargs):
            caller = next(
                frame for frame in reversed(traceback.extract_stack()[:-1]) if "/torch/" not in frame.filename
            )
            found.append(f"{caller.filename}:{caller.lineno} {original.__name__}")
            return original(self, *args, **kwargs)

        return read

    patches = [patch.object(Tensor, name, counting(getattr(Tensor, name))) for name in READS]
    for each in patches:
        each.start()
    try:
        yield found
    finally:
        for each in patches:
            each.stop()
