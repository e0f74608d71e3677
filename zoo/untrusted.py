"""The network of a card from elsewhere on paper: its names and shapes, before it is given memory and time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bayeslayers.storage.card import Card, PosteriorError
from bayeslayers.storage.weight_file import Weights
from zoo.cost import check_cost
from zoo.normalise import check_resize
from zoo.registry import card_of, describe, rebuild

# Our networks and those of torchvision, timm and smp take up to 10 calls per tensor; four times as many where
# most tensors are not Bayesian and so stand in the file alone.
_CALLS_PER_TENSOR = 100
_LARGEST_ARGUMENT = 10**5
# Short schedules, whose values some builders read, have values although the rest is on the meta device. Most
# builders of position indices fail with values in some of their tensors and not in others, so that comes second.
_SCHEDULES = {torch.linspace: 10_000}
_VALUES = {**_SCHEDULES, torch.arange: 32, torch.tensor: 32}


def build_checked(card: Card, weights: Weights, source: str) -> nn.Module:
    """Build the network that a card describes, if it is the one whose weights these are.

    It is built on the meta device first, where tensors have no memory, and under a limit of calls of torch
    that grows with the weight file: a card of a few bytes can neither take the machine's memory nor its time.

    Args:
        card: Card with the name of a builder, by anyone.
        weights: Its weight file.
        source: Path of its `config.json`, for messages.

    Raises:
        PosteriorError: If the card describes no network of the zoo, or another than that of the weights.
    """
    numbers = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
    _check_arguments(card.kwargs, max(_LARGEST_ARGUMENT, numbers), source)
    calls = 1000 + _CALLS_PER_TENSOR * len(weights.shapes)
    try:
        with torch.device("meta"), _Sketch(calls, _SCHEDULES):
            sketch = build(card, source)
    except PosteriorError:
        with torch.device("meta"), _Sketch(calls, _VALUES):
            sketch = build(card, source)
    weights.check_shapes(sketch)
    check_cost(sketch, card, source)
    return build(card, source)


def build(card: Card, source: str) -> nn.Module:
    """Build the network that a card describes, on the default device.

    Raises:
        PosteriorError: If the card describes no network of the zoo.
    """
    try:
        model = rebuild(card)
        size = card_of(model).input_size
        if size != card.input_size:
            raise ValueError(f"input_size must be {size}, as its network's, got {card.input_size}.")
        if card.resize is not None:
            check_resize("resize", card.resize, size)
        return describe(model, card)
    except Exception as error:  # of arguments that may be anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise PosteriorError(f"{source} must describe a network of the zoo: {reason}") from error


def _check_arguments(value: Any, limit: float, source: str) -> None:
    """Refuse numbers too large for any argument of this network, at any depth."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_arguments(item, limit, source)
    elif isinstance(value, int | float) and not abs(value) <= limit:
        raise PosteriorError(f"{source} must describe a network of the zoo: {value!r:.30} is too large a number in it.")


class _Sketch(TorchFunctionMode):
    """Raise once torch has made more tensors than `calls` in this thread.

    Args:
        calls: Calls that may make one.
        short: Functions whose results have values on the CPU, up to a size.
    """

    def __init__(self, calls: int, short: dict[Callable[..., Any], int]):
        super().__init__()
        self._calls, self._short = calls, short

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor):  # as the end of no_grad, which must not be kept from its work
            return result
        self._calls -= 1
        if self._calls < 0:
            raise ValueError("it is far larger than its weights.")
        if func in self._short and result.is_meta and result.numel() <= self._short[func]:
            return func(*args, **{**(kwargs or {}), "device": "cpu"})
        return result
