"""Predictions of ranks that share the batches of a data set, in the order of one process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bayeslayers.curvature.kernels.draw import StandardNormal
from bayeslayers.distributed import gather_text
from bayeslayers.distributed.messages import Kind, broadcast, exchange
from bayeslayers.likelihoods import Likelihood
from bayeslayers.prediction.result import Prediction
from bayeslayers.sampling import posterior
from bayeslayers.sampling.flat import gather
from bayeslayers.sampling.sampler import sites_together


def skip_samples(
    model: nn.Module, num_samples: int, generator: torch.Generator | None, options: Mapping[str, Any], batches: int
) -> None:
    """Move a generator on as predictions by sampled weights would, without computing them.

    Under other methods what is drawn depends on the data: each rank then has draws of its own.

    Args:
        model: The model.
        num_samples: Samples of a batch.
        generator: Source of the samples.
        options: Further arguments of `predict`.
        batches: Number of batches.
    """
    if options.get("method", "sample") != "sample":
        return
    found = sites_together(list(posterior(model)))
    memory = [torch.empty_like(gather([site.mean for _, site in bundle])) for bundle in found]
    for _ in range(batches * num_samples):
        normal = StandardNormal(generator)
        for noise in memory:
            normal.fill_(noise)


def shared_predictions(
    batches: Iterator[Callable[[], tuple[Prediction, Tensor | None]]],
    skip: Callable[[int], None],
    likelihood: Likelihood,
) -> Iterator[tuple[Prediction, Tensor | None]]:
    """Yield the predictions of all ranks, batch by batch in turn.

    Args:
        batches: For each batch of this rank, a function that predicts it.
        skip: Moves the generator on by so many batches.
        likelihood: Of the predictions.

    Raises:
        ValueError: If no rank has a batch.
    """
    rank, empty = dist.get_rank(), True
    while True:
        own = next(batches, None)
        count = sum(int(row.numbers[0]) for row in exchange(Kind.STEP, own is not None))
        if count == 0:
            break
        empty = False
        skip(min(rank, count))
        found = None if own is None else own()
        skip(max(0, count - 1 - rank))
        yield from _gathered(found, count, likelihood)
    if empty:
        raise ValueError("data must hold at least one batch, got none on any rank.")


def _gathered(
    found: tuple[Prediction, Tensor | None] | None, count: int, likelihood: Likelihood
) -> Iterator[tuple[Prediction, Tensor | None]]:
    """Yield the predictions of the first `count` ranks."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    if found is not None:
        prediction, target = found
        fields = {field.name: getattr(prediction, field.name) for field in dataclasses.fields(prediction)}
        tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        tensors |= {} if target is None else {"target": target}
        plain = {name: value for name, value in fields.items() if name not in (*tensors, "likelihood")}
    shapes = {name: [list(value.shape), str(value.dtype).removeprefix("torch.")] for name, value in tensors.items()}
    for rank, text in enumerate(gather_text(json.dumps([shapes, plain]))[:count]):
        shapes, plain = json.loads(text)
        values: dict[str, Tensor] = {}
        for name, (shape, dtype) in shapes.items():
            value = tensors[name].cpu() if rank == dist.get_rank() else torch.empty(shape, dtype=getattr(torch, dtype))
            values[name] = value.contiguous()
            broadcast(values[name], rank)
        target = values.pop("target", None)
        plain["samples_per_batch"] = tuple(plain["samples_per_batch"])
        yield Prediction(**values, **plain, likelihood=likelihood), target
