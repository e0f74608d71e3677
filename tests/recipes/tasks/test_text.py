from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import yaml

import zoo
from recipes.cli import main
from recipes.cli.train import CONFIGS
from recipes.data import clauses
from recipes.tasks.text import Config, Text
from recipes.training.config import make_model
from recipes.training.methods import make_optimizer
from recipes.training.options import configuration

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = sorted(path.stem for path in (CONFIGS / "text").glob("*.yaml"))


def read(name):
    return configuration(Config, yaml.safe_load((CONFIGS / f"text/{name}.yaml").read_text()))


def test_each_network_has_a_configuration_of_each_method():
    assert [f"{net}_{method}" for net in ("lstm", "transformer") for method in ("adamw", "ivon", "vogn")] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_fits_its_network_and_its_data(name):
    config = read(name)
    Text(config).check()
    model = make_model(config)
    assert config.model["vocabulary"] == len(clauses.WORDS) and model.card.input_size == [clauses.LENGTH]
    make_optimizer(config.optimizer, model, 100, 0)
    baseline = read(name.partition("_")[0] + "_adamw")
    for field in ("model", "epochs", "batch_size", "sentences", "test_sentences"):
        assert getattr(config, field) == getattr(baseline, field)


def config(folder, **fields):
    small = read("transformer_ivon")
    changes = {
        "model": {**small.model, "width": 8, "depth": 1, "heads": 2},
        "sentences": 40,
        "test_sentences": 30,
        "epochs": 1,
        "batch_size": 20,
        "output": str(folder),
    }
    return dataclasses.replace(small, **{**changes, **fields})


def test_a_run_leaves_posterior_report_and_card(tmp_path, capsys):
    before = torch.random.get_rng_state()
    metrics = Text(config(tmp_path / "run", validation=10)).train()
    assert 0 < metrics["nll"] < 2 and metrics["test_examples"] == 30
    assert 0 <= metrics["ood_auroc_other-words"] <= 1
    net = zoo.load(tmp_path / "run/posterior")
    assert (net.card.class_names, net.card.dataset_size) == (clauses.CLASSES, 30)
    report = (tmp_path / "run/report.html").read_text()
    assert "The most confident mistakes" in report and " is " in report
    words = ["evaluate", str(tmp_path / "run/posterior"), "--limit", "50", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["nll"] > 0
    torch.random.set_rng_state(before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": "mnist"}, "data must be 'clauses' for text, got 'mnist'"),
        ({"sentences": 0}, "sentences must be an integer >= 1, got 0"),
        ({"model": {"name": "text_transformer", "vocabulary": 10}}, "model must take sentences of 18 words out of 163"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        Text(config(tmp_path / "run", **fields)).train()
