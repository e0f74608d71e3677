"""AlexNet (Krizhevsky et al. 2012) in its usual form for CIFAR."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

import bayeslayers as bl
from bayeslayers.checks import at_least_one
from zoo.normalise import Normalise, image_size
from zoo.registry import register


@register
def alexnet(
    num_classes: int = 10,
    input_size: Sequence[int] = (3, 32, 32),
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> nn.Sequential:
    """Build the usual CIFAR AlexNet, which Osawa et al. 2019 use too.

    It has five convolutions, each followed by a ReLU: 64 of 11x11 with stride 4 and padding 5, 192 of 5x5, then
    384, 256 and 256 of 3x3. Max pooling of 2 follows the first, second and last. One linear layer takes the place
    of the original's three.

    Args:
        num_classes: Outputs, >= 1.
        input_size: `(c, h, w)`, h and w >= 29; for 32 x 32 the linear layer sees one position.
        mean: Mean of the inputs, per channel.
        std: Standard deviation of the inputs, per channel.
    """
    channels, *sides = image_size(input_size, minimum=29)
    height, width = (((side - 1) // 4 + 1) // 8 for side in sides)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        normalise=Normalise(input_size, mean, std),
        conv1=bl.BayesConv2d(channels, 64, 11, stride=4, padding=5),
        act1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=bl.BayesConv2d(64, 192, 5, padding=2),
        act2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        conv3=bl.BayesConv2d(192, 384, 3, padding=1),
        act3=nn.ReLU(),
        conv4=bl.BayesConv2d(384, 256, 3, padding=1),
        act4=nn.ReLU(),
        conv5=bl.BayesConv2d(256, 256, 3, padding=1),
        act5=nn.ReLU(),
        pool5=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        output=bl.BayesLinear(256 * height * width, at_least_one("num_classes", num_classes)),
    )
    return nn.Sequential(layers)
