"""The first stages of EfficientNet-Lite0, to fine-tune on small images from weights of ImageNet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

import bayeslayers as bl
from bayeslayers.checks import at_least_one
from zoo.encoder_weights import fill_encoder, read_weights
from zoo.normalise import Normalise, check_resize, image_size
from zoo.registry import register

_CHANNELS = (16, 24, 40, 80, 112, 192, 320)  # of each stage


@register
def efficientnet_lite0(
    num_classes: int = 10,
    input_size: Sequence[int] = (3, 32, 32),
    resize: int = 64,
    stages: int = 5,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
    weights: str | None = None,
) -> nn.Sequential:
    """Build the first stages of timm's `tf_efficientnet_lite0`, the mean over positions, and a linear layer.

    The images are enlarged, because the network halves them first. Five stages have 0.7 of its 3.4 million
    parameters; the deeper ones tell ImageNet's thousand classes apart.

    Source: Tan and Le 2019 (arXiv 1905.11946); the Lite networks, which have ReLU6 and no squeeze-and-excitation, are
    Google's (2020).

    Args:
        num_classes: Outputs, >= 1.
        input_size: `(c, h, w)`, a square.
        resize: Side to which the images are enlarged, bilinearly, >= h.
        stages: Stages of the network, 1 .. 7.
        mean: Mean of the inputs, per channel.
        std: Standard deviation of the inputs, per channel.
        weights: File of ordinary weights for all but the last layer, by timm's names; `pretrained` of `zoo.create`.
    """
    import timm

    size = image_size(input_size)
    if size[1] != size[2]:
        raise ValueError(f"input_size must be a square for efficientnet_lite0, got {tuple(size)}.")
    check_resize("resize", resize, size)
    if at_least_one("stages", stages) > len(_CHANNELS):
        raise ValueError(f"stages must be 1 to {len(_CHANNELS)}, got {stages}.")
    whole: Any = timm.create_model("tf_efficientnet_lite0", in_chans=size[0])
    network = nn.Sequential(OrderedDict(conv_stem=whole.conv_stem, bn1=whole.bn1, blocks=whole.blocks[:stages]))
    if weights is not None:
        fill_encoder(network, read_weights(weights), weights)
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalise=Normalise(size, mean, std))
    layers["resize"] = nn.Upsample(size=(resize, resize), mode="bilinear")
    layers["network"] = bl.to_bayesian(network)[0]
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    layers["output"] = bl.BayesLinear(_CHANNELS[stages - 1], at_least_one("num_classes", num_classes))
    return nn.Sequential(layers)
