"""Checks of arguments at the public boundary: one sentence naming argument, rule and value."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sized
from numbers import Integral

from torch import nn


def network(name: str, value: object) -> None:
    """Check that `value` is an `nn.Module`, and not the parameters that torch's optimisers take.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, nn.Module):
        advice = "Pass the model, not its parameters, which torch's optimisers take."
        if isinstance(value, str):
            advice = "zoo.load(name) loads a posterior."
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}. {advice}")


def size(name: str, value: float) -> float:
    """Return `value` if it is a finite number > 0, and not the data set itself."""
    if isinstance(value, Sized) and not isinstance(value, str) and getattr(value, "shape", None) != ():
        raise TypeError(
            f"{name} must be the number of training examples, got {type(value).__name__}. Pass the length of the data "
            "set: len(dataset), or len(loader.dataset)."
        )
    return positive(name, value)


def _number(name: str, value: float) -> None:
    try:
        float(value + 0)  # addition rejects a string of digits
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}.") from None


def positive(name: str, value: float) -> float:
    """Return `value` if it is a finite number > 0."""
    _number(name, value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {value}.")
    return value


def non_negative(name: str, value: float) -> float:
    """Return `value` if it is a finite number >= 0."""
    _number(name, value)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value}.")
    return value


def radius(name: str, value: float) -> float:
    """Return `value` if it is a number > 0; infinity means no bound."""
    _number(name, value)
    return value if value == math.inf else positive(name, value)


def at_least_one(name: str, value: int) -> int:
    """Return `value` if it is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")
    return int(value)


def fraction(name: str, value: float, *, one: bool = False) -> float:
    """Return `value` if it lies in [0, 1), or in (0, 1] when `one` is true."""
    _number(name, value)
    inside = 0 < value <= 1 if one else 0 <= value < 1
    if not inside:
        raise ValueError(f"{name} must be in {'(0, 1]' if one else '[0, 1)'}, got {value}.")
    return value


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a hint that lists the names closest to an unknown one, or an empty string."""
    matches = difflib.get_close_matches(name, list(names), n=3, cutoff=0.4)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
