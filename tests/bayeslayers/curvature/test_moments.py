"""The two sums over examples that all routes fill: their parts, their dtype, and what rounding may do."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from bayeslayers.curvature import accumulate
from bayeslayers.curvature.moments import Moments


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def test_positions_that_cancel_leave_no_negative_square():
    torch.manual_seed(0)
    g = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None] * torch.randn(64, 1, 20)
    x = torch.tensor([1.0, 0.5, 0.7, 0.8])[:, None] * torch.randn(64, 1, 30)
    sums = Moments.zeros(g, 20, 30)
    sums.add_pairs(g, x)
    assert sums.squares.min() >= 0 and sums.squares.max() < 1e-4


@pytest.mark.parametrize("examples", [1, 5])
def test_sums_are_those_of_the_examples(examples):
    per_example, sums = rows(examples, 3, 2), Moments.zeros(rows(1), 3, 2)
    for _ in range(2):
        sums.add(per_example.clone())
    assert_close([sums.grad, sums.squares], [2 * per_example.sum(0), 2 * per_example.square().sum(0)])


@pytest.mark.parametrize("budget", [8, 64, 2**20], ids=["values", "rows", "examples"])
def test_products_in_tiles_are_the_products(budget, monkeypatch):
    monkeypatch.setitem(accumulate.CHUNK_BYTES, "cpu", budget)
    g, x = rows(5, 7, 3), rows(5, 7, 4)
    sums, alone = Moments.zeros(g, 3, 4), Moments.zeros(g, 3, 4, with_grad=False)
    for each in (sums, alone):
        each.add_products(g, x)
    expected = torch.einsum("npo,npi->noi", g, x)
    assert_close([sums.grad, sums.squares], [expected.sum(0), expected.square().sum(0)], rtol=1e-12, atol=1e-12)
    assert alone.grad is None
    assert_close(alone.squares, sums.squares, rtol=0, atol=0)


def test_half_precision_is_summed_in_float32():
    per_example = torch.full((4096, 1), 300.0, dtype=torch.float16)  # its square is above the largest float16
    sums = Moments.zeros(per_example, 1)
    sums.add(per_example)
    assert_close([sums.grad, sums.squares], [torch.tensor([4096 * 300.0]), torch.tensor([4096 * 90000.0])])


def test_a_part_shares_its_memory_and_parts_join():
    sums = Moments.zeros(rows(1), 4, 2)
    sums.part(slice(0, 2)).add(rows(3, 2, 2))
    assert sums.squares[:2].min() > 0 and sums.squares[2:].max() == 0
    joined = Moments.joined([sums.part(slice(0, 2)), sums.part(slice(2, 4))])
    assert_close([joined.grad, joined.squares], [sums.grad, sums.squares])
    without = Moments.joined([Moments.zeros(rows(1), 1, with_grad=False)] * 2)
    assert without.grad is None and without.squares.shape == (2,)
