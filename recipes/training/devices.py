"""Devices by the names that torch gives them."""

from __future__ import annotations

import torch


def device_named(name: str) -> torch.device:
    """Return the device of a name, as "cpu" or "cuda:1".

    Raises:
        ValueError: If there is no such device, or it cannot compute.
    """
    try:
        torch.zeros(1, device=name).item()
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"device must be one that torch reaches, got {name!r}: {reason}.") from None
