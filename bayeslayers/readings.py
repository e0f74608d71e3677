"""Numbers that Python decides by, read from the device together: each read waits until the device has nothing to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Readings:
    """Numbers that are computed and not read yet. They stay on the device until one of them is asked for."""

    def __init__(self) -> None:
        self._values: list[float] = []
        self._waiting: list[Tensor] = []
        self._count = 0

    def later(self, tensors: Sequence[Tensor]) -> Callable[[], list[float]]:
        """Return a function for the values of tensors, whose first call reads all that wait.

        Args:
            tensors: Of one element or one dimension each, and unchanged until they are read.
        """
        start = self._count
        self._waiting.extend(tensors)
        self._count = end = start + sum(x.numel() for x in tensors)

        def values() -> list[float]:
            if end > len(self._values):
                self._values += read(self._waiting)
                self._waiting = []
            return self._values[start:end]

        return values


def read(tensors: Sequence[Tensor]) -> list[float]:
    """Return the values of tensors one after the other, by one read of each device.

    They are exact, as float64 has them: whole numbers up to 2^53.

    Args:
        tensors: Of one element or one dimension each.
    """
    devices = {x.device for x in tensors}
    if len(devices) > 1:
        found = {device: iter(read([x for x in tensors if x.device == device])) for device in devices}
        return [next(found[x.device]) for x in tensors for _ in range(x.numel())]
    flat = [x.reshape(-1) for x in tensors]
    if len({x.dtype for x in flat}) > 1:
        flat = [_wide(x) for x in flat]
    return [] if not flat else (torch.cat(flat) if len(flat) > 1 else flat[0]).tolist()


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.device.type != "mps" else x.float()  # which has no float64
