"""VGG networks (Simonyan & Zisserman 2015, arXiv 1409.1556) in their usual form for CIFAR."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import nn

import bayeslayers as bl
from bayeslayers.checks import at_least_one
from zoo.networks.norms import conv, norm_named
from zoo.normalise import Normalise, image_size
from zoo.registry import register

WIDTHS = (64, 128, 256, 512, 512)


def _vgg(name: str, depths: Sequence[int]) -> Callable[..., nn.Sequential]:
    """Register the VGG network with `depths[i]` convolutions of `WIDTHS[i]` channels in stage i."""

    def build(
        num_classes: int = 10,
        input_size: Sequence[int] = (3, 32, 32),
        norm: str = "batch",
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> nn.Sequential:
        """Build the VGG network of this name (Simonyan & Zisserman 2015, arXiv 1409.1556, Table 1) for CIFAR.

        It has 3x3 convolutions, each followed by a norm and an activation, and max pooling of 2 after each of
        five stages. The average over positions and one linear layer follow, where the original has three. The
        convolutions have no biases, because the norms have shifts.

        Args:
            num_classes: Outputs, >= 1.
            input_size: `(c, h, w)`, h and w >= 32.
            norm: "batch", "plain_batch", "group" or "frn", see `zoo.networks.norms`.
            mean: Mean of the inputs, per channel.
            std: Standard deviation of the inputs, per channel.
        """
        kind, (c_in, *_) = norm_named(norm), image_size(input_size, minimum=32)
        layers: OrderedDict[str, nn.Module] = OrderedDict(normalise=Normalise(input_size, mean, std))
        for stage, (depth, width) in enumerate(zip(depths, WIDTHS, strict=True), start=1):
            for place in (f"{stage}_{index}" for index in range(1, depth + 1)):
                layers[f"conv{place}"] = conv(c_in, width, 3)
                layers[f"bn{place}"] = kind.layer(width)
                layers[f"act{place}"] = kind.activation()
                c_in = width
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
        layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        layers["output"] = bl.BayesLinear(c_in, at_least_one("num_classes", num_classes))
        return nn.Sequential(layers)

    build.__name__ = build.__qualname__ = name
    return register(build)


vgg11 = _vgg("vgg11", (1, 1, 2, 2, 2))
vgg13 = _vgg("vgg13", (2, 2, 2, 2, 2))
vgg16 = _vgg("vgg16", (2, 2, 3, 3, 3))
vgg19 = _vgg("vgg19", (2, 2, 4, 4, 4))
