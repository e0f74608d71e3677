"""Layers derived from those of torch.nn, as users and libraries write them, some convertible and some not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class NormAct(nn.BatchNorm2d):
    """A norm followed by an activation, as timm's."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.act = nn.PReLU()

    def forward(self, x):
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(y)


class ChannelNorm(nn.LayerNorm):
    """A norm over channels of images."""

    def forward(self, x):
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class OneGroupNorm(nn.GroupNorm):
    def forward(self, x):
        return F.group_norm(x, 1, self.weight, self.bias, self.eps)


class SameConv(nn.Conv2d):
    """A convolution that pads by the size of its input."""

    def forward(self, x):
        missing = -x.shape[-1] % self.stride[0]
        return F.conv2d(
            F.pad(x, (0, missing, missing, 0)), self.weight, self.bias, self.stride, "same", groups=self.groups
        )


class ShiftedConv(nn.Conv2d):
    """A convolution whose helper is overridden, its forward is not."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input.roll(1, -1), weight, bias)


class UpConv(nn.ConvTranspose2d):
    def forward(self, x):
        return F.conv_transpose2d(x, self.weight, self.bias, self.stride, 1, output_padding=1).relu()


class GatedLinear(nn.Linear):
    """A layer that calls the forward of its base."""

    def forward(self, x):
        a, b = super().forward(x).chunk(2, -1)
        return a * b.sigmoid()


class Scaled(nn.Linear):
    """A layer whose bias is added by another op than the weight's."""

    def forward(self, x):
        return 2 * F.linear(x, self.weight) + self.bias


class Table(nn.Embedding):
    def forward(self, ids):
        return F.embedding(ids, self.weight, self.padding_idx) * 3


class Plain(nn.Conv1d):
    """A subclass that computes as its base."""

    def __init__(self):
        super().__init__(2, 4, 3, padding=1)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class Twice(nn.Linear):
    def forward(self, x):
        return F.linear(F.linear(x, self.weight, self.bias), self.weight, self.bias)


class Folding(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.flatten(0, 1)).view_as(x)


class Gained(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)
        self.gain = nn.Parameter(torch.ones(3))


class Borrowing(nn.Linear):
    """A layer that computes with the bias of another."""

    def __init__(self):
        super().__init__(3, 3, bias=False)
        self.other = nn.BatchNorm1d(3)

    def forward(self, x):
        return F.linear(x, self.weight, self.other.bias)


class Demanding(nn.Linear):
    def forward(self, x, mask):
        return super().forward(x) * mask


SUBCLASSES = [
    (NormAct(4), (5, 4, 3, 3)),
    (ChannelNorm(4), (5, 4, 3, 2)),
    (OneGroupNorm(2, 4), (5, 4, 3)),
    (SameConv(4, 6, (3, 2), groups=2), (5, 4, 5, 5)),
    (ShiftedConv(2, 4, 3), (5, 2, 5, 5)),
    (UpConv(2, 4, 3, stride=2), (5, 2, 3, 3)),
    (GatedLinear(3, 4), (5, 3)),
    (Table(7, 3, padding_idx=2), (5, 4)),
    (Plain(), (5, 2, 7)),
]


REFUSED = [
    (Standardised(2, 3, 3), "forward of Standardised uses its weight in 'mean'"),
    (Twice(3, 3), "uses the weight in 2 ops"),
    (Folding(3), "folds other dimensions into that of the examples"),
    (Scaled(3, 3), "forward of Scaled uses its bias in 'add'"),
    (Gained(), "has a parameter 'gain' too"),
    (Borrowing(), "forward of Borrowing uses its weight in 'linear'|without calling its layer"),
    (Demanding(3, 3), "could not be tried: .*mask"),
]


def name_of(value: object) -> str:
    return type(value).__name__ if isinstance(value, nn.Module) else ""


def make_input(layer: nn.Module, shape: tuple, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(7, shape) if isinstance(layer, nn.Embedding) else torch.randn(shape, dtype=dtype)
