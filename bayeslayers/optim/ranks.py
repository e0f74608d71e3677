"""Averages over the ranks of a process group, in one message, and what torch's wrappers for several devices ask for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.parallel import DataParallel, DistributedDataParallel

from bayeslayers.unwrap import unwrapping


def spans_ranks(model: nn.Module) -> bool:
    """Return whether a model is in a `DistributedDataParallel` of several ranks.

    That averages gradients alone: with a curvature of its own, each rank would move to another posterior.
    """
    groups = [module.process_group for module in unwrapping(model) if isinstance(module, DistributedDataParallel)]
    return any(group is not None and group.size() > 1 for group in groups)


def refuse_replicas(model: nn.Module) -> None:
    """Raise if a model is in a `DataParallel` over several devices.

    Its replicas are copies of the layers, and run in threads of their own: they compute with the means.

    Raises:
        ValueError: If so.
    """
    for module in unwrapping(model):
        if isinstance(module, DataParallel) and len(module.device_ids) > 1:
            raise ValueError(
                f"model must be on one device, got DataParallel over {len(module.device_ids)} devices, whose replicas "
                "do not see the sampled weights. Use DistributedDataParallel."
            )


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
