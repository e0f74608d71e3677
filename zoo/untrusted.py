"""Build an untrusted card's network on the meta device, within limits, before it gets memory and time."""

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

# Our networks and those of torchvision, timm and smp take up to 10 calls per tensor, and four times as many where
# most tensors are not Bayesian, which have only one tensor each in the file.
_CALLS_PER_TENSOR = 100
_LARGEST_ARGUMENT = 10**5
# Numbers of any size that no tensor's shape is made of: units of the data, and precisions.
_SCALES = {"mean", "std", "target_mean", "target_std", "prior_precision", "init_precision"}
# Some builders read the values of short schedules, so those are on the CPU and not on the meta device. Most builders
# of position indices fail if only some of their tensors have values, so `_VALUES` is tried second.
_SCHEDULES = {torch.linspace: 10_000}
_VALUES = {**_SCHEDULES, torch.arange: 32, torch.tensor: 32}


def build_checked(card: Card, weights: Weights, source: str) -> nn.Module:
    """Build the network that a card describes, after checking that it fits the weights.

    It is built first on the meta device, where tensors have no memory, and under a limit on torch calls
    that grows with the weight file. So a card of a few bytes cannot exhaust the machine's memory or time.

    Args:
        card: Untrusted card with the name of a builder.
        weights: Its weight file.
        source: Path of its `config.json`, for messages.

    Raises:
        PosteriorError: If the card does not describe a network of the zoo, or the weights belong to another.
    """
    numbers = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
    sizes = {key: value for key, value in card.kwargs.items() if key not in _SCALES}
    _check_arguments(sizes, max(_LARGEST_ARGUMENT, numbers), source)
    calls = 1000 + _CALLS_PER_TENSOR * len(weights.shapes)
    try:
        with torch.device("meta"), _CallLimit(calls, _SCHEDULES):
            untrusted = build(card, source)
    except PosteriorError:
        with torch.device("meta"), _CallLimit(calls, _VALUES):
            untrusted = build(card, source)
    weights.check_shapes(untrusted)
    check_cost(untrusted, card, source)
    return build(card, source)


def build(card: Card, source: str) -> nn.Module:
    """Build the network that a card describes, on the default device.

    Raises:
        PosteriorError: If the card does not describe a network of the zoo.
    """
    try:
        model = rebuild(card)
        size = card_of(model).input_size
        if size != card.input_size:
            raise ValueError(f"input_size must be {size}, that of its network, got {card.input_size}.")
        if card.resize is not None:
            check_resize("resize", card.resize, size)
        return describe(model, card)
    except Exception as error:  # the arguments may be anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise PosteriorError(f"{source} must describe a network of the zoo: {reason}") from error


def _check_arguments(value: Any, limit: float, source: str) -> None:
    """Raise for a number, at any depth, that is too large for any argument of this network."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_arguments(item, limit, source)
    elif isinstance(value, int | float) and not abs(value) <= limit:
        raise PosteriorError(f"{source} must describe a network of the zoo: its number {value!r:.30} is too large.")


class _CallLimit(TorchFunctionMode):
    """A scope that raises once torch has made more than `calls` tensors in this thread.

    Args:
        calls: Number of calls that may make a tensor.
        short: Functions whose results get values on the CPU, up to a size.
    """

    def __init__(self, calls: int, short: dict[Callable[..., Any], int]):
        super().__init__()
        self._calls, self._short = calls, short

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor):  # such as the end of no_grad, which must not raise
            return result
        self._calls -= 1
        if self._calls < 0:
            raise ValueError("it is far larger than its weights.")
        if func in self._short and result.is_meta and result.numel() <= self._short[func]:
            return func(*args, **{**(kwargs or {}), "device": "cpu"})
        return result
