"""The model of what several processes cost: its terms, its fit, and a measurement of seconds."""

from __future__ import annotations

import json

import pytest

import zoo
from recipes.cli import main
from recipes.reports.scaling import NETWORKS, fit, on_paper, reduction_time


def test_the_fit_finds_latency_and_bandwidth():
    found = [(p, size, reduction_time(p, size, 2e-4, 3e-9)) for p in (2, 4) for size in (1e3, 1e6, 1e7)]
    assert fit(found) == pytest.approx((2e-4, 3e-9), rel=1e-6)
    assert fit([]) == (0.0, 0.0)
    latency, per_byte = fit([(2, 1e3, 1e-2), (2, 1e6, 1e-3)])  # larger ones are faster: no bandwidth fits
    assert latency > 0 == per_byte
    latency, per_byte = fit([(2, 1e3, 1e-9), (2, 1e6, 1e-3)])
    assert latency == 0 < per_byte


def test_on_paper_a_rank_sends_twice_its_gradients_and_squares_and_more_gpus_are_less_efficient():
    rows = on_paper((8, 128, 1024))
    for name, (parameters, _) in NETWORKS.items():
        assert sum(p.numel() for p in zoo.create(name).parameters()) == parameters
        own = [row for row in rows if row.network == name]
        assert own[0].megabytes == pytest.approx(2 * 7 / 8 * 8 * parameters / 1e6, abs=0.1)
        assert 1 > own[0].efficiency > own[1].efficiency > own[2].efficiency > 0.5
        for row in own:
            assert row.efficiency < row.efficiency_bf16 < 1
            saved = 4 * parameters * (1 - 1 / row.gpus) / 1e6  # of VOGN's momentum
            assert row.memory - row.memory_in_shards == pytest.approx(saved, abs=0.2)


def test_the_command_measures_processes_beside_the_model(capsys):
    words = "benchmark scaling --json --models mlp --processes 1 2 --batch 4 --rounds 2"
    assert main(words.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["processes"] for row in found["measured"]] == [1, 2] and len(found["on_paper"]) == 6
    alone, pair = found["measured"]
    assert (alone["message"], alone["reduction"], alone["speedup"]) == (0, 0, 1)
    terms = ("compute", "update", "message", "reduction")
    for row in (alone, pair):
        assert row["predicted"] == pytest.approx(sum(row[key] for key in terms), abs=0.01)
        assert row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1, abs=0.002)
    assert min(pair[key] for key in (*terms, "measured", "reduction_measured", "reduction_of_ddp", "speedup")) > 0


def test_processes_begin_with_one(capsys):
    assert main("benchmark scaling --processes 2 4".split()) != 0
    assert "processes must begin with 1, with which the others are compared, got 2." in capsys.readouterr().err
