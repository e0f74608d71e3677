"""One rank of the measurement of scaling: it times its parts of a step, and the whole, and the first prints them.

`recipes.reports.scaling` starts as many as it measures, with the variables that torchrun sets.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import bayeslayers as bl
import zoo
from bayeslayers.distributed import World, start
from bayeslayers.distributed.messages import Kind, exchange
from bayeslayers.optim.ranks import weighted_sum

SIZES = (1 << 10, 1 << 16, 1 << 19, 1 << 21)  # float32 numbers of the reductions that latency and bandwidth come from
BUCKET = 25 * 2**20  # bytes of DistributedDataParallel's


def times_of(model_name: str, batch: int, rounds: int, world: World) -> dict[str, Any]:
    """Return medians over rounds, in seconds, of a step and its parts; each counts as long as the slowest rank takes.

    Args:
        model_name: Name in the zoo, of a classifier.
        batch: Examples of each rank.
        rounds: Steps of each measurement, in turn.
        world: The ranks.
    """
    torch.manual_seed(0)
    model = zoo.create(model_name)
    x, y = torch.rand(batch, *zoo.card_of(model).input_size), torch.arange(batch) % 10
    alone, together = (
        _optimizer(model if sync else zoo.create(model_name), batch, world, sync) for sync in (False, world.size > 1)
    )
    size = sum(p.numel() for p in model.parameters())
    parts: dict[str, Callable[[], object]] = {
        "compute": lambda: _backward(*alone, x, y),
        "update": alone[1].step,
        "step": lambda: (_backward(*together, x, y), together[1].step()),
    }
    if world.size == 1:
        return {"parameters": size} | _medians(parts, rounds, world)
    gradients, both = [torch.randn(size)], [torch.randn(size), torch.randn(size)]
    halves = {n: [torch.ones(n // 2), torch.ones(n // 2)] for n in SIZES}
    reductions = {str(n): partial(weighted_sum, halves[n], 0.5) for n in SIZES}
    parts |= {
        "message": lambda: exchange(Kind.STEP),
        "reduction": lambda: weighted_sum(both, 0.5),
        "reduction_of_ddp": lambda: _in_buckets(gradients[0]),
    }
    found = _medians(parts | reductions, rounds, world)
    fitted = [[4 * n, found.pop(str(n))] for n in SIZES]
    return {"parameters": size, "reductions": fitted} | found


def _optimizer(model: nn.Module, batch: int, world: World, sync: bool) -> tuple[nn.Module, bl.VOGN]:
    generator = torch.Generator().manual_seed(0)
    return model, bl.VOGN(model, batch * world.size, lr=1e-3, generator=generator, sync=sync)


def _backward(model: nn.Module, optimizer: bl.VOGN, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    with optimizer.sampled():
        F.cross_entropy(model(x), y).backward()


def _in_buckets(gradients: Tensor) -> None:
    """Reduce gradients alone, as DistributedDataParallel does."""
    for bucket in gradients.split(BUCKET // 4):
        dist.all_reduce(bucket)


def _medians(parts: Mapping[str, Callable[[], object]], rounds: int, world: World) -> dict[str, float]:
    """Return the median over rounds of the slowest rank's seconds of each part; ranks begin each part together.

    A round runs all parts in turn, so that a machine that is slower for a while is so for all of them.
    """
    seconds = torch.zeros(rounds, len(parts), dtype=torch.float64)
    for number in range(-max(2, rounds // 10), rounds):
        for place, part in enumerate(parts.values()):
            if world.size > 1:
                dist.barrier()
            began = time.perf_counter()
            part()
            if number >= 0:
                seconds[number, place] = time.perf_counter() - began
    if world.size > 1:
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return {name: statistics.median(column.tolist()) for name, column in zip(parts, seconds.T, strict=True)}


def main() -> None:
    """Measure what the arguments say, and print it on the first rank."""
    torch.set_num_threads(1)
    asked = json.loads(sys.argv[1])
    with start("cpu", timeout=300) as world:
        found = times_of(asked["model"], asked["batch"], asked["rounds"], world)
        if world.leads:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
