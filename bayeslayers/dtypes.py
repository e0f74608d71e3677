"""Numbers of the right width: sums in at least float32, and operands as autocast wants them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_operand(x: Tensor) -> Tensor:
    """Cast to autocast's dtype, where it is on, by a differentiable cast.

    Inside a rule all operands then have one dtype, in the backward too.
    """
    if not torch._C._is_any_autocast_enabled():  # to ask for the type of the device costs ten times as much
        return x
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def full_precision(device: str) -> AbstractContextManager[object]:
    """Return a scope without autocast, in which a rule's sums keep the dtype of their operands."""
    on = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in at least float32: squares of half-precision gradients would overflow or vanish."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
