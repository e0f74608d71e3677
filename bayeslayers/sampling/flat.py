"""Many small tensors as few large ones: what a tensor costs whatever its size is then paid once.

Small tensors are copied into a flat one, and back where they move. Parameters, buffers and state keep memory of their
own, whatever moves, loads or copies them between two steps. A large tensor stands for itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

SMALL = 2**14  # elements up to which a copy costs less than an op of its own (64 kB of float32)
_TOGETHER = 2**18  # elements of a flat tensor, which stays in a cache
_FEW, _RUN = 8, 64  # tensors that share a node of autograd's graph, at least and at most

T = TypeVar("T")


def bundles(
    items: Iterable[T], tensor: Callable[[T], Tensor], kind: Callable[[T], Hashable], small: int = SMALL
) -> list[list[T]]:
    """Return items in bundles: of small tensors of one kind many, of large ones each by itself.

    Args:
        items: What has a tensor each.
        tensor: Returns an item's tensor.
        kind: Returns what must be the same in a bundle.
        small: Elements up to which a tensor is small.
    """
    found: list[list[T]] = []
    open_: dict[Hashable, tuple[int, list[T]]] = {}
    for item in items:
        size = tensor(item).numel()
        if size > small:
            found.append([item])
            continue
        key = kind(item)
        before, bundle = open_.get(key, (_TOGETHER, []))
        if before + size > _TOGETHER:
            before, bundle = 0, []
            found.append(bundle)
        bundle.append(item)
        open_[key] = before + size, bundle
    return found


def joined(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return tensors that hold the same values: large ones as they are, small ones copied into flat ones."""
    tensors = list(tensors)
    small = [x for x in tensors if x.numel() <= SMALL]
    kinds: dict[Hashable, list[Tensor]] = {}
    for tensor in small:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return [x for x in tensors if x.numel() > SMALL] + [gather(part) for part in kinds.values()]


def gather(tensors: Sequence[Tensor]) -> Tensor:
    """Return one tensor itself, several copied into a flat one."""
    if len(tensors) == 1:
        return tensors[0]
    return torch._C._nn.flatten_dense_tensors(list(tensors))  # pyright: ignore[reportAttributeAccessIssue]


class Scratch:
    """Memory in which the same small tensors are gathered in each step; views of its parts take longer than a copy."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Any, Tensor, list[Tensor]]] = {}

    def gather(self, key: Hashable, tensors: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> Tensor:
        """Return one tensor itself, several copied into a flat one, which the next call with this key overwrites.

        Args:
            key: What the tensors are.
            tensors: The tensors.
            like: Tensors of the shapes that single values are broadcast to; None where the tensors have theirs.
        """
        if len(tensors) == 1:
            return tensors[0]
        like = tensors if like is None else like
        kind = (tensors[0].dtype, tensors[0].device, [x.shape for x in like])
        before, flat, parts = self._kept.get(key, (None, tensors[0], []))
        if before != kind:
            flat = tensors[0].new_empty(sum(x.numel() for x in like))
            parts = spread(flat, like)
            self._kept[key] = kind, flat, parts
        torch._foreach_copy_(parts, list(tensors))  # pyright: ignore[reportPrivateImportUsage]
        return flat

    def scatter(self, key: Hashable, tensors: Sequence[Tensor]) -> None:
        """Write back what `gather` returned, and an op has changed in place.

        Args:
            key: What the tensors are.
            tensors: Those that were gathered last with this key.
        """
        if len(tensors) > 1:
            torch._foreach_copy_(list(tensors), self._kept[key][2])  # pyright: ignore[reportPrivateImportUsage]


def spread(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of the parts of a flat tensor, in the shapes of others; one tensor as it is.

    Args:
        flat: The flat tensor.
        like: Tensors of the shapes.
    """
    if len(like) == 1:
        return [flat]
    return torch._C._nn.unflatten_dense_tensors(flat, list(like))  # pyright: ignore[reportAttributeAccessIssue]


def filled(values: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """Return single values, one for each of several tensors, as often as these have elements, by few launches.

    Args:
        values: The values.
        like: The tensors.
    """
    flat, sizes = gather(values), tuple(x.numel() for x in like)
    return flat.repeat_interleave(_on_device(sizes, flat.device), output_size=sum(sizes))


@functools.lru_cache(maxsize=256)
def _on_device(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return sizes as a tensor: each copy to a GPU would wait for it."""
    with torch.inference_mode(False):
        return torch.tensor(sizes, device=device)


class _Moved(torch.autograd.Function):
    """Sums of several tensors and a change of each, which gets the gradient of its sum."""

    @staticmethod
    def forward(ctx, changes, *tensors):
        ctx.set_materialize_grads(False)
        return tuple(torch._foreach_add(tensors, changes))  # pyright: ignore[reportPrivateImportUsage]

    @staticmethod
    def backward(ctx, *grads):
        return (None, *grads)


def moved(tensors: Sequence[Tensor], changes: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
    """Return tensors plus a change of each, through which gradients reach the tensors.

    Neighbours share a node of autograd's graph. Others do not, for a node waits for all of its gradients, and what
    sends them to other ranks waits for the node.

    Args:
        tensors: Small tensors.
        changes: What is added to each.
        places: Where they are in the network, in rising order.
    """
    found: list[Tensor] = []
    for run in _runs(places):
        own, parts = tensors[run], changes[run]
        if len(own) >= _FEW:
            found += _Moved.apply(parts, *own)
        else:
            found += [tensor + change for tensor, change in zip(own, parts, strict=True)]
    return found


def _runs(places: Sequence[int]) -> list[slice]:
    """Return the runs of consecutive places, of a bounded length."""
    ends = [i for i in range(1, len(places)) if places[i] != places[i - 1] + 1] + [len(places)]
    runs, start = [], 0
    for end in ends:
        runs += [slice(first, min(first + _RUN, end)) for first in range(start, end, _RUN)]
        start = end
    return runs
