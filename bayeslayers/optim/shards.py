"""A step in shards: each rank keeps the optimiser's state of some tensors, moves them, and sends them to the others.

Gradients and statistics go to the ranks that move their tensors (reduce-scatter), and what has moved goes to all
(all-gather), which together is as much as an all-reduce. The state of a tensor is on one rank alone, as in stage 1 of
ZeRO.

Source: Rajbhandari et al. 2020 (arXiv 1910.02054), section 5.1; Osawa et al. 2019 (arXiv 1906.02506), section 3.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bayeslayers.distributed.lost import naming_the_lost
from bayeslayers.distributed.messages import broadcast, gather_text


class Shards:
    """Which rank moves which tensors: whole ones, dealt out from the largest on to the rank that has the least so far.

    Attributes:
        rank: This process's.
        size: Ranks.
        owner: The rank of each parameter.
    """

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.owner: dict[nn.Parameter, int] = {}

    def deal(self, parameters: Iterable[nn.Parameter]) -> None:
        """Deal out those parameters that have no owner yet."""
        held = [0] * self.size
        for parameter, owner in self.owner.items():
            held[owner] += parameter.numel()
        new = [parameter for parameter in parameters if parameter not in self.owner]
        for parameter in sorted(new, key=lambda p: -p.numel()):
            owner = held.index(min(held))
            self.owner[parameter] = owner
            held[owner] += parameter.numel()

    def owns(self, parameter: nn.Parameter) -> bool:
        """Return whether this rank moves a parameter."""
        return self.owner[parameter] == self.rank

    def sum_to_owners(self, tensors: Sequence[tuple[nn.Parameter, Tensor]], wire: torch.dtype | None = None) -> None:
        """Replace tensors, in place on the ranks that move their parameters, by the sums of those of all ranks.

        Args:
            tensors: Tensors with their parameters, in one order on all ranks.
            wire: Floating-point type that is sent; None for that of the tensors.
        """
        for dtype, members in _by_dtype(tensors).items():
            smaller = wire if wire is not None and wire.itemsize < dtype.itemsize else dtype
            buffer, places = self._buffer(members, smaller)
            for (_, tensor), place in zip(members, places, strict=True):
                place.copy_(tensor.flatten())
            own = buffer.new_empty(len(buffer) // self.size)
            with naming_the_lost():
                dist.reduce_scatter_single(own, buffer)
            buffer.view(self.size, -1)[self.rank] = own
            self._write_back(members, places, self.rank)

    def send_to_all(self, tensors: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Replace tensors, in place on all ranks, by those of the rank that moves their parameters."""
        for dtype, members in _by_dtype(tensors).items():
            buffer, places = self._buffer(members, dtype)
            for (parameter, tensor), place in zip(members, places, strict=True):
                if self.owns(parameter):
                    place.copy_(tensor.flatten())
            own = buffer.view(self.size, -1)[self.rank].clone()
            with naming_the_lost():
                dist.all_gather_single(buffer, own)
            self._write_back(members, places, None)

    def _buffer(
        self, members: Sequence[tuple[nn.Parameter, Tensor]], dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]]:
        """Return a buffer with a part of the same length for each rank, and the place of each tensor in it."""
        held, starts = [0] * self.size, []
        for parameter, tensor in members:
            starts.append(held[self.owner[parameter]])
            held[self.owner[parameter]] += tensor.numel()
        longest = max(held)
        buffer = torch.zeros(longest * self.size, dtype=dtype, device=members[0][1].device)
        places = [
            buffer[(first := self.owner[parameter] * longest + start) : first + tensor.numel()]
            for (parameter, tensor), start in zip(members, starts, strict=True)
        ]
        return buffer, places

    def _write_back(
        self, members: Sequence[tuple[nn.Parameter, Tensor]], places: Sequence[Tensor], owner: int | None
    ) -> None:
        for (parameter, tensor), place in zip(members, places, strict=True):
            if owner is None or self.owner[parameter] == owner:
                tensor.copy_(place.view_as(tensor))

    def whole_state(self, state: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        """Return the state of all parameters on all ranks, which call it together.

        Args:
            state: That of this rank's parameters by their numbers.
        """
        tensors = {key: {k: v for k, v in own.items() if isinstance(v, Tensor)} for key, own in state.items()}
        told = {key: {name: _layout(value) for name, value in own.items()} for key, own in state.items()}
        found: dict[int, dict[str, Any]] = {}
        for rank, text in enumerate(gather_text(json.dumps(told))):
            for key, own in json.loads(text).items():
                held = tensors.get(int(key), {}) if rank == self.rank else {}
                found[int(key)] = {name: self._sent(held.get(name), value, rank) for name, value in own.items()}
        return {key: found[key] for key in sorted(found)}

    def _sent(self, own: Tensor | None, value: Any, rank: int) -> Any:
        """Return an entry of the state of a rank, of which a tensor is sent."""
        if not isinstance(value, list):
            return value
        like = torch.empty(value[0], dtype=getattr(torch, value[1]), device=next(iter(self.owner)).device)
        tensor = like if own is None else own.contiguous()
        broadcast(tensor, rank)
        return tensor


def _layout(value: Any) -> Any:
    """Return shape and type of a tensor, anything else as it is."""
    return [list(value.shape), str(value.dtype).removeprefix("torch.")] if isinstance(value, Tensor) else value


def _by_dtype(tensors: Sequence[tuple[nn.Parameter, Tensor]]) -> dict[torch.dtype, list[tuple[nn.Parameter, Tensor]]]:
    found: dict[torch.dtype, list[tuple[nn.Parameter, Tensor]]] = {}
    for parameter, tensor in tensors:
        found.setdefault(tensor.dtype, []).append((parameter, tensor))
    return found
