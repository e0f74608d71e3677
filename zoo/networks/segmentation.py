"""Segmentation networks: a class per pixel, for images of any height and width."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayeslayers as bl
from bayeslayers.checks import at_least_one
from bayeslayers.storage.card import Card
from zoo.networks.norms import Norm, conv, norm_named
from zoo.normalise import Normalise, image_size
from zoo.registry import register

NAMES = ("unet_small", "segnet_basic")


def labels_pixels(card: Card) -> bool:
    """Whether the network that a card describes has an output for each pixel."""
    return card.builder in NAMES or (card.builder or "").startswith("smp:")


def _block(c_in: int, c_out: int, kernel: int, norm: Norm) -> list[nn.Module]:
    return [conv(c_in, c_out, kernel), norm.layer(c_out), norm.activation()]


def _padded(x: Tensor, multiple: int) -> Tensor:
    """Return `x` with zeros below and to the right, height and width multiples of `multiple`."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple))


class UNet(nn.Module):
    """Encoder and decoder with the encoder's features copied across (Ronneberger et al. 2015, arXiv 1505.04597).

    The convolutions are padded and followed by a norm, and the output has the input's height and
    width. Inputs are padded to a multiple of `2**(len(widths) - 1)` and outputs cropped.

    Args:
        normalise: First module.
        c_in: Channels of the input.
        num_classes: Channels of the output.
        widths: Channels of the encoder, from the finest scale to the coarsest.
        norm: Kind of normalisation.
    """

    def __init__(self, normalise: Normalise, c_in: int, num_classes: int, widths: Sequence[int], norm: Norm):
        super().__init__()

        def double(c_in: int, c_out: int) -> nn.Sequential:
            return nn.Sequential(*_block(c_in, c_out, 3, norm), *_block(c_out, c_out, 3, norm))

        self.normalise = normalise
        self.down = nn.ModuleList(double(before, after) for before, after in pairwise([c_in, *widths]))
        steps = list(pairwise(reversed(widths)))
        self.up = nn.ModuleList(bl.BayesConvTranspose2d(coarse, fine, 2, stride=2) for coarse, fine in steps)
        self.merge = nn.ModuleList(double(2 * fine, fine) for _, fine in steps)
        self.output = bl.BayesConv2d(widths[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = self.down[0](_padded(self.normalise(x), 2 ** len(self.up)))
        features = [x]
        for down in self.down[1:]:
            features.append(down(F.max_pool2d(features[-1], 2)))
        x = features.pop()
        for up, merge, feature in zip(self.up, self.merge, reversed(features), strict=True):
            x = merge(torch.cat([feature, up(x)], 1))
        return self.output(x)[..., :height, :width]


class SegNet(nn.Module):
    """Encoder and decoder; the decoder puts values back to the positions that max pooling chose.

    Each scale has one convolution with a norm, followed by an activation only in the encoder. Inputs are
    padded to a multiple of `2**scales` and outputs cropped.
    Source: Badrinarayanan et al. 2017 (arXiv 1511.00561), section 3.1, SegNet-Basic.

    Args:
        normalise: First module.
        c_in: Channels of the input.
        num_classes: Channels of the output.
        width: Channels of all convolutions.
        scales: Poolings.
        norm: Kind of normalisation.
    """

    def __init__(self, normalise: Normalise, c_in: int, num_classes: int, width: int, scales: int, norm: Norm):
        super().__init__()
        self.normalise = normalise
        self.encoder = nn.ModuleList(
            nn.Sequential(*_block(width if scale else c_in, width, 7, norm)) for scale in range(scales)
        )
        self.decoder = nn.ModuleList(nn.Sequential(*_block(width, width, 7, norm)[:2]) for _ in range(scales))
        self.output = bl.BayesConv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x, places = _padded(self.normalise(x), 2 ** len(self.encoder)), []
        for encode in self.encoder:
            x, place = F.max_pool2d(encode(x), 2, return_indices=True)
            places.append(place)
        for decode in self.decoder:
            x = decode(F.max_unpool2d(x, places.pop(), (2, 2)))
        return self.output(x)[..., :height, :width]


@register
def unet_small(
    num_classes: int = 11,
    input_size: Sequence[int] = (3, 360, 480),
    width: int = 16,
    norm: str = "batch",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> UNet:
    """Build a U-Net of five scales, with `width` channels at the finest, a quarter of the original's 64.

    Args:
        num_classes: Classes, >= 1; the output is `(n, num_classes, h, w)`.
        input_size: `(c, h, w)`, the usual size; the network takes any h and w.
        width: Channels at the finest scale, >= 1; each coarser one has twice as many.
        norm: "batch", "plain_batch", "group" or "frn", see `zoo.networks.norms`.
        mean: Mean of the inputs, per channel.
        std: Standard deviation of the inputs, per channel.
    """
    c_in, *_ = image_size(input_size)
    widths = [at_least_one("width", width) * 2**scale for scale in range(5)]
    normalise = Normalise(input_size, mean, std, any_size=True)
    return UNet(normalise, c_in, at_least_one("num_classes", num_classes), widths, norm_named(norm))


@register
def segnet_basic(
    num_classes: int = 11,
    input_size: Sequence[int] = (3, 360, 480),
    norm: str = "batch",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> SegNet:
    """Build SegNet-Basic: four scales of 7x7 convolutions with 64 channels.

    Args:
        num_classes: Classes, >= 1; the output is `(n, num_classes, h, w)`.
        input_size: `(c, h, w)`, the usual size; the network takes any h and w.
        norm: "batch", "plain_batch", "group" or "frn", see `zoo.networks.norms`.
        mean: Mean of the inputs, per channel.
        std: Standard deviation of the inputs, per channel.
    """
    c_in, *_ = image_size(input_size)
    normalise = Normalise(input_size, mean, std, any_size=True)
    return SegNet(normalise, c_in, at_least_one("num_classes", num_classes), 64, 4, norm_named(norm))
