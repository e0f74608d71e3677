"""Short messages between ranks: a row of numbers that each step begins with, and texts.

Every collective of this package is preceded by a row. So a rank that has failed can say so at any point where the
others wait for it, and none waits in vain. Texts are bytes of UTF-8: nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bayeslayers.distributed.lost import NumbersError, RankError, naming_the_lost

_TOLD = "All ranks know of it."  # a note of an error
_NUMBERS = 6  # of a row, beside its kind


class Kind(IntEnum):
    """What a rank says by its row."""

    STEP = 0  # numbers of a step or of another message
    FORWARD = 1  # rows of the batch that goes forward
    FAILED = 2  # an error, whose text follows
    REFUSED = 3  # likewise, of a step that changes nothing
    STOPPED = 4  # by a signal
    LEFT = 5  # no data any more


_ERRORS = (Kind.FAILED, Kind.REFUSED)


class Row(NamedTuple):
    """What one rank says.

    Attributes:
        kind: What it means.
        numbers: Its numbers; zeros follow those that were given.
    """

    kind: Kind
    numbers: tuple[float, ...]


def is_distributed() -> bool:
    """Return whether this process is one of several of a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def exchange(kind: Kind, *numbers: float) -> list[Row]:
    """Return the rows of all ranks, in their order.

    Raises:
        RankError: If another rank has failed, or is gone.
        KeyboardInterrupt: If another rank was stopped by a signal.
    """
    row = torch.zeros(1 + _NUMBERS, dtype=torch.float64, device=message_device())
    row[: 1 + len(numbers)] = torch.tensor([float(kind), *numbers], dtype=torch.float64)
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    with naming_the_lost():
        dist.all_gather(rows, row)
    found = [Row(Kind(int(values[0])), tuple(values[1:])) for values in torch.stack(rows).tolist()]
    failed = [rank for rank, row in enumerate(found) if row.kind in _ERRORS]
    if failed and kind not in _ERRORS:
        text = _gathered("")[failed[0]]
        refused = all(found[rank].kind is Kind.REFUSED for rank in failed)
        raise (NumbersError if text.startswith("FloatingPointError") else RankError)(
            f"rank {failed[0]} has failed, where all ranks stop. {text}", failed, refused
        )
    if kind not in (*_ERRORS, Kind.STOPPED) and any(row.kind is Kind.STOPPED for row in found):
        raise KeyboardInterrupt
    return found


def gather_text(text: str) -> list[str]:
    """Return the texts of all ranks, in their order; in a process alone, its own."""
    if not is_distributed():
        return [text]
    exchange(Kind.STEP)
    return _gathered(text)


def _gathered(text: str) -> list[str]:
    data, device = torch.frombuffer(bytearray(text.encode() + b" "), dtype=torch.uint8), message_device()
    size = torch.tensor([len(data)], device=device)
    with naming_the_lost():
        sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, size)
        longest = int(torch.cat(sizes).max())
        padded = torch.full((longest,), ord(" "), dtype=torch.uint8, device=device)
        padded[: len(data)] = data.to(device)
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
    return [part.cpu().numpy().tobytes().decode().rstrip(" ") for part in parts]


@contextmanager
def telling_failures(kind: Kind = Kind.FAILED) -> Iterator[None]:
    """Tell the other ranks of an error inside the scope: they stop at their next message, with a sentence that has it.

    An error that all ranks know of passes through.

    Args:
        kind: `FAILED`, or `REFUSED` where all can go on after it.
    """
    try:
        yield
    except RankError:
        raise
    except Exception as error:
        if is_distributed() and _TOLD not in getattr(error, "__notes__", ()):
            error.__notes__ = [*getattr(error, "__notes__", ()), _TOLD]  # pyright: ignore
            exchange(kind)
            _gathered(f"{type(error).__name__}: {error}")
        raise


def agree(facts: Mapping[str, Any]) -> None:
    """Refuse to go on unless all ranks state the same facts.

    Args:
        facts: Plain data by name: versions, shapes, settings.

    Raises:
        RankError: If a rank states another, with the rank and the difference.
    """
    if not is_distributed():
        return
    texts = gather_text(json.dumps(facts, sort_keys=True, default=str))
    first, own = json.loads(texts[0]), texts[0]
    for rank, text in enumerate(texts):
        if text == own:
            continue
        other = json.loads(text)
        key = next(key for key in sorted({*first, *other}) if first.get(key) != other.get(key))
        ours, theirs = _difference(first.get(key), other.get(key))
        raise RankError(
            f"{key} must be the same on all ranks, got {theirs} on rank {rank} and {ours} on rank 0. Start all ranks "
            "from the same environment, files and configuration.",
            [rank],
        )


def _difference(one: Any, other: Any, where: str = "") -> tuple[str, str]:
    """Return what differs in two values, the names inside them in front."""
    if isinstance(one, dict) and isinstance(other, dict):
        key = next(key for key in [*one, *other] if one.get(key) != other.get(key))
        return _difference(one.get(key), other.get(key), f"{key}: ")
    return f"{where}{one!r}", f"{where}{other!r}"


def broadcast(tensor: Tensor, source: int = 0) -> None:
    """Replace a tensor, in place, by that of a rank."""
    moved = tensor if tensor.device.type != "cpu" else tensor.to(message_device())
    with naming_the_lost():
        dist.broadcast(moved, source)
    if moved is not tensor:
        tensor.copy_(moved)


def message_device() -> torch.device:
    """Return where tensors of messages must be: on the CPU, but under nccl alone."""
    return torch.device("cpu" if "cpu" in str(dist.get_backend_config()) else "cuda")


def shares(weights: Sequence[float]) -> list[float]:
    """Return weights divided by their sum."""
    return [weight / sum(weights) for weight in weights]
