"""Weight-standardised convolutions of timm, whose curvature goes through the standardisation."""

from __future__ import annotations

import copy

import pytest
import torch
from support.per_example import EXACT, F64, bayesian, potential, squares_by_autograd, tracked_squares
from timm.layers import std_conv
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl

KINDS = [
    pytest.param(lambda: std_conv.StdConv2d(2, 4, 3, padding=1, bias=True), id="StdConv2d"),
    pytest.param(lambda: std_conv.StdConv2dSame(2, 4, 3, stride=2, bias=False), id="StdConv2dSame"),
    pytest.param(lambda: std_conv.ScaledStdConv2d(2, 4, 3, groups=2, gamma=1.3), id="ScaledStdConv2d"),
    pytest.param(lambda: std_conv.ScaledStdConv2dSame(2, 4, 3, stride=2, dilation=2), id="ScaledStdConv2dSame"),
]


def loss(net, x):
    return potential(net(x))


def images():
    return torch.randn(3, 2, 7, 7, generator=torch.Generator().manual_seed(0), **F64)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("make", KINDS)
def test_squares_are_exact(make, parts):
    net = bayesian(nn.Sequential(make(), nn.Tanh(), nn.Conv2d(4, 2, 2)))
    found = tracked_squares(net, loss, images(), parts=parts)
    assert_close(found, squares_by_autograd(net, loss, images()), **EXACT)


@pytest.mark.parametrize("make", KINDS)
def test_outputs_are_those_of_the_ordinary_layer(make):
    torch.manual_seed(0)
    ordinary = make().double()
    net, report = bl.to_bayesian(ordinary)
    assert report.coverage == 1
    assert_close(net(images()), ordinary(images()), rtol=0, atol=0)
    still = {site.name: torch.zeros_like(site.mean) for site in bl.posterior(net)}
    with bl.sampled(net, noise=still):
        assert_close(net(images()), ordinary(images()))
    assert type(bl.to_deterministic(net)) is type(ordinary)
    assert_close(copy.deepcopy(net)(images()), ordinary(images()), rtol=0, atol=0)
