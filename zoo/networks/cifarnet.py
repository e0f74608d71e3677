"""A small, fast network for images of 32 x 32, of the kind that speed records on CIFAR-10 are set by."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

import bayeslayers as bl
from bayeslayers.checks import at_least_one
from zoo.networks.norms import conv, norm_named
from zoo.normalise import Normalise, image_size
from zoo.registry import register


@register
def cifarnet(
    num_classes: int = 10,
    input_size: Sequence[int] = (3, 32, 32),
    widths: Sequence[int] = (48, 128, 192),
    norm: str = "batch",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> nn.Sequential:
    """Build a network of a stem and one block of two convolutions per width, each block halving the image.

    A block is 3x3 convolution, max pooling of 2, norm, SiLU, 3x3 convolution, norm, SiLU; the stem is a 3x3
    convolution of 24 channels, norm and SiLU. A maximum over positions and a linear layer follow. Pooling before the
    norm makes the second half of a block four times cheaper than in a VGG network. With the default widths it needs
    50 million multiplications an image, as many as a ResNet-20.

    Source: the CifarNet of Jordan 2024 (arXiv 2404.00498), section 3, which whitens the image by a fixed stem, has
    GELU, and widths of 64, 256 and 256.

    Args:
        num_classes: Outputs, >= 1.
        input_size: `(c, h, w)`, h and w >= 2 ** number of widths.
        widths: Channels of each block, at least one block.
        norm: "batch", "plain_batch", "group" or "frn", see `zoo.networks.norms`.
        mean: Mean of the inputs, per channel.
        std: Standard deviation of the inputs, per channel.
    """
    at_least_one("number of widths", len(widths))
    kind, (c_in, *_) = norm_named(norm), image_size(input_size, minimum=2 ** len(widths))
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalise=Normalise(input_size, mean, std))
    layers |= {"stem": conv(c_in, 24, 3), "bn_stem": kind.layer(24), "act_stem": nn.SiLU()}
    c_in = 24
    for stage, width in enumerate(widths, start=1):
        at_least_one("widths", width)
        layers |= {f"conv{stage}_1": conv(c_in, width, 3), f"pool{stage}": nn.MaxPool2d(2)}
        layers |= {f"bn{stage}_1": kind.layer(width), f"act{stage}_1": nn.SiLU()}
        layers |= {f"conv{stage}_2": conv(width, width, 3), f"bn{stage}_2": kind.layer(width)}
        layers |= {f"act{stage}_2": nn.SiLU()}
        c_in = width
    layers |= {"maxpool": nn.AdaptiveMaxPool2d(1), "flatten": nn.Flatten()}
    layers["output"] = bl.BayesLinear(c_in, at_least_one("num_classes", num_classes))
    return nn.Sequential(layers)
