"""Devices by the names that torch gives them."""

from __future__ import annotations

import torch


def device_in_place(name: str | None) -> str | None:
    """Return the name of a device that is there, None for none; see `device_named`."""
    if name is not None:
        device_named(name)
    return name


def device_named(name: str) -> torch.device:
    """Return the device of a name, as "cpu" or "cuda:1".

    Raises:
        ValueError: If there is no such device, or it cannot compute.
    """
    try:
        torch.zeros(1, device=name).item()
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises any of them, by device
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"device must be one that torch reaches, got {name!r}: {reason}.") from None
