"""The estimates that choose among routes: their order where it is clear, and their growth with the work."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.curvature.costs import DEVICES, OTHER_DEVICE, convolution_costs, device_of, fastest, matrix_costs
from bayeslayers.curvature.settings import Settings


def of_convolution(n: int, c_in: int, c_out: int, size: int, groups: int = 1) -> dict[str, float]:
    settings = Settings((1, 1), (1, 1), (1, 1), False, (0, 0), groups)
    x, g = torch.empty(n, c_in, size, size), torch.empty(n, c_out, size, size)
    return convolution_costs(x, g, (c_out, c_in // groups, 3, 3), settings)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ((32, 256, 256, 1), "pairs"),
        ((64, 16, 16, 32), "groups"),
        ((32, 512, 512, 4), "products"),
        ((64, 3, 16, 32), "products"),
        ((32, 64, 64, 16, 64), "groups"),
    ],
)
def test_the_choice_where_one_route_is_far_ahead(layer, expected):
    assert fastest(of_convolution(*layer)) == expected


@pytest.mark.parametrize(("positions", "expected"), [(2, "pairs"), (16, "products"), (64, "products")])
def test_many_positions_of_a_sequence_take_products(positions, expected):
    assert fastest(matrix_costs(torch.empty(32, positions, 256), torch.empty(32, positions, 256))) == expected


def test_more_examples_cost_more_on_every_route():
    few, many = of_convolution(4, 16, 16, 8), of_convolution(64, 16, 16, 8)
    assert all(8 * few[route] < many[route] <= 16 * few[route] for route in few)


def test_the_numbers_are_those_of_the_device():
    assert device_of(torch.empty(1)) == DEVICES["cpu"]
    assert device_of(torch.empty(1, device="meta")) == OTHER_DEVICE


def test_the_choice_compiles_for_batches_of_other_sizes():
    layer = bl.BayesLinear(6, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for examples in (4, 7, 5):  # from the second on sizes are symbols
        x, found = torch.randn(examples, 3, 6), []
        for call in (compiled, layer):
            with bl.tracked(layer) as tracker:
                call(x).square().sum().backward()
            found.append(tracker.leaves["weight"].grad.clone())
        assert_close(found[0], found[1])
