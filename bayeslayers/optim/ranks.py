"""What an optimiser does together with those of other ranks: it agrees, shares its draws, and averages."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from bayeslayers.distributed.lost import naming_the_lost
from bayeslayers.distributed.messages import Kind, Row, broadcast, exchange, gather_text, is_distributed
from bayeslayers.unwrap import unwrapping

Sync = bool | Literal["bfloat16"]


def wire_dtype(sync: Sync) -> torch.dtype | None:
    """Return what numbers are sent as: None for what they are.

    Raises:
        ValueError: If `sync` is another word.
    """
    if isinstance(sync, str) and sync != "bfloat16":
        raise ValueError(f"sync must be true, false or 'bfloat16', got {sync!r}.")
    return torch.bfloat16 if sync == "bfloat16" else None


def spans_ranks(model: nn.Module) -> bool:
    """Return whether a model is in a `DistributedDataParallel` of several ranks.

    That averages gradients alone: with a curvature of its own, each rank would move to another posterior.
    """
    return any(_has_ranks(module) for module in unwrapping(model))


def _has_ranks(module: object) -> bool:
    group = module.process_group if isinstance(module, DistributedDataParallel) else None
    return group is not None and group.size() > 1


def averaging_wrapper(model: nn.Module) -> DistributedDataParallel | None:
    """Return the `DistributedDataParallel` of several ranks that a forward pass of a model runs in, if any.

    It may be around the model, or around a module that holds it, as Lightning's.
    """
    around = [module for module in unwrapping(model) if isinstance(module, DistributedDataParallel)]
    active = getattr(DistributedDataParallel, "_active_ddp_module", None)
    return next((module for module in [*around, active] if module is not None and _has_ranks(module)), None)


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


def refuse_sharded_parameters(model: nn.Module) -> None:
    """Raise if parameters are in shards of several ranks, as `fully_shard` (FSDP2) or `FullyShardedDataParallel` makes.

    Raises:
        ValueError: If so.
    """
    wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in unwrapping(model))
    names = [name for name, parameter in model.named_parameters() if type(parameter.data).__name__ == "DTensor"]
    if wrapped or names:
        what = f"'{names[0]}' is a DTensor" if names else "model is in FullyShardedDataParallel"
        raise ValueError(
            f"parameters must be whole on each rank, for a layer draws all of its weights, but {what}. Use the model "
            "without fully_shard; sync=True and shard=True keep the optimizer's state in shards."
        )


def refuse_no_group() -> None:
    """Raise if there is no process group to average over.

    Raises:
        RuntimeError: If so.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "sync must be off without a process group. Call torch.distributed.init_process_group first, or begin with "
            "bl.distributed.start()."
        )


def copy_from_first_rank(tensors: Iterable[Tensor]) -> None:
    """Replace tensors, in place, by those of rank 0 of the default process group: all begin with the same posterior."""
    if is_distributed():
        for tensor in tensors:
            broadcast(tensor.data)


def shared_generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """Return a generator in the state of that of rank 0.

    Args:
        generator: That of the user; None for one that torch's default generator seeds.
        device: Where a new one is to be.
    """
    if generator is None:
        seed = torch.randint(2**62, (1,))
        if is_distributed():
            broadcast(seed)
        return torch.Generator(device).manual_seed(int(seed))
    share_state(generator)
    return generator


def share_state(generator: torch.Generator, source: int = 0) -> None:
    """Give a generator the state of that of a rank."""
    if is_distributed():
        state = generator.get_state()
        broadcast(state, source)
        generator.set_state(state)


def local_groups(count: int) -> range:
    """Return which of so many sample groups this rank belongs to, or which it runs one after the other.

    Raises:
        ValueError: If neither the ranks can be divided into the groups, nor the groups among the ranks.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
    if count % size == 0:
        return range(rank * (count // size), (rank + 1) * (count // size))
    if size % count == 0:
        return range(rank * count // size, rank * count // size + 1)
    raise ValueError(f"num_mc_groups must divide the number of ranks, or be a multiple of it, {size}, got {count}.")


def ranks_of_group(count: int) -> range:
    """Return the ranks that share the draws of this one, where there are so many sample groups."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
    if count >= size:
        return range(rank, rank + 1)
    each = size // count
    return range(rank // each * each, (rank // each + 1) * each)


class Forwards:
    """The forward passes of a scope, as they matter to other ranks.

    Attributes:
        rows: Examples that went forward.
        reduced: Whether a `DistributedDataParallel` averages the gradients of the scope.
        place: Examples of the last pass on ranks before this one, and on all that share its draw; None where it is
            not needed.
    """

    def __init__(self) -> None:
        self.rows, self.reduced = 0, False
        self.place: tuple[int, int] | None = None

    @contextmanager
    def watched(self, model: nn.Module, sharing: Sequence[int] | None) -> Iterator[None]:
        """Watch the calls of a model inside the scope.

        Args:
            model: The model.
            sharing: Ranks that share a draw, in which the place of this one's examples is wanted; None for no place.
        """
        self.rows, self.reduced, self.place = 0, False, None

        def look(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            if not torch.is_grad_enabled():
                return
            rows = next((len(x) for x in _tensors((args, kwargs)) if x.dim() > 0), 0)
            self.rows += rows
            if (wrapper := averaging_wrapper(model)) is not None:
                self.reduced = wrapper.require_backward_grad_sync
            if sharing is not None:
                found = exchange(Kind.FORWARD, rows)
                counts = [int(row.numbers[0]) if row.kind is Kind.FORWARD else 0 for row in found]
                before = sum(counts[rank] for rank in sharing if rank < dist.get_rank())
                self.place = before, sum(counts[rank] for rank in sharing)

        hook = model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


@contextmanager
def refusing_unnoticed_wrapper(model: nn.Module) -> Iterator[None]:
    """Raise if a model runs in a `DistributedDataParallel` that its optimiser, without `sync`, does not know of."""
    if not is_distributed():
        yield
        return

    def look(module: nn.Module, args: Any) -> None:
        if averaging_wrapper(model) is not None:
            raise RuntimeError(
                "sync must be on for a model in DistributedDataParallel, which averages gradients and no statistics: "
                "each rank would move to another posterior. Wrap the model before the optimizer is made, or pass "
                "sync=True."
            )

    hook = model.register_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested arguments."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from _tensors(value)


def statistics_of_norms(model: nn.Module) -> list[Tensor]:
    """Return the running means and variances of BatchNorm that training moves, and that no wrapper shares."""
    if spans_ranks(model):
        return []
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    return [x for norm in norms for x in (norm.running_mean, norm.running_var) if x is not None]


def rows_of_step(kind: Kind, weights: tuple[float, float], draws: int, layout: Sequence[Any]) -> list[Row]:
    """Return what all ranks bring to a step, once the last forward pass of any of them is over.

    Args:
        kind: `STEP`, or `LEFT` of a rank without data.
        weights: Those of this rank's loss, and of its squares, see `Averages`.
        draws: Its draws.
        layout: What it would send.
    """
    digest = zlib.crc32(json.dumps(layout).encode())
    numbers = weights[0], draws, digest, weights[1]
    rows = exchange(kind, *numbers)
    while any(row.kind is Kind.FORWARD for row in rows):
        rows = exchange(kind, *numbers)
    return rows


def shares_of(rows: Sequence[Row], rank: int) -> tuple[float, float]:
    """Return the shares of a rank in the means of a step: of gradients, and of sums of squares.

    They differ where elements have weights w: a mean is divided by the sum of w, a sum of squares by that of w^2.
    """
    first, second = (rows[rank].numbers[number] / sum(row.numbers[number] for row in rows) for number in (0, 3))
    return first, second


def all_layouts(layout: Sequence[Any], rows: Sequence[Row]) -> list[Any]:
    """Return what any rank sends, in the order of the first that does; all ranks ask for it."""
    if len({row.numbers[2] for row in rows}) == 1:
        return list(layout)
    found = [json.loads(text) for text in gather_text(json.dumps(layout))]
    return [json.loads(entry) for entry in dict.fromkeys(json.dumps(entry) for own in found for entry in own)]


def weighted_sum(
    tensors: Sequence[Tensor], share: float, wire: torch.dtype | None = None, group: dist.ProcessGroup | None = None
) -> None:
    """Replace tensors, in place, by their sums over ranks, each multiplied by its rank's share: a weighted mean.

    Each rank passes the same shapes in the same order. One reduction goes out for each dtype.

    Args:
        tensors: The tensors.
        share: This rank's weight; those of all ranks add up to 1.
        wire: Floating-point type that is sent; None for that of the tensors.
        group: The ranks; None for all.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for dtype, members in by_dtype.items():
        flat = _flatten_dense_tensors(members)
        sent = flat.mul_(share) if wire is None or wire.itemsize >= dtype.itemsize else (flat * share).to(wire)
        with naming_the_lost():
            dist.all_reduce(sent, group=group)
        for tensor, value in zip(members, _unflatten_dense_tensors(sent.to(dtype), members), strict=True):
            tensor.copy_(value)
