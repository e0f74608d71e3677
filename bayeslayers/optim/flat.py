"""Many small tensors as few large ones: what a tensor costs whatever its size is then paid once.

Small tensors are copied into a flat one, and back where they move. Nothing of it stays: parameters, buffers and state
keep memory of their own, whatever moves, loads or copies them between two steps. A large tensor stands for itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from bayeslayers.sampling import Site

SMALL = 2**14  # elements up to which a copy costs less than an op of its own (64 kB of float32)
_TOGETHER = 2**18  # elements of a flat tensor, which stays in a cache

T = TypeVar("T")


def bundles(items: Iterable[T], tensor: Callable[[T], Tensor], kind: Callable[[T], Hashable]) -> list[list[T]]:
    """Return items in bundles: of small tensors of one kind many, of large ones each by itself.

    Args:
        items: What has a tensor each.
        tensor: Returns an item's tensor.
        kind: Returns what must be the same in a bundle.
    """
    found: list[list[T]] = []
    open_: dict[Hashable, tuple[int, list[T]]] = {}
    for item in items:
        size = tensor(item).numel()
        if size > SMALL:
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


def scatter(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write back what `gather` returned, and an op has changed in place.

    Args:
        flat: The flat tensor.
        tensors: Those that it was gathered from.
    """
    if len(tensors) > 1:
        torch._foreach_copy_(list(tensors), spread(flat, tensors))  # pyright: ignore[reportPrivateImportUsage]


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
    """Return values that broadcast against tensors, one for each, so that they broadcast against these gathered.

    Args:
        values: All single numbers, or all of the tensors' shapes.
        like: The tensors.
    """
    if len(values) == 1:
        return values[0]
    flat = gather(values)
    if values[0].dim() > 0:
        return flat
    sizes = torch.tensor([x.numel() for x in like], device=flat.device)
    return flat.repeat_interleave(sizes, output_size=sum(x.numel() for x in like))


class Bundle:
    """Uncertain parameters that move together, their tensors gathered when they are first asked for.

    Args:
        parameters: The parameters: one, or small ones of one kind.
        sites: Their sites.
        statistics: Statistics of the step by parameter.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], sites: Mapping[Any, Site], statistics: Mapping[Any, Tensor]
    ) -> None:
        self.parameters = parameters
        self.sites = [sites[p] for p in parameters]
        self._statistics = statistics

    @functools.cached_property
    def mean(self) -> Tensor:
        return gather(self.parameters)

    @functools.cached_property
    def precision(self) -> Tensor:
        return gather([site.precision for site in self.sites])

    @functools.cached_property
    def prior_mean(self) -> Tensor:
        return filled([site.prior_mean for site in self.sites], self.parameters)

    @functools.cached_property
    def prior_precision(self) -> Tensor:
        return filled([site.prior_precision for site in self.sites], self.parameters)

    @functools.cached_property
    def grad(self) -> Tensor:
        return gather([cast(Tensor, p.grad) for p in self.parameters])

    @functools.cached_property
    def statistic(self) -> Tensor:
        return gather([self._statistics[p] for p in self.parameters])

    def write(self) -> None:
        """Write back the mean and the precision, which have been changed in place."""
        scatter(self.mean, self.parameters)
        scatter(self.precision, [site.precision for site in self.sites])
