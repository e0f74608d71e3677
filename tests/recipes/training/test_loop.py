from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.storage.posterior import read_card
from bayeslayers.storage.training_state import load_checkpoint, save_checkpoint
from recipes.data.augmentation import Augmentation
from recipes.data.split import batches, load_split
from recipes.reports.measure import EvaluationRequest
from recipes.reports.verify import record, verify
from recipes.tasks.classification import Classification, check_classes, train
from recipes.tasks.evaluate import evaluate
from recipes.tasks.images import Config, read_splits
from recipes.training.config import Evaluation, Laplace
from recipes.training.loop import Training, interruption
from recipes.training.methods import make_optimizer
from recipes.training.schedules import Schedule

VOGN = {"name": "vogn", "lr": 0.3, "precision_lr": 0.05, "init_precision": 1e3, "temperature": 0.1}


def config(root, folder, **fields):
    given = Config(
        name="tiny",
        model={"name": "mlp", "widths": [12]},
        data="mnist",
        optimizer=VOGN,
        batch_size=32,  # 9 steps an epoch
        epochs=2,
        seed=1,
        evaluation=Evaluation(num_samples=3, epoch_samples=2, ood=["fashion-mnist"]),
        output=str(folder),
        data_root=str(root),
    )
    return dataclasses.replace(given, **fields)


def log_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupt_after(monkeypatch, steps, times=1):
    """Press Ctrl-C during a step of the next run."""
    step, count = Training._step, iter(range(1, 10**6))

    def pressed(self, x, y):
        step(self, x, y)
        if next(count) == steps:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Training, "_step", pressed)


@pytest.fixture(scope="module")
def whole(data_root, tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(config(data_root, folder), command="bayeslayers train tiny")
    return folder


def assert_same_run(folder, whole):
    assert_close(
        load_file(folder / "posterior/model.safetensors"),
        load_file(whole / "posterior/model.safetensors"),
        rtol=0,
        atol=0,
    )
    assert log_of(folder) == log_of(whole)
    assert (folder / "metrics.json").read_text() == (whole / "metrics.json").read_text()


def test_a_run_leaves_log_checkpoint_metrics_and_a_posterior(whole):
    assert [row["epoch"] for row in log_of(whole)] == [1, 2]
    columns = {f"{part}_{key}" for part in ("train", "test") for key in ("accuracy", "ece")} | {
        "train_loss",
        "test_nll",
    }
    assert set(log_of(whole)[0]) >= columns | {"lr", "temperature"}
    assert load_checkpoint(whole / "checkpoint.safetensors")["epoch"] == 2
    metrics = json.loads((whole / "metrics.json").read_text())
    assert (metrics["num_samples"], metrics["seed"], metrics["test_examples"]) == (3, 0, 100)
    assert 0 <= metrics["ood_auroc_fashion-mnist"] <= 1 and metrics["ood_auroc_fashion-mnist_epistemic"] > 0
    card = read_card(whole / "posterior")
    assert (card.name, card.dataset_size, card.temperature) == ("tiny", 300, 0.1)
    assert card.dataset == "mnist (300 train, 100 test)" and len(card.class_names) == 10
    assert card.optimizer == VOGN | {"batch_size": 32, "epochs": 2}
    assert card.recipe == "bayeslayers train tiny" and card.versions["torch"] == torch.__version__
    assert card.metrics == pytest.approx(metrics, abs=1e-5)
    assert not (whole / "tensorboard").exists()
    assert not [path for path in whole.iterdir() if path.name.startswith(".")]


def test_a_run_leaves_its_configuration_curves_and_a_report(whole):
    asked = json.loads((whole / "config.json").read_text())
    assert (asked["name"], asked["batch_size"], asked["optimizer"]) == ("tiny", 32, VOGN)
    with Image.open(whole / "curves.png") as curves:
        assert min(curves.size) > 300
    report, metrics = (json.loads((whole / name).read_text()) for name in ("report.json", "metrics.json"))
    assert report["command"] == "bayeslayers train tiny" and report["method"] == "sample"
    found = report["metrics"]
    assert (found["accuracy"], found["nll"]) == (metrics["accuracy"], metrics["nll"])
    auroc = "misclassification_auroc_confidence"  # which needs a mistake
    assert found.get(auroc) == metrics.get(auroc) and (found.get(auroc) is None) == (found["accuracy"] == 1)
    assert found["fashion-mnist/auroc_entropy"] == metrics["ood_auroc_fashion-mnist"]
    assert "measured after each epoch, by 2 draws of the weights" in (whole / "report.html").read_text()


def test_the_best_epoch_is_kept_beside_the_last(data_root, tmp_path):
    def bad_end(step, *rest):
        return 1.0 if step < 18 else 300.0

    given = config(data_root, tmp_path / "run", epochs=3, schedule=Schedule("constant"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Schedule, "factor", lambda self, step, *rest: bad_end(step))
        train(given)
    rows = log_of(tmp_path / "run")
    best = min(rows, key=lambda row: row["test_nll"])
    assert best["epoch"] == 2 and rows[2]["test_nll"] > 2 * best["test_nll"]
    card = read_card(tmp_path / "run/best")
    assert card.metrics["nll"] == pytest.approx(best["test_nll"], abs=1e-5) and card.metrics["num_samples"] == 2
    assert card.notes.startswith("Epoch 2 of 3, that of the lowest test_nll, ") and card.metrics["test_examples"] == 100
    kept, last = (load_file(tmp_path / f"run/{name}/model.safetensors") for name in ("best", "posterior"))
    assert not torch.equal(kept["output.weight"], last["output.weight"])


def test_the_best_epoch_is_chosen_by_examples_that_are_not_trained_on(data_root, tmp_path):
    train(config(data_root, tmp_path / "run", epochs=1, validation=60))
    assert "val_nll" in log_of(tmp_path / "run")[0] and "test_nll" not in log_of(tmp_path / "run")[0]
    assert read_card(tmp_path / "run/posterior").dataset_size == 240
    assert json.loads((tmp_path / "run/metrics.json").read_text())["test_examples"] == 100
    split = load_split("mnist", data_root, train=True)
    kept, held_out = split.held_out(60)
    assert (len(kept), len(held_out)) == (240, 60) and len(held_out.labels.unique()) == 10
    both = torch.cat([kept.images, held_out.images]).flatten(1).unique(dim=0)
    assert_close(both, split.images.flatten(1).unique(dim=0), rtol=0, atol=0)


def test_a_compiled_run_equals_an_ordinary_one(data_root, tmp_path, whole, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(model) or model)
    train(config(data_root, tmp_path / "run", compile=True))
    assert len(compiled) == 1
    assert_same_run(tmp_path / "run", whole)


def test_a_network_that_cannot_be_compiled_is_one_sentence(data_root, tmp_path, monkeypatch):
    def fail(*_):
        raise torch._dynamo.exc.BackendCompilerFailed(fail, RuntimeError("no C++ compiler\nfar"), None)

    monkeypatch.setattr(torch, "compile", lambda model, **options: fail)
    with pytest.raises(RuntimeError, match=r"^compile must be false .* got .*Add --compile false.$"):
        train(config(data_root, tmp_path / "run", compile=True))


@pytest.mark.parametrize("method", ["adam", "vogn"])
def test_a_loss_that_is_not_finite_stops_the_run(data_root, tmp_path, method):
    options = VOGN if method == "vogn" else {"name": "adam"}
    with pytest.raises(
        FloatingPointError, match=r"loss must be finite, got (nan|inf) in step \d of epoch 1, .*optimizer.lr"
    ):
        train(config(data_root, tmp_path / "run", optimizer=options | {"lr": 1e30}))


def test_metrics_stand_below_a_bar_of_eighty_columns(data_root, tmp_path, monkeypatch):
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr("recipes.training.shown.Console", lambda stderr: console)
    train(config(data_root, tmp_path / "run", epochs=1))
    assert re.search(r"epoch 1/1.* 9/9 .*0:00:00", text.getvalue())
    assert re.search(r"^lr \S+  temperature 0.1  loss [\d.]+  accuracy [\d.]+  ece [\d.]+\s*$", text.getvalue(), re.M)


def test_augmented_images_are_other_ones_each_epoch_and_the_same_after_a_resume(data_root, tmp_path, monkeypatch):
    crops = Augmentation(padding=3, flip=True)
    train(config(data_root, tmp_path / "whole", augmentation=crops))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 13)
        assert train(config(data_root, tmp_path / "run", augmentation=crops)) is None
    train(config(data_root, tmp_path / "run", augmentation=crops), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    train(config(data_root, tmp_path / "plain"))
    assert log_of(tmp_path / "plain")[0]["train_loss"] != log_of(tmp_path / "run")[0]["train_loss"]


def test_the_metrics_are_those_of_the_saved_posterior(whole, data_root):
    test = load_split("mnist", data_root, train=False)
    generator = torch.Generator().manual_seed(0)
    found = bl.predict(zoo.load(whole / "posterior"), test.inputs(slice(None)), 3, method="sample", generator=generator)
    accuracy = json.loads((whole / "metrics.json").read_text())["accuracy"]
    assert accuracy == pytest.approx(float((found.labels == test.labels).float().mean()))


def test_it_learns(data_root, tmp_path):
    metrics = train(config(data_root, tmp_path / "run", epochs=5))
    rows = log_of(tmp_path / "run")
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]
    assert metrics["accuracy"] > 0.9 and metrics["nll"] < 0.5
    last_steps = [0.3 * (1 + math.cos(math.pi * step / 45)) / 2 for step in range(8, 45, 9)]
    assert [row["lr"] for row in rows] == pytest.approx(last_steps)


def test_what_was_trained_on_crops_is_measured_on_the_middle_ever_after(data_root, tmp_path):
    evaluation = Evaluation(num_samples=16, epoch_samples=2, ood=["fashion-mnist"])
    crops = {"augmentation": Augmentation(resize=36, flip=True), "evaluation": evaluation}
    metrics = train(config(data_root, tmp_path / "run", epochs=1, **crops))
    folder = str(tmp_path / "run/posterior")
    assert read_card(folder).resize == 36
    request = EvaluationRequest(folder, ood=["fashion-mnist"], num_samples=16)
    assert Classification.card_metrics(evaluate(request, data_root)) == metrics
    assert [check for check in verify(folder, data_root) if not check.ok] == []
    record(folder)
    assert [check for check in verify(folder) if not check.ok] == []
    bl.save_posterior(zoo.load(folder), folder, name="whole", resize=None)
    assert [check for check in verify(folder) if not check.ok] != []
    assert Classification.card_metrics(evaluate(request, data_root))["nll"] != metrics["nll"]


def test_adam_trains_the_baseline_whose_metrics_a_posterior_shows(data_root, tmp_path):
    adam = config(
        data_root, tmp_path / "adam", optimizer={"name": "adam", "lr": 0.01}, epochs=1, schedule=Schedule("constant")
    )
    metrics = train(adam)
    assert not (tmp_path / "adam/posterior").exists() and metrics["num_samples"] == 1
    assert log_of(tmp_path / "adam")[0]["lr"] == pytest.approx(0.01)
    train(config(data_root, tmp_path / "run", epochs=1, baseline=str(tmp_path / "adam")))
    card = read_card(tmp_path / "run/posterior")
    assert card.baseline == {"optimizer": "adam"} | {key: round(value, 5) for key, value in metrics.items()}
    assert "| adam |" in (tmp_path / "run/posterior/README.md").read_text()


@pytest.mark.parametrize("method", [VOGN, {"name": "adam", "lr": 0.01}, {"name": "ivon", "lr": 0.1}])
def test_a_step_in_parts_equals_a_whole_one(data_root, tmp_path, method):
    for name, part in (("whole", None), ("parts", 12)):  # 12, 12 and 8 of 32
        train(config(data_root, tmp_path / name, epochs=1, optimizer=method, micro_batch=part))
    whole, parts = (log_of(tmp_path / name)[0] for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-3) and whole["train_loss"] < 2.3


def test_norms_can_be_spared_weight_decay():
    model = zoo.create("lenet5_bn")
    options = {"name": "sgd", "lr": 0.1, "weight_decay": 0.5, "decay_norms": False}
    optimizer = make_optimizer(options, model, 10, seed=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert_close(parameter.detach(), before[name] * (1.0 if name.startswith("bn") else 0.95))
    assert len(make_optimizer(options | {"decay_norms": True}, model, 10, seed=0).param_groups) == 1


def test_a_posterior_is_saved_however_it_is_measured(data_root, tmp_path):
    how = Evaluation(method="mean")
    train(config(data_root, tmp_path / "run[/x]", epochs=1, evaluation=how, seed=1234567890123))
    assert (tmp_path / "run[/x]/posterior").is_dir() and (tmp_path / "run[/x]/best").is_dir()


def test_the_card_says_the_temperature_that_a_warm_up_has_reached(data_root, tmp_path):
    train(config(data_root, tmp_path / "run", epochs=1, schedule=Schedule(temperature_steps=18, temperature_start=0.1)))
    assert read_card(tmp_path / "run/posterior").temperature == pytest.approx(0.1 * (0.1 + 0.9 * 8 / 18))


def test_a_run_goes_on_from_another_one_and_from_a_posterior(whole, data_root, tmp_path):
    still = {"name": "adam", "lr": 0.0}
    train(config(data_root, tmp_path / "run", start=str(whole), optimizer=still, epochs=1))
    state, first = (load_checkpoint(folder / "checkpoint.safetensors")["model"] for folder in (tmp_path / "run", whole))
    assert all(torch.equal(value, first[key]) for key, value in state.items())
    still = VOGN | {"lr": 0.0}
    train(config(data_root, tmp_path / "next", start=str(whole / "posterior"), optimizer=still, epochs=1))
    assert read_card(tmp_path / "next/posterior").optimizer["start"] == "posterior"  # no path of the machine
    state = load_checkpoint(tmp_path / "next/checkpoint.safetensors")["model"]
    assert all(torch.equal(state[key], first[key]) for key in state if key.endswith(("weight", "bias")))


def test_a_run_resumes_without_what_it_started_from(data_root, tmp_path, monkeypatch):
    adam = config(data_root, tmp_path / "first", optimizer={"name": "adam"}, epochs=1)
    train(adam)
    second = dataclasses.replace(adam, start=str(tmp_path / "first"), output=str(tmp_path / "second"))
    interrupt_after(monkeypatch, 4)
    assert train(second) is None
    shutil.rmtree(tmp_path / "first")
    assert train(second, resume=True)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("lenet5-mnist", "start must be of the run's model, mlp, got lenet5-mnist: "),
        ("nowhere", "start must be a run's folder, or a posterior, got nowhere: no folder has this name, and "),
        ("runs/a/b", "start must be a run's folder, or a posterior, got runs/a/b: no folder has this name, and "),
    ],
)
def test_what_a_run_cannot_go_on_from_is_refused(start, message, data_root, tmp_path):
    with pytest.raises((ValueError, OSError), match=f"^{message}"):
        train(config(data_root, tmp_path / "run", start=start))
    assert not (tmp_path / "run").exists()


def test_the_card_of_a_laplace_approximation_says_so(data_root, tmp_path):
    laplace = Laplace(prior_precision=3.0, temperature=0.5)
    adam = {"name": "adam", "lr": 0.01}
    linearised = Evaluation(num_samples=3, ood=[], method="linearised")
    train(
        config(data_root, tmp_path / "run", optimizer=adam, epochs=1, laplace=laplace, evaluation=linearised, limit=90)
    )
    card = read_card(tmp_path / "run/posterior")
    assert card.method == "linearised" and 'method="linearised"' in (tmp_path / "run/posterior/README.md").read_text()
    card = record(tmp_path / "run/posterior")
    checks = verify(tmp_path / "run/posterior")
    assert all(check.ok and abs(check.claimed - check.measured) < 1e-4 for check in checks)
    bl.save_posterior(zoo.load(tmp_path / "run/posterior"), tmp_path / "sampled", method="sample")
    others = {check.metric: check.measured for check in verify(tmp_path / "sampled")}
    assert any(abs(check.measured - others[check.metric]) > 1e-2 for check in checks)
    assert card.temperature == 0.5 and card.optimizer["name"] == "adam"
    assert card.optimizer["laplace"] == {"prior_precision": 3.0, "last_layer": False, "temperature": 0.5}
    assert float(next(bl.posterior(zoo.load(tmp_path / "run/posterior"))).prior_precision) == 3.0


@pytest.mark.parametrize("steps", [4, 9, 13], ids=["in an epoch", "at its end", "in the second"])
def test_a_resumed_run_equals_an_uninterrupted_one(data_root, tmp_path, whole, monkeypatch, steps):
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps)
        assert train(config(data_root, tmp_path / "run")) is None
    assert load_checkpoint(tmp_path / "run/checkpoint.safetensors")["step"] == steps % 9
    assert not (tmp_path / "run/posterior").exists()
    torch.manual_seed(123)  # as another process would find it
    assert train(config(data_root, tmp_path / "run"), resume=True) is not None
    assert_same_run(tmp_path / "run", whole)


def test_a_run_resumed_in_another_process_equals_an_uninterrupted_one(data_root, tmp_path, whole, monkeypatch):
    given = config(data_root, tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 13)
        train(given)
    (tmp_path / "tiny.yaml").write_text(json.dumps(dataclasses.asdict(given)))
    words = [sys.executable, "-m", "recipes.cli", "train", str(tmp_path / "tiny.yaml"), "--resume"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", whole)


def test_ctrl_c_in_the_last_step_stops_before_the_measurement(data_root, tmp_path, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 18)
        assert train(config(data_root, tmp_path / "run")) is None
    assert "stopped and saved before it was measured; continue with --resume" in capsys.readouterr().err
    assert not (tmp_path / "run/posterior").exists()
    assert train(config(data_root, tmp_path / "run"), resume=True) is not None
    assert_same_run(tmp_path / "run", whole)


def test_ctrl_c_in_the_measurement_leaves_the_training_saved(data_root, tmp_path, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("recipes.tasks.posterior_task.measure", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert train(config(data_root, tmp_path / "run")) is None
    assert "stopped and saved before it was measured; continue with --resume" in capsys.readouterr().err
    assert train(config(data_root, tmp_path / "run"), resume=True) is not None
    assert_same_run(tmp_path / "run", whole)


def test_a_finished_run_can_be_measured_again(data_root, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/metrics.json").unlink()
    shutil.rmtree(tmp_path / "run/posterior")
    train(config(data_root, tmp_path / "run"), resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_the_second_ctrl_c_raises(data_root, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with interruption() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    interrupt_after(monkeypatch, 3, times=2)
    with pytest.raises(KeyboardInterrupt):
        train(config(data_root, tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "run/checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be an integer >= 1, got 0"),
        ({"batch_size": -1}, ValueError, "batch_size must be an integer >= 1, got -1"),
        ({"limit": 0}, ValueError, "limit must be an integer >= 1, got 0"),
        ({"validation": -1}, ValueError, "validation must be .*>= 0, got -1"),
        ({"validation": 300}, ValueError, "validation must leave training examples, got 300 of 300"),
        ({"augmentation": Augmentation(padding=-1)}, ValueError, "augmentation.padding must be .*>= 0, got -1"),
        (
            {"augmentation": Augmentation(padding=28, border="reflect")},
            ValueError,
            "augmentation.padding must be < 28, the image that it reflects, got 28",
        ),
        (
            {"augmentation": Augmentation(border="reflected")},
            ValueError,
            "augmentation.border must be 'zeros' or 'reflect', got 'reflected'",
        ),
        (
            {"augmentation": Augmentation(resize=20)},
            ValueError,
            r"augmentation.resize must .* 8 times .*28, 28",
        ),
        ({"micro_batch": 0}, ValueError, "micro_batch must be an integer >= 1, got 0"),
        (
            {"model": {"name": "mlp", "num_classes": 7}},
            ValueError,
            "each of the model's 7 outputs, got 10. Set model.num",
        ),
        ({"model": {"name": "mlp", "input_size": [784]}}, ValueError, r"must take images .* got one for .* \(784,\)"),
        ({"optimizer": VOGN | {"vectorise": True}}, ValueError, "optimizer.vectorise must be false here"),
        ({"optimizer": {"name": "kfac"}, "compile": True}, ValueError, "compile must be false under fisher: sampled"),
        ({"device": "gpu"}, ValueError, "device must be one that torch reaches, got 'gpu': "),
        ({"limit": -5}, ValueError, "limit must be an integer >= 1, got -5"),
        (
            {"schedule": Schedule("cosin")},
            ValueError,
            "one of cosine, constant, step, exponential, trapezoid, got 'cosin'. Did you mean 'cosine'",
        ),
        ({"optimizer": {"name": "vong"}}, ValueError, "one of vogn, .*got 'vong'. Did you mean 'vogn'"),
        ({"optimizer": {}}, ValueError, "optimizer must be one of vogn, .*got None"),
        ({"optimizer": VOGN | {"lr": -1.0}}, ValueError, "lr must be a finite number >= 0, got -1.0"),
        ({"optimizer": VOGN | {"lr": "fast"}}, TypeError, "lr must be a number, got 'fast'"),
        ({"optimizer": VOGN | {"temperature": 0}}, ValueError, "temperature must be a finite number > 0, got 0"),
        (
            {"optimizer": VOGN | {"name": "adam"}},
            ValueError,
            "optimizer 'adam' must get arguments among lr, betas, .*, got precision_lr, init_precision, temperature. "
            "To drop .* --optimizer '{name: adam, lr: 0.001}'",
        ),
        ({"optimizer": {"name": "sgd", "momentunm": 0.9}}, ValueError, "got momentunm. Did you mean 'momentum'"),
        ({"optimizer": VOGN | {"groups": []}}, ValueError, "optimizer 'vogn' must get arguments among .*, got groups"),
        (
            {"optimizer": {"name": "adam", "lr": "abc"}, "data": "minst"},  # before any data is read
            ValueError,
            "optimizer must have options that torch's Adam takes, got {'lr': 'abc'}: ",
        ),
        ({"optimizer": {"name": "adam", "betas": 0.9}}, ValueError, "got {'betas': 0.9}: 'float' object is not"),
        ({"optimizer": {"name": "adam", "betas": []}}, ValueError, "got {'betas': .*}: list index out of range"),
        (
            {"optimizer": {"name": "adam"}, "schedule": Schedule(temperature_steps=9)},
            ValueError,
            "schedule.temperature_steps must be 0 for adam, which has no temperature, got 9",
        ),
        ({"seed": 10**22}, ValueError, "^seed must be an integer from .*, got 10000000000000000000000"),
        ({"evaluation": Evaluation(seed=-(10**22))}, ValueError, "evaluation.seed must be an integer from .*, got -1"),
        ({"model": {"widths": [12]}}, ValueError, r"model must have a name, as lenet5, got {'widths': \[12\]}"),
        ({"model": {"name": 3}}, ValueError, "model must have a name, as lenet5, got {'name': 3}"),
        (
            {"model": {"name": "lenet5", "input_size": 3}},
            TypeError,
            "input_size of model 'lenet5' must be a list, got 3",
        ),
        ({"model": {"name": "mlp", "mean": 0.5}}, TypeError, "mean of model 'mlp' must be a list, got 0.5"),
        ({"evaluation": Evaluation(method="dropout")}, ValueError, "model must have nn.Dropout modules"),
        ({"evaluation": Evaluation(method="smaple")}, ValueError, "evaluation.method must be .*Did you mean 'sample'"),
        (
            {"optimizer": {"name": "adam"}, "evaluation": Evaluation(method="sample")},
            ValueError,
            "evaluation.method must be one of mean, dropout after this training, got 'sample'",
        ),
        (
            {"laplace": Laplace()},
            ValueError,
            "laplace must follow the training of a point estimate, got optimizer 'vogn'",
        ),
        (
            {"optimizer": {"name": "adam"}, "laplace": Laplace(temperature=0)},
            ValueError,
            "laplace.temperature must be a finite number > 0, got 0",
        ),
        ({"data": "minst"}, ValueError, "unknown data set 'minst'. Did you mean 'mnist'"),
        ({"data_root": "no/such"}, FileNotFoundError, "data root must hold MNIST .* got no/such without it"),
        ({"model": {"name": "mpl"}}, ValueError, "unknown model 'mpl'"),
        ({"baseline": "no/such"}, FileNotFoundError, "a finished run, got no/such without metrics.json"),
        ({"evaluation": Evaluation(num_samples=0)}, ValueError, "evaluation.num_samples must be an integer >= 1"),
        ({"evaluation": Evaluation(epoch_samples=0)}, ValueError, "evaluation.epoch_samples must be an integer"),
        ({"evaluation": Evaluation(batch_size=0)}, ValueError, "evaluation.batch_size must be an integer >= 1"),
        ({"evaluation": Evaluation(ood=["minst"])}, ValueError, "unknown data set 'minst'"),
        (
            {"evaluation": Evaluation(ood=["npz:no/such.npz"])},
            FileNotFoundError,
            "evaluation.ood must be an .npz file, got no/such.npz",
        ),
    ],
)
def test_a_refused_run_writes_nothing(data_root, tmp_path, fields, error, message):
    with pytest.raises(error, match=message) as caught:
        train(dataclasses.replace(config(data_root, tmp_path / "run"), **fields))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("model", "method"), [("lenet5_mcdropout", "dropout"), ("mlp", "sample"), ("mlp", "local")])
def test_looking_at_the_model_first_leaves_the_draws_of_training(model, method, data_root):
    net = zoo.create(model)
    splits = read_splits(config(data_root, "run"), (1, 28, 28))
    before = torch.get_rng_state()
    check_classes(net, splits, method)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["npz", "imagefolder"])
def test_images_that_are_trained_on_are_no_test(kind, tmp_path):
    place = tmp_path / kind
    images = np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    for number, image in enumerate(images):
        (folder := place / "all" / str(number)).mkdir(parents=True)
        Image.fromarray(image).save(folder / "0.png")
    np.savez(place / "all.npz", images=images, labels=range(10))
    data = f"npz:{place}/all.npz" if kind == "npz" else f"imagefolder:{place}/all"
    with pytest.raises(
        ValueError, match=r"^data must have a test split of its own, got .*all.*, whose training images"
    ):
        train(config(None, tmp_path / "run", data=data, evaluation=Evaluation(num_samples=2)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("left", ["checkpoint.safetensors", "log.csv", "metrics.json", "report.json"])
def test_a_run_is_not_overwritten(data_root, tmp_path, whole, left):
    (tmp_path / "run").mkdir()
    shutil.copy(whole / left, tmp_path / "run")
    before = files_of(tmp_path / "run")
    advice = "Add --resume or choose another" if left.startswith("checkpoint") else "Choose another"
    with pytest.raises(FileExistsError, match=f"a new run, got .* with {left}. {advice}"):
        train(config(data_root, tmp_path / "run"))
    assert files_of(tmp_path / "run") == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"output must be a folder, got .*, which is a file"):
        train(config(data_root, tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("content", ["", "[]", '{"accuracy": "high"}'])
def test_a_baseline_without_metrics_is_one_sentence(data_root, tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(FileNotFoundError, match=r"baseline must be a finished run, got .* without config.json"):
        train(config(data_root, tmp_path / "run", baseline=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"optimizer": {"name": "adam"}, "data": "mnist", "epochs": 1}')
    with pytest.raises(ValueError, match=r"a finished run, got .* whose metrics.json or config.json is damaged"):
        train(config(data_root, tmp_path / "run", baseline=str(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"optimizer": VOGN | {"lr": 0.1}},
            "optimizer must be as in the run .*'lr': 0.3.* got .*'lr': 0.1",
        ),
        ({"epochs": 3}, "epochs must be as in the run to resume, 2, got 3"),
        ({"seed": 2}, "seed must be as in the run to resume, 1, got 2"),
        ({"model": {"name": "mlp"}}, "model must be as in the run to resume"),
    ],
)
def test_another_configuration_is_not_resumed(data_root, whole, fields, message):
    before = files_of(whole)
    with pytest.raises(ValueError, match=message):
        train(config(data_root, whole, **fields), resume=True)
    assert files_of(whole) == before


def test_a_damaged_or_missing_checkpoint_is_not_resumed(data_root, tmp_path, whole):
    with pytest.raises(bl.PosteriorError, match="must be a training checkpoint, got no such file"):
        train(config(data_root, tmp_path / "none"), resume=True)
    (tmp_path / "run").mkdir()
    data = (whole / "checkpoint.safetensors").read_bytes()
    (tmp_path / "run/checkpoint.safetensors").write_bytes(data[:-100])
    with pytest.raises(bl.PosteriorError, match="damaged or other file"):
        train(config(data_root, tmp_path / "run"), resume=True)
    assert files_of(tmp_path / "run") == {tmp_path / "run/checkpoint.safetensors": data[:-100]}


@pytest.mark.parametrize("content", [b"", b"x", b"\0\0\x08\x03" + b"\0\0\0\x09" * 3, b"\0\0\x08\x05" + b"\xff" * 40])
def test_damaged_data_is_one_sentence(data_root, tmp_path, content):
    shutil.copytree(data_root, tmp_path / "data")
    (tmp_path / "data/MNIST/raw/train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match="MNIST must be as torchvision lays it out, got a damaged file"):
        load_split("mnist", tmp_path / "data", train=True)


def test_labels_that_do_not_match_the_images_are_one_sentence(data_root, tmp_path):
    shutil.copytree(data_root, tmp_path / "data")
    raw = tmp_path / "data/MNIST/raw"
    shutil.copy(raw / "t10k-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")
    with pytest.raises(ValueError, match="MNIST must have a label per image, got 100 for 300"):
        load_split("mnist", tmp_path / "data", train=True)


def test_batches_are_a_new_order_each_epoch_that_seed_and_epoch_fix(data_root):
    split = load_split("mnist", data_root, train=True)
    labels = torch.arange(300)
    split = dataclasses.replace(split, labels=labels)

    def order(epoch, start=0):
        return [y.tolist() for _, y in batches(split, 32, 0, epoch, start)]

    assert order(1) == order(1) != order(2)
    assert order(1, 4) == order(1)[4:]
    assert len(order(1)) == 9 and len({y for batch in order(1) for y in batch}) == 288
    assert [len(y) for _, y in batches(split.limited(20), 32, 0, 0)] == [20]
    x, y = next(batches(split, 32, 0, 0))
    assert_close(x, split.images[y].float() / 255)


STATE = {
    "model": {"weight": torch.randn(2, 3), "count": torch.tensor(4), "half": torch.ones(2, dtype=torch.bfloat16)},
    0: [1, 2.5, "x", None, True, (1, (2,))],
    "floats": [math.inf, -math.inf, 0.1, 1e-300],
    (1, "a"): torch.empty(0, 2),
    None: {"flags": torch.tensor([True, False])},
}


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        assert_same(list(found.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, torch.Tensor):
        assert_close(found, expected, rtol=0, atol=0)
    else:
        assert found == expected


def test_a_training_state_comes_back_as_it_was(tmp_path):
    save_checkpoint(tmp_path / "c", STATE)
    assert_same(load_checkpoint(tmp_path / "c"), STATE)
    save_checkpoint(tmp_path / "c", {"nan": math.nan})
    assert math.isnan(load_checkpoint(tmp_path / "c")["nan"])


def test_optimizer_and_schedule_continue_from_their_state(tmp_path):
    def network(seed=0):
        torch.manual_seed(seed)
        return zoo.create("mlp", widths=[5], input_size=[1, 4, 4], num_classes=3)

    def run(steps, resume_after=None):
        model = network()
        optimizer = bl.VOGN(model, 10, lr=0.1, generator=torch.Generator().manual_seed(0))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        for step in range(steps):
            if step == resume_after:
                parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
                save_checkpoint(tmp_path / "c", {name: part.state_dict() for name, part in parts.items()})
                model = network(seed=9)
                optimizer = bl.VOGN(model, 10, lr=0.5, generator=torch.Generator())
                scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
                for name, part in {"model": model, "optimizer": optimizer, "scheduler": scheduler}.items():
                    part.load_state_dict(load_checkpoint(tmp_path / "c")[name])
            with optimizer.sampled():
                nn.functional.cross_entropy(model(torch.ones(2, 1, 4, 4)), torch.tensor([0, 1])).backward()
            optimizer.step()
            scheduler.step()
        return model.state_dict()

    assert_close(run(5, resume_after=3), run(5), rtol=0, atol=0)


def test_any_flipped_byte_of_a_training_state_is_noticed(tmp_path):
    save_checkpoint(tmp_path / "c", STATE)
    whole = (tmp_path / "c").read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (tmp_path / "d").write_bytes(damaged)
        with pytest.raises(bl.PosteriorError, match="must be a training checkpoint, got a damaged or other file"):
            load_checkpoint(tmp_path / "d")


@pytest.mark.parametrize("content", [b"", b"hello", to_bytes({"a": torch.ones(2)}), None])
def test_what_is_no_training_state_is_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "c").write_bytes(content)
    with pytest.raises(bl.PosteriorError, match="must be a training checkpoint, got"):
        load_checkpoint(tmp_path / "c")


def test_a_state_that_cannot_be_stored_leaves_the_old_one(tmp_path):
    save_checkpoint(tmp_path / "c", {"a": 1})
    with pytest.raises(TypeError, match="state must hold tensors and plain values, got function"):
        save_checkpoint(tmp_path / "c", {"a": lambda: 1})
    assert load_checkpoint(tmp_path / "c") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_events_are_written_where_they_are_asked_for(data_root, tmp_path):
    asked = config(data_root, tmp_path / "run", epochs=1, limit=64, tensorboard=True)
    train(asked, command="bayeslayers train tiny")
    assert [path.stat().st_size > 100 for path in (tmp_path / "run/tensorboard").iterdir()] == [True]


def test_events_without_their_package_are_an_error_before_the_training(data_root, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.training.config.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tensorboard must be installed.*pip install 'bayeslayers\[tensorboard\]'"):
        train(config(data_root, tmp_path / "run", tensorboard=True), command="")
    assert not (tmp_path / "run").exists()
