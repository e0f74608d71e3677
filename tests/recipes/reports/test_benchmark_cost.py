"""What predictions cost beside forward passes and peers, and steps in memory and as networks grow."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from torch import nn

from recipes.cli import main
from recipes.reports import benchmark_growth, benchmark_memory, benchmark_predict
from recipes.reports.benchmark_growth import GrowthRow


@pytest.fixture(autouse=True)
def same_randomness():
    before = torch.random.get_rng_state()
    yield
    torch.random.set_rng_state(before)


def test_the_predict_benchmark_gives_ratios_per_draw(capsys):
    words = ["--models", "lenet5", "--batches", "1", "3", "--rounds", "1", "--cpu-time", "--json"]
    assert main(["benchmark", "predict", *words]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["batch"], row["method"]) for row in rows] == [
        (b, m) for b in (1, 3) for m in benchmark_predict.METHODS
    ]
    for row in rows:
        assert row["ratio_per_sample"] == pytest.approx(row["median_ms"] / (32 * row["forward_ms"]), rel=0.02)


class Noisy(nn.Linear):
    """A layer of a peer, with its constructor."""

    def __init__(self, prior_mu, prior_sigma, *sizes, bias):
        super().__init__(*sizes, bias=bias)


def test_installed_peers_are_measured_and_absent_ones_named(monkeypatch):
    built: list[nn.Module] = []

    def peer(net):
        built.append(benchmark_predict._torchbnn(net))
        return built[-1]

    monkeypatch.setitem(sys.modules, "torchbnn", types.SimpleNamespace(BayesLinear=Noisy, BayesConv2d=Noisy))
    monkeypatch.setattr(benchmark_predict, "PEERS", {"here": ("torch", peer), "away": ("no_such_package", peer)})
    rows = benchmark_predict.benchmark_predict(1, models=["mlp"], batches=[2], num_samples=2, peers=True)
    assert [row.method for row in rows] == [*benchmark_predict.METHODS, "here", "away (not installed)"]
    assert rows[-2].median_ms and rows[-2].median_ms > 0 and rows[-1].median_ms is None
    assert sum(isinstance(module, Noisy) for module in built[0].modules()) == 3
    assert not any(type(module) is nn.Linear for module in built[0].modules())


def test_memory_is_that_of_network_optimizer_and_steps():
    adam, vogn = benchmark_memory.benchmark_memory(["resnet20"], ["vogn"])
    activations = 4 * 64 * 19 * 16 * 32**2 / 2**20  # at least, MB
    assert adam.ratio_to_adam == 1 and 0.5 * activations < adam.peak_mb < 20 * activations
    assert vogn.ratio_to_adam == pytest.approx(vogn.peak_mb / adam.peak_mb, rel=0.01)
    assert 0.7 < vogn.ratio_to_adam < 4


def test_growth_varies_one_number_at_a_time_and_is_drawn(tmp_path, monkeypatch, capsys):
    axes = {"batch": (2, 4), "depth": (1,), "samples": (2,)}
    monkeypatch.setattr(benchmark_growth, "AXES", axes)
    rows = benchmark_growth.benchmark_growth(3, axes=axes, chart=tmp_path / "growth.png")
    assert [(row.axis, row.value) for row in rows[::2]] == [("batch", 2), ("batch", 4), ("depth", 1), ("samples", 2)]
    assert [row.optimizer for row in rows[:2]] == ["vogn", "ivon"]
    for row in rows:
        assert row.ratio_to_adam == pytest.approx(row.median_ms / row.adam_ms, rel=0.02)
    assert (tmp_path / "growth.png").stat().st_size > 1000
    monkeypatch.setattr(
        benchmark_growth, "benchmark_growth", lambda rounds, chart: [GrowthRow("batch", rounds, "vogn", 1, 2, 2)]
    )
    assert main(["benchmark", "growth", "--rounds", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["value"] == 5
