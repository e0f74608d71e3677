"""What one example costs a network, counted on the meta device before a card from elsewhere is believed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bayeslayers.storage.card import Card, PosteriorError

# Networks for one example of usual size stay far below: timm's largest take 6e12 operations and 7e9 numbers.
_TENSOR, _NUMBERS, _OPERATIONS = 2**28, 2**33, 2**44


class _Costly(Exception):
    """A forward pass was found to cost more than it may."""


class _Budget(TorchDispatchMode):
    """Raise once the calls of torch inside the scope have made too much."""

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


def check_cost(sketch: nn.Module, card: Card, source: str) -> None:
    """Check what one example of the card's size costs a network, and that the card names no more classes than outputs.

    A network that computes with values, which the meta device does not have, is bounded by its weights and the size
    of its input alone.

    Args:
        sketch: The network on the meta device.
        card: Its card.
        source: Path of the card, for messages.

    Raises:
        PosteriorError: If it costs more than any network of the zoo, or names more classes.
    """
    try:
        with torch.device("meta"), torch.no_grad(), _Budget():
            output = sketch.eval()(torch.empty(1, *card.input_size))
    except _Costly as costly:
        raise PosteriorError(
            f"{source} must describe a network of bounded cost, got input_size {card.input_size}, for which one "
            f"example takes {costly}."
        ) from None
    except Exception:  # whatever an operation raises that needs values
        return
    outputs = output.shape[1] if isinstance(output, Tensor) and output.dim() > 1 else 0
    if len(card.class_names) > max(outputs, 2):
        raise PosteriorError(
            f"{source} must name at most the {max(outputs, 2)} classes of its network in class_names, got "
            f"{len(card.class_names)}."
        )
