"""The `norm` argument of the convolutional networks, and the convolution that precedes a norm."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import NamedTuple

from torch import nn

import bayeslayers as bl
from bayeslayers.checks import did_you_mean


class Norm(NamedTuple):
    """A kind of normalisation: `layer(channels)` builds one, `activation()` the non-linearity that goes with it."""

    layer: Callable[[int], nn.Module]
    activation: Callable[[], nn.Module]


def group_norm(channels: int) -> bl.BayesGroupNorm:
    """Build a GroupNorm with gcd(channels, 16) channels per group.

    Source: Wu & He 2018 (arXiv 1803.08494), section 4.1 on fixed channels per group. Their 32 groups
    are more than the 16 channels of a CIFAR ResNet.
    """
    return bl.BayesGroupNorm(channels // gcd(channels, 16), channels)


NORMS = {
    "batch": Norm(bl.BayesBatchNorm2d, nn.ReLU),
    "plain_batch": Norm(nn.BatchNorm2d, nn.ReLU),
    "group": Norm(group_norm, nn.ReLU),
    "frn": Norm(bl.BayesFilterResponseNorm2d, nn.SiLU),
}


def norm_named(name: str) -> Norm:
    """Return the kind of normalisation with a name.

    "batch" is BatchNorm, which mixes the examples of a batch in training. "plain_batch" is the same
    without posterior, prior and noise, as Osawa et al. 2019 train ResNets. "group" is GroupNorm, and
    "frn" is filter response normalisation with SiLU instead of ReLU; both treat each example separately.

    Raises:
        ValueError: If there is no such kind.
    """
    if not isinstance(name, str) or name not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {name!r}.{did_you_mean(str(name), NORMS)}")
    return NORMS[name]


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> bl.BayesConv2d:
    """Build a convolution that precedes a norm: "same" padding of an odd kernel, no bias, and He initialisation.

    Weights are drawn from N(0, 2 / (c_out kernel^2)) (arXiv 1502.01852, Eq. 14), as torchvision does.
    """
    layer = bl.BayesConv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer
