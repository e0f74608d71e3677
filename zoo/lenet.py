"""LeNet-5 (LeCun et al. 1998), with ReLU and max pooling as it is built today."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

import bayeslayers as bl
from bayeslayers.checks import at_least_one
from zoo.inputs import Normalise
from zoo.registry import register


@register
def lenet5(
    num_classes: int = 10,
    input_size: Sequence[int] = (1, 28, 28),
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> nn.Sequential:
    """Build LeNet-5: two 5x5 convolutions with pooling, then linear layers of 120, 84 and `num_classes`.

    Args:
        num_classes: Outputs, >= 1.
        input_size: `(c, 28, 28)`, padded to 32 x 32 by the first convolution, or `(c, 32, 32)`.
        mean: Mean of the inputs, per channel.
        std: Standard deviation of the inputs, per channel.
    """
    at_least_one("num_classes", num_classes)
    if tuple(input_size[1:]) not in ((28, 28), (32, 32)):
        raise ValueError(f"input_size must be (c, 28, 28) or (c, 32, 32), got {tuple(input_size)}.")
    channels, side, _ = input_size
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        normalise=Normalise(input_size, mean, std),
        conv1=bl.BayesConv2d(channels, 6, 5, padding=(32 - side) // 2),
        act1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=bl.BayesConv2d(6, 16, 5),
        act2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        linear1=bl.BayesLinear(16 * 5 * 5, 120),
        act3=nn.ReLU(),
        linear2=bl.BayesLinear(120, 84),
        act4=nn.ReLU(),
        output=bl.BayesLinear(84, num_classes),
    )
    return nn.Sequential(layers)
