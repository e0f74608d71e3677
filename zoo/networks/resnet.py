"""Residual networks: ResNet (He et al. 2016), ResNeXt (Xie et al. 2017) and WRN (Zagoruyko & Komodakis 2016)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

import bayeslayers as bl
from bayeslayers.checks import at_least_one
from zoo.networks.norms import Norm, conv, norm_named
from zoo.normalise import Normalise, image_size
from zoo.registry import register

Modules = OrderedDict[str, nn.Module]
MakeBlock = Callable[[int, int, int], nn.Module]  # (c_in, c_out, stride)
MakeShortcut = Callable[[int, int, int, Norm], nn.Module]


class SubsamplingShortcut(nn.Module):
    """Shortcut A (He et al. 2016, section 3.3): every `stride`-th position, and zeros as the new channels."""

    def __init__(self, new_channels: int, stride: int):
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def shortcut_a(c_in: int, c_out: int, stride: int, norm: Norm) -> nn.Module:
    """Build the identity, or the shortcut without parameters where the shape changes."""
    return nn.Identity() if (c_in, stride) == (c_out, 1) else SubsamplingShortcut(c_out - c_in, stride)


def shortcut_b(c_in: int, c_out: int, stride: int, norm: Norm) -> nn.Module:
    """Build the identity, or a 1x1 convolution where the shape changes."""
    if (c_in, stride) == (c_out, 1):
        return nn.Identity()
    return nn.Sequential(conv(c_in, c_out, 1, stride), norm.layer(c_out))


SHORTCUTS: dict[str, MakeShortcut] = {"A": shortcut_a, "B": shortcut_b}


class BasicBlock(nn.Module):
    """`act(branch(x) + shortcut(x))`, the branch two 3x3 convolutions (He et al. 2016, Fig. 5 left)."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm: Norm, shortcut: MakeShortcut, zero_init: bool):
        super().__init__()
        self.conv1 = conv(c_in, c_out, 3, stride)
        self.bn1 = norm.layer(c_out)
        self.relu = norm.activation()
        self.conv2 = conv(c_out, c_out, 3)
        self.bn2 = _last_norm(norm, c_out, zero_init)
        self.downsample = shortcut(c_in, c_out, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """`act(branch(x) + shortcut(x))`, the branch 1x1, 3x3 and 1x1 convolutions (He et al. 2016, Fig. 5 right).

    The 3x3 convolution has the stride, as in torchvision. With `groups` it is the block of ResNeXt, with
    `group_width` channels per group in the first stage (Xie et al. 2017, arXiv 1611.05431, Fig. 3c).
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        stride: int,
        norm: Norm,
        shortcut: MakeShortcut,
        zero_init: bool,
        groups: int = 1,
        group_width: int = 64,
    ):
        super().__init__()
        width = groups * group_width * c_out // 256  # the first stage has 256 outputs
        self.conv1 = conv(c_in, width, 1)
        self.bn1 = norm.layer(width)
        self.conv2 = conv(width, width, 3, stride, groups)
        self.bn2 = norm.layer(width)
        self.conv3 = conv(width, c_out, 1)
        self.bn3 = _last_norm(norm, c_out, zero_init)
        self.relu = norm.activation()
        self.downsample = shortcut(c_in, c_out, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class PreActivationBlock(nn.Module):
    """`branch(x) + shortcut(x)`, each 3x3 convolution after its norm and activation (He et al. 2016b, 1603.05027)."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm: Norm):
        super().__init__()
        self.bn1 = norm.layer(c_in)
        self.relu = norm.activation()
        self.conv1 = conv(c_in, c_out, 3, stride)
        self.bn2 = norm.layer(c_out)
        self.conv2 = conv(c_out, c_out, 3)
        self.shortcut = None if (c_in, stride) == (c_out, 1) else conv(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(x))
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.conv2(self.relu(self.bn2(self.conv1(y))))


def _last_norm(norm: Norm, channels: int, zero_init: bool) -> nn.Module:
    """Build the norm that ends a branch; with `zero_init` the block starts as its shortcut."""
    layer = norm.layer(channels)
    if zero_init:
        nn.init.zeros_(layer.get_parameter("weight"))
    return layer


def _stages(make_block: MakeBlock, c_in: int, widths: Sequence[int], depths: Sequence[int]) -> Modules:
    """Build `layer1`, `layer2`, ...; all but the first halve height and width in their first block."""
    stages: Modules = OrderedDict()
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
        first = make_block(c_in, width, 1 if stage == 1 else 2)
        stages[f"layer{stage}"] = nn.Sequential(first, *(make_block(width, width, 1) for _ in range(depth - 1)))
        c_in = width
    return stages


def _head(c_in: int, num_classes: int) -> Modules:
    fc = bl.BayesLinear(c_in, at_least_one("num_classes", num_classes))
    return OrderedDict(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=fc)


def _resnet(
    name: str, block: Callable[..., nn.Module], width: int, depths: Sequence[int], cifar: bool = False
) -> Callable[..., nn.Sequential]:
    """Register the residual network with `depths[i]` blocks of `width * 2**i` outputs in stage i.

    `block` is one of the classes above. `cifar` replaces the 7x7 convolution of stride 2 and the max
    pooling by a 3x3 convolution.
    """
    widths, stem = [width * 2**stage for stage in range(len(depths))], min(width, 64)

    def build(
        num_classes: int = 10 if cifar else 1000,
        input_size: Sequence[int] = (3, 32, 32) if cifar else (3, 224, 224),
        norm: str = "batch",
        shortcut: str = "A" if len(depths) == 3 else "B",
        zero_init: bool = False,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> nn.Sequential:
        """Build the residual network of this name.

        The parameters have torchvision's names, so its ordinary checkpoints load as means.
        Source: He et al. 2016 (arXiv 1512.03385); ResNeXt: Xie et al. 2017 (arXiv 1611.05431).

        Args:
            num_classes: Outputs, >= 1.
            input_size: `(c, h, w)`.
            norm: "batch", "plain_batch", "group" or "frn", see `zoo.networks.norms`.
            shortcut: Where the shape changes, "A" subsamples and adds channels of zeros, "B" is a 1x1 convolution.
            zero_init: Initialise the last norm's scale of each block to 0, so that the block is its shortcut
                (Goyal et al. 2017, arXiv 1706.02677).
            mean: Mean of the inputs, per channel.
            std: Standard deviation of the inputs, per channel.
        """
        kind, (c_in, *_) = norm_named(norm), image_size(input_size)
        if not isinstance(shortcut, str) or shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut must be one of {', '.join(SHORTCUTS)}, got {shortcut!r}.")
        make_block = partial(block, norm=kind, shortcut=SHORTCUTS[shortcut], zero_init=zero_init)
        layers: Modules = OrderedDict(normalise=Normalise(input_size, mean, std))
        layers["conv1"] = conv(c_in, stem, 3) if cifar else conv(c_in, stem, 7, 2)
        layers |= {"bn1": kind.layer(stem), "relu": kind.activation()}
        layers |= {} if cifar else {"maxpool": nn.MaxPool2d(3, 2, 1)}
        return nn.Sequential(layers | _stages(make_block, stem, widths, depths) | _head(widths[-1], num_classes))

    build.__name__ = build.__qualname__ = name
    return register(build)


resnet20, resnet32, resnet44, resnet56, resnet110 = (  # section 4.2: depth 6 n + 2
    _resnet(f"resnet{6 * n + 2}", BasicBlock, 16, (n, n, n), cifar=True) for n in (3, 5, 7, 9, 18)
)
resnet18_cifar = _resnet("resnet18_cifar", BasicBlock, 64, (2, 2, 2, 2), cifar=True)
resnet18 = _resnet("resnet18", BasicBlock, 64, (2, 2, 2, 2))
resnet34 = _resnet("resnet34", BasicBlock, 64, (3, 4, 6, 3))
resnet50 = _resnet("resnet50", Bottleneck, 256, (3, 4, 6, 3))
resnet101 = _resnet("resnet101", Bottleneck, 256, (3, 4, 23, 3))
resnet152 = _resnet("resnet152", Bottleneck, 256, (3, 8, 36, 3))
resnext50_32x4d = _resnet("resnext50_32x4d", partial(Bottleneck, groups=32, group_width=4), 256, (3, 4, 6, 3))
resnext101_32x8d = _resnet("resnext101_32x8d", partial(Bottleneck, groups=32, group_width=8), 256, (3, 4, 23, 3))


@register
def wide_resnet(
    num_classes: int = 10,
    input_size: Sequence[int] = (3, 32, 32),
    depth: int = 28,
    width: int = 10,
    norm: str = "batch",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> nn.Sequential:
    """Build WRN-depth-width without dropout (Zagoruyko & Komodakis 2016, arXiv 1605.07146, Table 1).

    Args:
        num_classes: Outputs, >= 1.
        input_size: `(c, h, w)`.
        depth: 6 n + 4, with n >= 1 blocks in each of the three stages.
        width: Factor on the 16, 32 and 64 channels of the stages, >= 1.
        norm: "batch", "plain_batch", "group" or "frn", see `zoo.networks.norms`.
        mean: Mean of the inputs, per channel.
        std: Standard deviation of the inputs, per channel.
    """
    kind, (c_in, *_) = norm_named(norm), image_size(input_size)
    if at_least_one("depth", depth) < 10 or depth % 6 != 4:
        raise ValueError(f"depth must be 6 n + 4 with n >= 1, such as 10, 16 or 28, got {depth}.")
    widths, depths = [at_least_one("width", width) * 16 * 2**stage for stage in range(3)], [(depth - 4) // 6] * 3
    layers: Modules = OrderedDict(normalise=Normalise(input_size, mean, std), conv1=conv(c_in, 16, 3))
    layers |= _stages(partial(PreActivationBlock, norm=kind), 16, widths, depths)
    layers |= {"bn1": kind.layer(widths[-1]), "relu": kind.activation()}
    return nn.Sequential(layers | _head(widths[-1], num_classes))


@register
def wide_resnet28_10(
    num_classes: int = 10,
    input_size: Sequence[int] = (3, 32, 32),
    norm: str = "batch",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> nn.Sequential:
    """Build WRN-28-10, `wide_resnet` of that depth and width.

    Args:
        num_classes: Outputs, >= 1.
        input_size: `(c, h, w)`.
        norm: "batch", "plain_batch", "group" or "frn", see `zoo.networks.norms`.
        mean: Mean of the inputs, per channel.
        std: Standard deviation of the inputs, per channel.
    """
    return wide_resnet(num_classes, input_size, 28, 10, norm, mean, std)
