"""Numbers of the right width: sums in at least float32, and operands as autocast wants them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_operand(x: Tensor) -> Tensor:
    """Cast to autocast's dtype, where it is on, by a differentiable cast.

    Inside a rule all operands then have one dtype, in the backward too.
    """
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def full_precision(device: str) -> AbstractContextManager[object]:
    """Return a scope without autocast, in which a rule's sums keep the dtype of their operands."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in at least float32: squares of half-precision gradients would overflow or vanish."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
