"""Checks of what a network returns: one tensor of real numbers, none of them NaN or infinite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_SHOWN = 5  # keys or parts that a message lists


class NonFiniteOutputError(FloatingPointError, ValueError):
    """Raised where a network's outputs have no predictive distribution, because some are NaN or infinite."""


def tensor_output(output: object) -> Tensor:
    """Return the output of a network after checking that it is one tensor of real numbers.

    Raises:
        TypeError: If it is anything else.
    """
    if not isinstance(output, Tensor):
        found = _kind(output)
    elif not output.is_floating_point():
        found = f"one of {output.dtype}"
    elif output.dim() == 0:
        found = "a single number"
    else:
        return output
    raise TypeError(
        f"the model's output must be a tensor of real numbers, examples in dimension 0, got {found}. "
        "Wrap the model in a module whose forward returns the outputs alone, such as the logits."
    )


class TensorNetwork(nn.Module):
    """A network whose output is checked at every call; see `tensor_output`.

    Args:
        network: The network.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.training = False  # it has no mode of its own

    def forward(self, *inputs: Any) -> Tensor:
        return tensor_output(self.network(*inputs))


def _kind(output: object) -> str:
    """Return a type's name, and the contents of a container."""
    if isinstance(output, Mapping):
        parts, number = [repr(key) for key in output], len(output)
    elif isinstance(output, list | tuple):
        parts, number = [type(part).__name__ for part in output], len(output)
    else:
        return type(output).__name__ if output is not None else "None"
    shown = ", ".join(parts[:_SHOWN]) + ", ..." * (number > _SHOWN)
    return f"{type(output).__name__} of {shown or 'nothing'}"
