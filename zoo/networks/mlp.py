"""Multi-layer perceptrons."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import nn

import bayeslayers as bl
from bayeslayers.checks import at_least_one, did_you_mean
from zoo.normalise import Normalise
from zoo.registry import register

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}


@register
def mlp(
    num_classes: int = 10,
    input_size: Sequence[int] = (1, 28, 28),
    widths: Sequence[int] = (400, 400),
    activation: str = "relu",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> nn.Sequential:
    """Build a perceptron: flatten, then a linear layer and an activation per width, then the output.

    Args:
        num_classes: Outputs, >= 1.
        input_size: Shape of one example.
        widths: Units of each hidden layer.
        activation: One of "relu", "tanh", "gelu", "silu".
        mean: Mean of the inputs, per channel.
        std: Standard deviation of the inputs, per channel.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}."
            f"{did_you_mean(activation, ACTIVATIONS)}"
        )
    sizes = [prod(input_size), *widths]
    for width in (*widths, num_classes):
        at_least_one("widths and num_classes", width)
    modules: list[tuple[str, nn.Module]] = [("normalise", Normalise(input_size, mean, std)), ("flatten", nn.Flatten())]
    for index, (before, after) in enumerate(pairwise(sizes), start=1):
        modules += [(f"hidden{index}", bl.BayesLinear(before, after)), (f"act{index}", ACTIVATIONS[activation]())]
    return nn.Sequential(OrderedDict([*modules, ("output", bl.BayesLinear(sizes[-1], num_classes))]))
