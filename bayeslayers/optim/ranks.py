"""Averages over the ranks of a process group, in one message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


def copy_from_first_rank(tensors: Iterable[Tensor]) -> None:
    """Replace tensors, in place, by those of rank 0 of the default process group: all begin with the same posterior.

    Raises:
        RuntimeError: If there is no process group.
    """
    dist = process_group()
    for tensor in tensors:
        dist.broadcast(tensor, src=0)


def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace tensors, in place, by their means over the ranks of the default process group.

    Each rank passes the same shapes in the same order. Ranks count alike, so they should hold equally
    many examples and draws. One reduction goes out for each dtype.

    Raises:
        RuntimeError: If there is no process group.
    """
    dist = process_group()
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for members in by_dtype.values():
        flat = _flatten_dense_tensors(members)
        dist.all_reduce(flat)
        for tensor, mean in zip(members, _unflatten_dense_tensors(flat / dist.get_world_size(), members), strict=True):
            tensor.copy_(mean)


def process_group() -> ModuleType:
    """Return `torch.distributed`, once its default process group is there.

    Raises:
        RuntimeError: If it is not.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("sync must be off without a process group. Call torch.distributed.init_process_group first.")
    return dist
