"""Multi-layer perceptrons."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

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


class MultiHead(nn.Sequential):
    """A network whose outputs belong to heads; the last feature of an example says which of them is asked.

    The outputs of the other heads become -1e4, whose probability is 0 in float32, so that labels, losses and
    predictions are those of all classes.

    Args:
        body: Network from the other features to the outputs of all heads, side by side; its modules become these.
        heads: Number of heads, of equally many outputs.
        outputs: Outputs of all heads together.
    """

    head_of_output: Tensor

    def __init__(self, body: nn.Sequential, heads: int, outputs: int):
        super().__init__(OrderedDict(body.named_children()))
        self.register_buffer("head_of_output", torch.arange(outputs) // (outputs // heads), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        head = input[:, -1:].long()
        return super().forward(input[:, :-1]).masked_fill(self.head_of_output != head, -1e4)


@register
def multi_head_mlp(
    num_classes: int = 10,
    heads: int = 5,
    input_size: Sequence[int] = (785,),
    widths: Sequence[int] = (200,),
    activation: str = "relu",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> nn.Sequential:
    """Build a perceptron with a head for each of several tasks; an input says behind its features which one is asked.

    Args:
        num_classes: Outputs of all heads together.
        heads: Heads, of equally many outputs.
        input_size: Number of features, and one more for the number of the head.
        widths: Units of each hidden layer.
        activation: One of "relu", "tanh", "gelu", "silu".
        mean: Mean of the features.
        std: Standard deviation of the features.
    """
    if at_least_one("num_classes", num_classes) % at_least_one("heads", heads):
        raise ValueError(f"heads must share the {num_classes} outputs equally, got {heads}.")
    if len(input_size) != 1 or input_size[0] < 2:
        raise ValueError(f"input_size must be one number > 1, the features and the head, got {list(input_size)}.")
    return MultiHead(mlp(num_classes, [input_size[0] - 1], widths, activation, mean, std), heads, num_classes)
