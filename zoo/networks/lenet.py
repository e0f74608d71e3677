"""LeNet-5 (LeCun et al. 1998), with ReLU and max pooling as is usual today."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import nn

import bayeslayers as bl
from bayeslayers.checks import at_least_one, fraction
from zoo.normalise import Normalise
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
    return _lenet5(num_classes, input_size, mean, std, [{}, {}, {}, {}])


@register
def lenet5_bn(
    num_classes: int = 10,
    input_size: Sequence[int] = (1, 28, 28),
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> nn.Sequential:
    """Build LeNet-5 with BatchNorm between each hidden layer and its activation.

    The norms have scale and shift, unlike those of Osawa et al. 2019, and the layers before them have
    no bias.

    Args:
        num_classes: Outputs, >= 1.
        input_size: `(c, 28, 28)` or `(c, 32, 32)`, as for `lenet5`.
        mean: Mean of the inputs, per channel.
        std: Standard deviation of the inputs, per channel.
    """
    norms = (bl.BayesBatchNorm2d(6), bl.BayesBatchNorm2d(16), bl.BayesBatchNorm1d(120), bl.BayesBatchNorm1d(84))
    between = [{f"bn{index}": norm} for index, norm in enumerate(norms, start=1)]
    return _lenet5(num_classes, input_size, mean, std, between, bias=False)


@register
def lenet5_mcdropout(
    num_classes: int = 10,
    input_size: Sequence[int] = (1, 28, 28),
    dropout: float = 0.1,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> nn.Sequential:
    """Build LeNet-5 with dropout after each hidden layer, before activation and pooling.

    Predicting with dropout switched on is Monte-Carlo dropout (Gal & Ghahramani 2016, arXiv
    1506.02142; for convolutions 1506.02158, section 3.2), a baseline.

    Args:
        num_classes: Outputs, >= 1.
        input_size: `(c, 28, 28)` or `(c, 32, 32)`, as for `lenet5`.
        dropout: Share of the units that are dropped, in [0, 1); 0.1 as in Osawa et al. 2019.
        mean: Mean of the inputs, per channel.
        std: Standard deviation of the inputs, per channel.
    """
    fraction("dropout", dropout)
    between = [{f"dropout{index}": nn.Dropout(dropout)} for index in range(1, 5)]
    return _lenet5(num_classes, input_size, mean, std, between)


def _lenet5(
    num_classes: int,
    input_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    between: Sequence[Mapping[str, nn.Module]],
    bias: bool = True,
) -> nn.Sequential:
    """Build LeNet-5 with the modules `between[i]` after hidden layer i; `bias` is that of the hidden layers."""
    at_least_one("num_classes", num_classes)
    if tuple(input_size[1:]) not in ((28, 28), (32, 32)):
        raise ValueError(f"input_size must be (c, 28, 28) or (c, 32, 32), got {tuple(input_size)}.")
    channels, side, _ = input_size
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        normalise=Normalise(input_size, mean, std),
        conv1=bl.BayesConv2d(channels, 6, 5, padding=(32 - side) // 2, bias=bias),
        **between[0],
        act1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=bl.BayesConv2d(6, 16, 5, bias=bias),
        **between[1],
        act2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        linear1=bl.BayesLinear(16 * 5 * 5, 120, bias=bias),
        **between[2],
        act3=nn.ReLU(),
        linear2=bl.BayesLinear(120, 84, bias=bias),
        **between[3],
        act4=nn.ReLU(),
        output=bl.BayesLinear(84, num_classes),
    )
    return nn.Sequential(layers)
