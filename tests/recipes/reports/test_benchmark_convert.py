from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from recipes.cli import main
from recipes.reports import benchmark_convert as table
from recipes.reports import convert_check, convert_networks
from recipes.reports.convert_names import NETWORKS
from recipes.reports.convert_networks import Trial

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of other libraries
]
LIBRARIES = {
    "torch": "LSTM GRU RNN TransformerEncoder",
    "timm": "test_byobnet test_convnext test_efficientnet test_mambaout test_resnet test_vit",
    "transformers": "BertForSequenceClassification BertForMaskedLM DistilBertForSequenceClassification "
    "RobertaForSequenceClassification AlbertForSequenceClassification ElectraForSequenceClassification GPT2LMHeadModel "
    "GPTNeoXForCausalLM OPTForCausalLM LlamaForCausalLM T5ForConditionalGeneration BartForConditionalGeneration "
    "ViTForImageClassification SwinForImageClassification WhisperModel",
}
PART = [f"{library}:{name}" for library, names in LIBRARIES.items() for name in names.split()]


@pytest.fixture(autouse=True)
def same_random_numbers():
    with torch.random.fork_rng():
        yield


def test_there_are_as_many_networks_as_promised():
    libraries = [name.partition(":")[0] for name in NETWORKS]
    assert len(NETWORKS) >= 160 and libraries.count("timm") >= 97
    assert {"torch", "torchvision", "timm", "smp", "transformers"} == set(libraries)
    kinds = [options.get("kind") for name, options in NETWORKS.items() if name.startswith("torchvision:")]
    assert {"segmentation", "detection", None} <= set(kinds)
    assert len(PART) == 25 and set(PART) <= set(NETWORKS)


@pytest.mark.parametrize("name", PART)
def test_a_part_of_the_table_holds(name):
    if name.startswith("transformers:"):
        pytest.importorskip("transformers")
    row = convert_check.check(name)
    assert row.converts and row.outputs_equal and row.save_load, row.reason
    assert row.vogn_step and row.ivon_step and row.all_move and row.epistemic, row.reason


def tried(network, **options):
    return Trial(network, (torch.rand(2, 4),), {}, lambda y: y.square().mean(), **options)


def half_computed():
    """A network of two layers, of which the second computes its weight from other tensors."""
    return nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("network", "column", "reason"),
    [
        (nn.Sequential(nn.Flatten()), "converts", "the model must have a layer that can become Bayesian"),
        (half_computed(), "coverage", "computed"),
    ],
)
def test_a_failure_has_its_reason(monkeypatch, network, column, reason):
    monkeypatch.setattr(convert_check, "trial", lambda name: tried(network))
    row = convert_check.check("own")
    assert reason in row.reason and f"{column}:" in row.reason
    assert row.converts is (column != "converts")


def test_a_network_that_cannot_run_is_a_row(monkeypatch):
    monkeypatch.setattr(convert_check, "trial", lambda name: tried(nn.Linear(5, 4)))
    row = convert_check.check("own")
    assert row.converts and row.vogn_step is row.ivon_step is row.outputs_equal is False
    assert "outputs_equal: RuntimeError: mat1 and mat2" in row.reason and "vogn_step: RuntimeError" in row.reason


def test_a_tensor_that_stays_is_named(monkeypatch):
    monkeypatch.setattr(convert_check, "trial", lambda name: tried(nn.Linear(4, 4)))
    monkeypatch.setattr(convert_check, "STEP", 0.0)
    row = convert_check.check("own")
    assert (row.vogn_step, row.ivon_step, row.all_move) == (True, True, False)
    assert "all_move: vogn_step leaves 2 tensors (weight, bias) as they are" in row.reason


def test_the_command_goes_on_with_its_file(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    done = convert_check.ConvertRow("torch:GRU", 7, converts=True, coverage=1.0, reason="kept")
    file.write_text(json.dumps(dataclasses.asdict(done)) + "\n" + '{"network": "torch:LS')
    words = ["benchmark", "convert", "--only", "torch:*", "--file", str(file)]
    file.write_text(file.read_text() + "\n")
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["network"] for row in rows] == ["torch:LSTM", "torch:GRU", "torch:RNN", "torch:TransformerEncoder"]
    assert rows[1] == dataclasses.asdict(done) and all(row["ivon_step"] for row in rows if row != rows[1])
    assert main(words) == 0  # from the file alone
    assert "4 networks: converts 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match="only must fit the name of a network, got 'nothing'"):
        table.benchmark_convert("nothing")


def test_a_network_that_takes_too_long_is_a_row_and_the_next_one_runs(monkeypatch):
    with table._Worker(seconds=0, gigabytes=6.0) as worker:
        row = worker.row_of("torch:RNN")
        assert row.converts is None and row.reason.startswith("takes more than 0 s")
        assert worker.process is None
        worker.seconds = 300
        assert worker.row_of("torch:RNN").converts


def test_every_network_has_a_maker():
    assert {name.partition(":")[0] for name in NETWORKS} == set(convert_networks._MAKERS)
