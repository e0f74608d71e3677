from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from support.small_posterior import network, predicted
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.files import write_atomically
from bayeslayers.storage.card import FORMAT_VERSION
from bayeslayers.storage.model_card import model_card
from bayeslayers.storage.posterior import read_card, read_posterior

CONFIG, WEIGHTS = "config.json", "model.safetensors"
WHO = "'output.weight_precision'"


@pytest.fixture
def folder(tmp_path):
    bl.save_posterior(network(), tmp_path / "mine", class_names=["a", "b", "c"], dataset="digits", temperature=0.5)
    return tmp_path / "mine"


def set_config(folder, **fields):
    text = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in text.items() if value is not ...}))


def set_weights(folder, change):
    """Write changed tensors, or bytes, with the hash that fits them."""
    tensors = load_file(folder / WEIGHTS)
    changed = change(tensors)
    data = changed if isinstance(changed, bytes) else to_bytes(changed)
    (folder / WEIGHTS).write_bytes(data)
    set_config(folder, sha256=hashlib.sha256(data).hexdigest())


def test_save_then_load_predicts_the_same(folder):
    model = network()
    loaded = zoo.load(folder)
    assert_close(predicted(loaded), predicted(model), rtol=0, atol=0)
    assert not loaded.training
    other = network(seed=1)
    assert not torch.equal(predicted(other), predicted(model))
    assert bl.load_posterior(folder, other) == zoo.card_of(loaded)
    assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_save_then_load_takes_the_same_next_step(folder):
    def step(model):
        optimizer = bl.VOGN(model, 10, lr=0.1, generator=torch.Generator().manual_seed(0))
        with optimizer.sampled():
            nn.functional.cross_entropy(model(torch.ones(2, 1, 4, 4)), torch.tensor([0, 1])).backward()
        optimizer.step()
        return model.state_dict()

    assert_close(step(zoo.load(folder).train()), step(network()), rtol=0, atol=0)


def test_a_prior_of_the_parameters_shape_survives(tmp_path):
    model = network()
    model.output.weight_prior_mean = torch.randn(3, 5)
    model.output.weight_prior_precision = torch.rand(3, 5) + 0.1
    bl.save_posterior(model, tmp_path / "p")
    for loaded in (zoo.load(tmp_path / "p"), network(seed=1)):
        bl.load_posterior(tmp_path / "p", loaded)
        assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    bl.save_posterior(network(), tmp_path / "q")
    bl.load_posterior(tmp_path / "q", loaded)  # and back to a scalar
    assert loaded.output.weight_prior_mean.shape == ()


def test_config_and_model_card_say_what_the_posterior_is(folder):
    config = json.loads((folder / CONFIG).read_text())
    assert config["format_version"] == FORMAT_VERSION
    assert config["sha256"] == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert (config["name"], config["builder"], config["likelihood"]) == ("mine", "mlp", "categorical")
    assert config["kwargs"] == {"widths": [5], "input_size": [1, 4, 4], "num_classes": 3}
    assert (config["input_size"], config["class_names"]) == ([1, 4, 4], ["a", "b", "c"])
    assert (config["dataset"], config["temperature"]) == ("digits", 0.5)
    assert set(config) == {field.name for field in dataclasses.fields(bl.Card)}
    assert (folder / "README.md").read_text() == model_card(read_card(folder))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["mine"]


def test_model_card_shows_metrics_beside_the_baseline():
    metrics = {"accuracy": 0.5, "seed": 0}
    card = bl.Card("p", builder="mlp", dataset="mnist (9)", metrics=metrics, baseline={"optimizer": "adam"})
    text = model_card(card)
    assert text.startswith("---\n") and "library_name: bayeslayers" in text and 'zoo.load("p")' in text
    assert "| metric | this posterior | adam |" in text and "| accuracy | 0.5 |" in text
    assert "# p" in model_card(bl.Card("p", dataset="  ", metrics={"accuracy": 0.5}))


NAMES = [
    "p",
    "no",
    "Yes",
    "1.5",
    "1e3",
    "a: b",
    "# c",
    "'q'",
    '"',
    "\\",
    " x ",
    "é 🙂",
    "two\nlines",
    "\x1b\u2028[",
    "-",
    "a #b",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("metrics", [{}, {"accuracy": 1, "nll": 1e-5, "ece": 1e22, "brier": 0.5}, {"nll": 0.123}])
def test_the_front_matter_is_that_of_the_hub(name, metrics):
    card = bl.Card(name, dataset=f"{name} (9)", license="mit" * (name != "no"), metrics=metrics, input_size=[2])
    results = [
        EvalResult("tabular-classification", card.dataset.partition(" ")[0].lower(), card.dataset, key, metrics[key])
        for key in ("accuracy", "nll", "ece")
        if key in metrics
    ]
    tag = [name.lower()] if name in ("p", "no", "Yes", "1.5", "1e3", "a #b") else []
    tag = ["a"] if name == "a #b" else tag  # the first word is the data set's name
    expected = ModelCardData(
        license=card.license or None,
        library_name="bayeslayers",
        pipeline_tag="tabular-classification",
        tags=["bayesian", "uncertainty", "variational-inference", *tag],
        model_name=name,
        eval_results=results or None,
    )
    front = model_card(card).split("---\n")[1]
    assert yaml.safe_load(front) == yaml.safe_load(expected.to_yaml())
    if name == "p":  # whose text needs no quotes: the same file as that of an older release
        assert front == expected.to_yaml() + "\n"


def test_a_layer_used_twice_can_be_saved(tmp_path):
    layer = bl.BayesLinear(3, 3)
    bl.save_posterior(nn.Sequential(layer, nn.ReLU(), layer), tmp_path / "p")
    other = bl.BayesLinear(3, 3)
    bl.load_posterior(tmp_path / "p", nn.Sequential(other, nn.ReLU(), other))
    assert_close(other.state_dict(), layer.state_dict())


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "sha256.*damaged or changed"),
        (lambda f: flip(f / WEIGHTS, -5), "sha256.*damaged or changed"),
        (lambda f: flip(f / WEIGHTS, 20), "sha256.*damaged or changed"),
        (lambda f: set_config(f, sha256="0" * 64), "sha256.*damaged or changed"),
        (lambda f: set_config(f, sha256=...), "sha256.*damaged or changed"),
        (lambda f: set_weights(f, lambda t: to_bytes(t)[:-9]), "must be a safetensors file"),
        (lambda f: set_weights(f, lambda t: b"hello"), "must be a safetensors file"),
        (lambda f: (f / WEIGHTS).write_bytes(b"0" * 2**21), "sha256.*damaged or changed"),
        (
            lambda f: set_weights(f, lambda t: without(t, "output.bias")),
            r"hold tensor 'output.bias'.*\(1 missing\)",
        ),
        (lambda f: set_weights(f, lambda t: t | {"extra": torch.ones(1)}), r"got 'extra' \(1 unknown\)"),
        (lambda f: change(f, lambda t: t.flatten()), rf"{WHO} must be .* of shape \(3, 5\), got .* of shape \(15,\)"),
        (lambda f: change(f, lambda t: t.mean()), rf"{WHO} must be .* of shape \(3, 5\), got .* of shape \(\)"),
        (lambda f: change(f, torch.Tensor.long), rf"{WHO} must be torch.float32.* got I64"),
        (lambda f: change(f, lambda t: t.to(torch.complex64)), rf"{WHO} must be of real numbers, got C64"),
        (lambda f: change(f, lambda t: t.index_fill(0, torch.tensor(1), math.nan)), f"{WHO} must be finite"),
        (lambda f: change(f, lambda t: t * math.inf), f"{WHO} must be finite"),
        (lambda f: change(f, lambda t: t.index_fill(0, torch.tensor(1), math.inf)), f"{WHO} must be finite"),
        (lambda f: change(f, lambda t: t.double() * 1e60), f"{WHO} must be finite"),  # as float32 will hold it
        (lambda f: change(f, lambda t: t * 0), f"precision {WHO} must be > 0, got 0"),
        (lambda f: change(f, lambda t: t.double() * 1e-60), f"precision {WHO} must be > 0, got 0"),
        (lambda f: change(f, lambda t: t - 100), f"precision {WHO} must be > 0, got -"),
        (lambda f: put(f, "normalise.std", torch.zeros(1, 1, 1)), "deviation 'normalise.std' must be > 0, got 0"),
        (lambda f: put(f, "normalise.std", -torch.ones(1, 1, 1)), "deviation 'normalise.std' must be > 0, got -1"),
        (lambda f: put(f, "normalise.std", torch.full((1, 1, 1), math.inf)), "'normalise.std' must be finite"),
        (lambda f: put(f, "normalise.mean", torch.full((1, 1, 1), math.nan)), "'normalise.mean' must be finite"),
        (lambda f: put(f, "output.bias_prior_precision", torch.tensor(0.0)), "prior_precision' must be > 0, got 0"),
        (lambda f: put(f, "output.bias_prior_precision", torch.tensor(1)), "must be torch.float32 .* got I64"),
        (lambda f: (f / CONFIG).write_text("{"), "must be JSON"),
        (lambda f: (f / CONFIG).write_bytes(b"\xff\x00"), "must be JSON"),
        (lambda f: (f / CONFIG).write_text("[" * 10**5), "must be JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), "must hold a JSON object, got list"),
        (lambda f: set_config(f, colour="red"), "bad field 'colour'"),
        (lambda f: set_config(f, dataset_size="many"), "bad field 'dataset_size'.*integer"),
        (lambda f: set_config(f, class_names=[1]), "bad field 'class_names.0'.*string"),
        (lambda f: set_config(f, format_version=2), "format_version from 1 to 1, got 2. Update bayeslayers"),
        (lambda f: set_config(f, format_version=0), "format_version from 1 to 1, got 0"),
        (lambda f: set_config(f, format_version="1"), "format_version from 1 to 1, got '1'"),
        (lambda f: set_config(f, format_version=...), "format_version from 1 to 1, got None"),
        (lambda f: set_config(f, builder="mlpp"), "unknown model 'mlpp'. Did you mean 'mlp'"),
        (lambda f: set_config(f, builder=None), "must name its network's builder, got none"),
        (lambda f: set_config(f, resize=200_000), r"resize must be 1 to 8 times .*input.*, got 200000"),
        (lambda f: set_config(f, builder="os.system"), "unknown model 'os.system'"),
        (lambda f: set_config(f, kwargs={"depth": 3}), "among num_classes, .* got 'depth'"),
        (lambda f: set_config(f, kwargs={"widths": [-1]}), "must be an integer >= 1, got -1"),
        (lambda f: set_config(f, kwargs={"input_size": []}), "describe a network of the zoo: input_size"),
        (
            lambda f: set_config(f, kwargs={"widths": [10**12]}),
            r"describe a network of the zoo: its number 1000000000000 is too large",
        ),
        (lambda f: set_config(f, likelihood="poisson"), "unknown likelihood 'poisson'"),
        (lambda f: set_config(f, input_size=[3, 4, 4]), r"input_size must be \[1, 4, 4\].* got \[3, 4, 4\]"),
        (lambda f: (f / CONFIG).unlink(), "got no config.json in it"),
        (lambda f: (f / WEIGHTS).unlink(), "got no model.safetensors in it"),
    ],
)
def test_every_damage_has_its_sentence(folder, break_it, message):
    break_it(folder)
    model = network(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(bl.PosteriorError, match=message) as caught:
        zoo.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    try:
        bl.load_posterior(folder, model)
    except bl.PosteriorError:
        assert_close(model.state_dict(), before, rtol=0, atol=0)
    else:  # what is wrong is the network's description alone
        assert "network" in str(caught.value)


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


def put(folder, name, tensor):
    assert load_file(folder / WEIGHTS)[name].shape == tensor.shape
    set_weights(folder, lambda tensors: tensors | {name: tensor})


def change(folder, function):
    set_weights(folder, lambda tensors: tensors | {WHO.strip("'"): function(tensors[WHO.strip("'")])})


def test_a_running_variance_below_zero_does_not_load(tmp_path):
    bl.save_posterior(zoo.create("lenet5_bn"), tmp_path / "p")
    assert (load_file(tmp_path / "p" / WEIGHTS)["bn1.running_var"] == 1).all()
    put(tmp_path / "p", "bn1.running_var", torch.full((6,), -1.0))
    with pytest.raises(bl.PosteriorError, match=r"variance 'bn1.running_var' must be >= 0, got -1"):
        zoo.load(tmp_path / "p")
    put(tmp_path / "p", "bn1.running_var", torch.zeros(6))
    zoo.load(tmp_path / "p")


def test_what_was_hashed_is_what_is_loaded(folder, monkeypatch):
    opened, read = [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: (opened.append(path.name), read(path, *a, **k))[1])
    model = zoo.load(folder)
    assert opened.count(WEIGHTS) == opened.count(CONFIG) == 1
    stored = read_posterior(folder)
    for name in (WEIGHTS, CONFIG):  # another process writes over the files, which nothing is a view of
        with open(folder / name, "r+b") as file:
            file.write(bytes((folder / name).stat().st_size))
    stored.weights.fill(other := network(seed=1))
    for found in (model, other):
        assert_close(predicted(found), predicted(network()), rtol=0, atol=0)


def test_weights_of_another_network_do_not_load(folder):
    model = network(widths=[6])
    with pytest.raises(bl.PosteriorError, match=r"'hidden1.weight' must be .* of shape \(6, 16\), got .* \(5, 16\)"):
        bl.load_posterior(folder, model)


def test_a_posterior_may_be_stored_in_half_precision(folder):
    set_weights(folder, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    assert_close(predicted(zoo.load(folder)), predicted(network()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("target", "name", "calls"),
    [(os, "replace", 3), (os, "fsync", 3), (Path, "rename", 2), (Path, "chmod", 1)],
)
def test_a_crash_at_any_stage_leaves_the_old_posterior(folder, monkeypatch, target, name, calls):
    old, real = predicted(network()), getattr(target, name)
    for fatal in range(calls):
        count = iter(range(100))

        def crash(*args, count=count, fatal=fatal, **kwargs):
            if next(count) == fatal:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(target, name, crash)
            with pytest.raises(KeyboardInterrupt):
                bl.save_posterior(network(seed=1), folder)
        assert_close(predicted(zoo.load(folder)), old, rtol=0, atol=0)
        assert [path.name for path in folder.parent.iterdir()] == ["mine"]
    bl.save_posterior(network(seed=1), folder)
    assert_close(predicted(zoo.load(folder)), predicted(network(seed=1)), rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.nan, -1.0, 0.0])
def test_a_posterior_that_could_not_be_loaded_is_not_saved(folder, value):
    model = network(seed=1)
    model.output.weight_precision[0, 0] = value
    with pytest.raises(bl.PosteriorError, match=f"model: .*{WHO}"):
        bl.save_posterior(model, folder)
    assert_close(predicted(zoo.load(folder)), predicted(network()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "fields", "error", "message"),
    [
        (nn.Linear(2, 2), {}, ValueError, "model must have Bayesian layers, got none"),
        (network(), {"colour": "red"}, ValueError, "card has a bad field 'colour'"),
        (network(), {"dataset_size": "x"}, ValueError, "card has a bad field 'dataset_size': Input should be"),
        (network(), {"kwargs": {"a": torch.ones(1)}}, TypeError, "Tensor is not JSON serializable"),
    ],
)
def test_bad_arguments_of_save_change_nothing(folder, model, fields, error, message):
    before = (folder / CONFIG).read_bytes()
    with pytest.raises(error, match=message) as caught:
        bl.save_posterior(model, folder, **fields)
    assert "\n" not in str(caught.value)
    assert (folder / CONFIG).read_bytes() == before and len(list(folder.parent.iterdir())) == 1


@pytest.mark.parametrize(
    "others",
    [
        {"precious.txt": "x"},
        {"config.json": '{"model_type": "bert"}', "model.safetensors": "weights of another project"},
        {"config.json": "{}", "src/main.c": "int main;"},
    ],
)
def test_a_folder_of_something_else_is_not_overwritten(tmp_path, others):
    for name, text in others.items():
        write_atomically(tmp_path / "project" / name, text.encode())
    with pytest.raises(FileExistsError, match="folder must be new, empty or a posterior"):
        bl.save_posterior(network(), tmp_path / "project")
    for name, text in others.items():
        assert (tmp_path / "project" / name).read_text() == text


def test_a_posterior_beside_other_files_is_not_overwritten(folder):
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        bl.save_posterior(network(), folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_an_empty_folder_and_the_working_directory_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    bl.save_posterior(network(), "here")
    assert read_card("here").name == "here"
    bl.save_posterior(network(), "new/er/p")
    assert_close(predicted(zoo.load("new/er/p")), predicted(network()))
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError):
        bl.save_posterior(network(), "file")


def test_a_failed_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "f", b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_copied_folder_loads_and_nothing_leaves_it(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    assert_close(predicted(zoo.load(tmp_path / "copy")), predicted(network()))
