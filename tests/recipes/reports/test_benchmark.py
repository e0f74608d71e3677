from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import zoo
from bayeslayers.sampling import sites_of
from bayeslayers.storage.weight_file import WEIGHTS
from recipes.cli import main
from recipes.reports import benchmark
from recipes.reports.demo import ASSETS
from recipes.reports.step_networks import step_network
from recipes.training import methods


@pytest.mark.parametrize(("name", "build"), [("lenet5-mnist", "_plain_lenet5"), ("mlp-mnist", "_plain_mlp")])
def test_plain_torch_predicts_the_same(name, build):
    build = getattr(benchmark, build)
    digit = load_file(ASSETS)["digits"][4:5, None].float() / 255
    ours = benchmark._prediction(name, digit, 64)
    plain = benchmark._plain_prediction(build, zoo.resolve(name) / WEIGHTS, digit, 64)
    assert_close(plain, ours, rtol=0, atol=0.05)
    model, net = zoo.load(name), build()
    net.load_state_dict({key: model.get_parameter(key) for key, _ in net.named_parameters()})
    assert_close(net(model.normalise(digit)), model(digit))
    assert [key for key, _ in net.named_parameters()] == [key for key, _ in model.named_parameters()]


def test_the_load_benchmark_compares_side_by_side(capsys):
    before = torch.random.get_rng_state()
    assert main(["benchmark", "load", "--rounds", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["posterior"], row["num_samples"]) for row in rows] == [
        ("lenet5-mnist", 1),
        ("lenet5-mnist", 64),
        ("mlp-mnist", 1),
        ("mlp-mnist", 64),
    ]
    for row in rows:
        assert row["ratio_to_plain"] == pytest.approx(row["median_ms"] / row["plain_ms"], rel=0.01)
    torch.random.set_rng_state(before)


def test_the_step_benchmark_takes_every_method(capsys):
    before = torch.random.get_rng_state()
    rows = benchmark.benchmark_step(
        1, optimizers=[name for name in methods.METHODS if name != "adam"], models=["lenet5"]
    )
    assert [row.optimizer for row in rows] == ["adam", *(name for name in methods.METHODS if name != "adam")]
    assert [row.ratio_to_adam == 1 for row in rows][:2] == [True, False]
    words = ["--optimizers", "sgd", "--models", "mlp", "alexnet"]
    assert main(["benchmark", "step", "--rounds", "1", *words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["model"], row["optimizer"]) for row in rows] == [
        (model, optimizer) for model in ("mlp", "alexnet") for optimizer in ("adam", "sgd")
    ]
    with pytest.raises(ValueError, match=r"models must be classifiers, got smp:Unet/resnet18, .* \(1, 2, 224, 224\)"):
        benchmark.benchmark_step(1, models=["smp:Unet/resnet18"])
    with pytest.raises(ValueError, match=r"optimizer must be one of .*, got 'vogm'. Did you mean 'vogn'"):
        benchmark.benchmark_step(1, optimizers=["vogm"], models=["mlp"])
    torch.random.set_rng_state(before)


def test_the_step_benchmark_takes_sequences_and_the_time_of_the_process(capsys):
    before = torch.random.get_rng_state()
    words = ["--models", "lstm", "swin", "--rounds", "1", "--cpu-time", "--json"]
    assert main(["benchmark", "step", *words]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["model"], row["optimizer"]) for row in rows] == [
        (n, o) for n in ("lstm", "swin") for o in ("adam", "vogn")
    ]
    assert all(row["median_ms"] > 0 for row in rows)
    clock = iter(range(100))
    medians = benchmark.interleaved_medians({"a": lambda: None}, 3, lambda: float(next(clock)))
    assert medians == {"a": 1.0}
    torch.random.set_rng_state(before)


def test_turns_and_warm_up_are_steps(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(benchmark, "steps", lambda *args: asked.append(args[-1]) or (lambda: None))
    words = ["--models", "mlp", "--optimizers", "kfac", "--rounds", "200", "--turn", "50", "--warm-up", "30", "--json"]
    assert main(["benchmark", "step", *words]) == 0
    assert asked == [30, 50] * 2
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_the_step_benchmark_measures_every_network_of_the_table(capsys):
    before = torch.random.get_rng_state()
    sizes = {"resnet20": 64, "resnet18_cifar": 32, "encoder": 32, "unet_small": 8, "layers200": 64, "lenet5": 128}
    for name, size in sizes.items():
        model, x, y = step_network(name)
        assert len(x) == len(y) == size
        assert sum(1 for _ in sites_of(model)) == sum(1 for _ in model.parameters())
    words = ["--models", "layers200", "--optimizers", "ivon", "sgd", "--samples", "2", "--rounds", "1", "--json"]
    assert main(["benchmark", "step", *words]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["batch"], row["optimizer"]) for row in rows] == [(64, "adam"), (64, "ivon"), (64, "sgd")]
    row = benchmark.benchmark_step(1, optimizers=["bbb,estimator=weights"], models=["lenet5"])[1]
    assert row.optimizer == "bbb,estimator=weights"
    with pytest.raises(ValueError, match="estimator must be"):
        benchmark.benchmark_step(1, optimizers=["bbb,estimator=other"], models=["lenet5"])
    with pytest.raises(ValueError, match=r"num_samples must be an integer >= 1, got 0"):
        benchmark.benchmark_step(1, num_samples=0)
    with pytest.raises(ValueError, match=r"turn must be an integer >= 1, got 0"):
        benchmark.benchmark_step(1, turn=0)
    with pytest.raises(ValueError, match=r"warm_up must be a finite number >= 0, got -1"):
        benchmark.benchmark_step(1, warm_up=-1)
    torch.random.set_rng_state(before)


PEAKS = """
import torch
from recipes.reports.benchmark import peak_memory
print(*(peak_memory(lambda: torch.ones(n, dtype=torch.uint8)) for n in (1, 2**26)))
"""


def test_peak_memory_is_that_of_the_action():
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    little, much = map(int, done.stdout.split())
    assert 0.5 * 2**26 < much - little < 1.5 * 2**26
