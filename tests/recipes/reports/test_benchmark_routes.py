"""Do the routes that the benchmark times agree, and does its command report what it has timed?"""

from __future__ import annotations

import json
from typing import cast

import pytest
import torch
from torch.testing import assert_close

from bayeslayers.curvature.moments import Moments
from recipes.cli import main
from recipes.reports import benchmark_routes as routes
from recipes.reports.benchmark_routes import Convolution, Sequence

SMALL = (Convolution(4, 6, 8, 5, 3), Convolution(4, 6, 8, 5, 3, 2, 2), Sequence(4, 3, 5, 6))


@pytest.mark.parametrize("layer", SMALL, ids=str)
def test_all_routes_of_a_layer_give_the_same_sums(layer):
    costs, runs = routes.routes_of(layer, torch.Generator().manual_seed(0))
    first, *others = (cast(Moments, run()) for run in runs.values())
    assert set(costs) == set(runs) and min(costs.values()) > 0
    for other in others:
        assert_close([other.grad, other.squares], [first.grad, first.squares], rtol=1e-4, atol=1e-4)


def test_the_command_gives_the_choice_beside_the_fastest(capsys, monkeypatch):
    monkeypatch.setattr(routes, "GRID", SMALL)
    threads = torch.get_num_threads()
    assert main(["benchmark", "routes", "--rounds", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in rows] == [
        "4 x 5 x 5, 3 x 3 6 -> 8",
        "4 x 5 x 5, 3 x 3 6 -> 8, stride 2, 2 groups",
        "4 x 3 positions, linear 6 -> 5",
    ]
    for row in rows:
        times = row["milliseconds"]
        assert row["fastest"] == min(times, key=times.get) and {row["chosen"], row["fastest"]} <= set(times)
        assert row["ratio"] == pytest.approx(times[row["chosen"]] / times[row["fastest"]], rel=0.05)
    assert torch.get_num_threads() == threads


def test_names_tell_the_layers_of_the_grid_apart():
    assert len({routes._name(layer) for layer in routes.GRID}) == len(routes.GRID)
