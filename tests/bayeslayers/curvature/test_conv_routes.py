"""The routes of convolutions under vmap, which runs several samples at once, and without the gradient."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from bayeslayers.curvature import accumulate
from bayeslayers.curvature.conv_routes import ROUTES, in_groups
from bayeslayers.curvature.settings import Settings

SETTINGS = Settings((2, 1), (1, 1), (1, 1), False, (0, 0), 2)


def operands(*samples: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, weight = torch.randn(*samples, 3, 4, 5, 5).double(), torch.randn(6, 2, 3, 3).double()
    return x, torch.randn(*samples, 3, 6, 3, 5).double(), weight


@pytest.mark.parametrize("budget", [100, 2**20], ids=["tiles", "whole"])
@pytest.mark.parametrize("route", ROUTES)
def test_samples_at_once_are_the_samples_one_by_one(route, budget, monkeypatch):
    monkeypatch.setitem(accumulate.CHUNK_BYTES, "cpu", budget)
    x, g, weight = operands(2)

    def sums(x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = in_groups(ROUTES[route], x, g, weight, SETTINGS, True)
        assert found.grad is not None
        return found.grad, found.squares

    expected = [torch.stack(each) for each in zip(*map(sums, x, g), strict=True)]
    assert_close(list(torch.func.vmap(sums)(x, g)), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("route", ROUTES)
def test_squares_come_without_the_gradient(route):
    x, g, weight = operands()
    alone, both = (in_groups(ROUTES[route], x, g, weight, SETTINGS, with_grad) for with_grad in (False, True))
    assert alone.grad is None and both.grad is not None
    assert_close(both.grad, torch.ops.aten.convolution_backward(
        g, x, weight, None, *SETTINGS, [False, True, False])[1], rtol=1e-10, atol=1e-12)  # fmt: skip
    assert_close(alone.squares, both.squares, rtol=1e-12, atol=1e-12)
