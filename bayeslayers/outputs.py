"""What a network returns: the one tensor of real numbers in it that predictions are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from bayeslayers.inputs import Batch, call

Output: TypeAlias = str | int | Callable[[Any], Tensor]

_SHOWN = 5  # keys or parts that a message lists
_USUAL = "logits"  # the output of a network of transformers that is predicted


class NonFiniteOutputError(FloatingPointError, ValueError):
    """Raised where a network's outputs have no predictive distribution, because some are NaN or infinite."""


def tensor_output(returned: object, output: Output | None = None) -> Tensor:
    """Return the tensor of what a network returned, after checking that it is one of real numbers.

    Args:
        returned: What the network returned.
        output: Which part of it: a key, an attribute, an index or a function; None takes a tensor as it is, and
            "logits" of a mapping that has them.

    Raises:
        TypeError: If it is anything else.
        ValueError: If there is no such part.
    """
    chosen = selected(returned, output)
    if not isinstance(chosen, Tensor):
        found = _kind(chosen)
    elif not chosen.is_floating_point():
        found = f"one of {chosen.dtype}"
    elif chosen.dim() == 0:
        found = "a single number"
    else:
        return chosen
    raise TypeError(
        f"the model's output must be a tensor of real numbers, examples in dimension 0, got {found}. "
        f"{_advice(returned)}"
    )


def check_output(output: Output | None) -> None:
    """Raise if an argument `output` selects nothing.

    Raises:
        TypeError: If so.
    """
    if not (output is None or isinstance(output, str | int) or callable(output)) or isinstance(output, bool):
        raise TypeError(f"output must be a key, an index, a function or None, got {output!r}.")


class TensorNetwork(nn.Module):
    """A network of one batch to one tensor: it unpacks inputs, selects the output and checks it at every call.

    Args:
        network: The network.
        output: Which part of what it returns, see `tensor_output`.
    """

    def __init__(self, network: nn.Module, output: Output | None = None):
        super().__init__()
        self.network, self.output = network, output
        self.training = False  # it has no mode of its own

    def forward(self, batch: Batch) -> Tensor:
        return tensor_output(call(self.network, batch), self.output)


def selected(returned: Any, output: Output | None) -> Any:
    """Return the part of what a network returned that `output` names, see `tensor_output`.

    Raises:
        ValueError: If there is none.
    """
    if output is None:
        return returned[_USUAL] if isinstance(returned, Mapping) and _USUAL in returned else returned
    if callable(output):
        return output(returned)
    if isinstance(output, int):
        if isinstance(returned, Sequence | Tensor) and -len(returned) <= output < len(returned):
            return returned[output]
    elif isinstance(returned, Mapping):
        if output in returned:
            return returned[output]
    elif hasattr(returned, output):
        return getattr(returned, output)
    raise ValueError(f"output must name a part of what the model returns, got {output!r} for {_kind(returned)}.")


def _advice(returned: object) -> str:
    if isinstance(returned, Mapping):
        return "Say which part it is, as output='logits'."
    if isinstance(returned, list | tuple):
        return "Say which part it is, as output=0."
    return "Wrap the model in a module whose forward returns the outputs alone, such as the logits."


def _kind(output: object) -> str:
    """Return a type's name, and the contents of a container."""
    if isinstance(output, Mapping):
        parts, number = [repr(key) for key in output], len(output)
    elif isinstance(output, list | tuple):
        parts, number = [type(part).__name__ for part in output], len(output)
    elif isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    else:
        return type(output).__name__ if output is not None else "None"
    shown = ", ".join(parts[:_SHOWN]) + ", ..." * (number > _SHOWN)
    return f"{type(output).__name__} of {shown or 'nothing'}"
