"""The cost of one forward pass, counted on the meta device before an untrusted card's network is built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bayeslayers.storage.card import Card, PosteriorError

# Networks stay far below this for one example of usual size: timm's largest take 6e12 operations and 7e9 numbers.
_TENSOR, _NUMBERS, _OPERATIONS = 2**28, 2**33, 2**44


class _Costly(Exception):
    """Raised where a forward pass exceeds the cost limits."""


class _Budget(TorchDispatchMode):
    """A scope that raises once torch's operations have exceeded the cost limits."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = self._operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._numbers += sum(sizes)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self._operations += count(*args, **kwargs, out_val=result)
        for what, value, limit in (
            ("a tensor of {} numbers", max(sizes, default=0), _TENSOR),
            ("tensors of {} numbers together", self._numbers, _NUMBERS),
            ("{} operations", self._operations, _OPERATIONS),
        ):
            if value > limit:
                raise _Costly(f"{what.format(value)}, more than {limit}")
        return result


def check_cost(network: nn.Module, card: Card, source: str) -> None:
    """Check the cost of one example of the card's size, and that the card names no more classes than outputs.

    The meta device has no values. A network that computes with values is therefore bounded only by its weights and
    the size of its input.

    Args:
        network: The network on the meta device.
        card: Its card.
        source: Path of the card, for messages.

    Raises:
        PosteriorError: If it costs more than any network of the zoo, or names more classes.
    """
    try:
        with torch.device("meta"), torch.no_grad(), _Budget():
            output = network.eval()(torch.empty(1, *card.input_size))
    except _Costly as costly:
        raise PosteriorError(
            f"{source} must describe a network of bounded cost, got input_size {card.input_size}, with which one "
            f"example takes {costly}."
        ) from None
    except Exception:  # an operation that needs values raises anything
        return
    outputs = output.shape[1] if isinstance(output, Tensor) and output.dim() > 1 else 0
    if len(card.class_names) > max(outputs, 2):
        raise PosteriorError(
            f"{source} must name at most the {max(outputs, 2)} classes of its network in class_names, got "
            f"{len(card.class_names)}."
        )
