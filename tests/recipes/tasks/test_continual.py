"""A run over a sequence of tasks: what it leaves, that it resumes within and between tasks, and what it rejects."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import quick
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.storage.posterior import read_card
from recipes.cli import main
from recipes.cli.train import CONFIGS
from recipes.data import task_sequence
from recipes.data.examples import Points
from recipes.data.split import Split
from recipes.reports.compare import compare
from recipes.reports.measure import EvaluationRequest
from recipes.reports.verify import record, verify
from recipes.tasks.continual import Config, Continual
from recipes.tasks.evaluate import evaluate, task_of
from recipes.tasks.penalty import Penalised, remember
from recipes.training.config import Evaluation
from recipes.training.loop import Training

pytestmark = pytest.mark.usefixtures("one_thread")
VOGN = {"name": "vogn", "lr": 0.1, "precision_lr": 0.02, "prior_precision": 5.0, "init_precision": 5e3}
VOGN |= {"temperature": 0.01}  # the examples are few
KFAC = {"name": "noisykfac", "lr": 0.1, "prior_precision": 5.0, "inverse_every": 5, "temperature": 0.01}
ADAM = {"name": "adam", "lr": 1e-2}
SMALL = {"name": "mlp", "input_size": [784], "widths": [8], "mean": [0.2], "std": [0.3]}


def bars(name, root, *, train):
    """Return images of ten classes: a bright bar whose row tells the class."""
    generator = torch.Generator().manual_seed(int(train))
    labels = torch.arange(120 if train else 60) % 10
    images = torch.randint(80, (len(labels), 1, 28, 28), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 2 * label + 3 : 2 * label + 5] = 255
    return Split(images, labels, [str(k) for k in range(10)])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    quick(monkeypatch)
    monkeypatch.setattr(task_sequence, "load_split", bars)


def config(folder, **fields):
    given = Config(
        name="tiny",
        model={"name": "mlp", "input_size": [784], "widths": [16], "mean": [0.2], "std": [0.3]},
        data="permuted-mnist",
        tasks=3,
        strength=2.0,
        optimizer=VOGN,
        batch_size=20,
        epochs=6,
        evaluation=Evaluation(num_samples=4, epoch_samples=2),
        output=str(folder),
        device="cpu",
    )
    return dataclasses.replace(given, **fields)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("continual") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        patch.setattr(task_sequence, "load_split", bars)
        metrics = Continual(config(folder)).train(command="bayeslayers train tiny")
    return folder, metrics


def rows_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def test_a_run_leaves_accuracies_of_each_task_and_what_every_run_does(whole):
    folder, metrics = whole
    names = {path.name for path in folder.iterdir()}
    expected = "checkpoint.safetensors config.json curves.png log.csv metrics.json posterior report.html report.json"
    assert names == set(expected.split())
    rows = rows_of(folder)
    assert len(rows) == 6
    for epoch, row in enumerate(rows):
        seen = [not math.isnan(row[f"test_task{task}_accuracy"]) for task in range(3)]
        assert seen == [task <= epoch // 2 for task in range(3)]
    after = [rows[2 * task + 1] for task in range(3)]
    change = [after[2][f"test_task{task}_accuracy"] - after[task][f"test_task{task}_accuracy"] for task in range(2)]
    assert metrics["backward_transfer"] == pytest.approx(sum(change) / 2)
    assert metrics["accuracy"] > 0.6 and metrics["test_examples"] == 180
    assert metrics == json.loads((folder / "metrics.json").read_text())
    page = (folder / "report.html").read_text()
    assert "Average accuracy after the last task" in page and "Accuracy by task" in page


def test_its_posterior_predicts_permuted_images_and_its_prior_is_that_of_the_tasks_before(whole):
    folder, metrics = whole
    model, card = zoo.load(folder / "posterior"), read_card(folder / "posterior")
    assert card.dataset == "permuted-mnist (360 train, 180 test, first 3 tasks)" and "backward transfer" in card.notes
    assert "backward_transfer" not in card.metrics and card.metrics["accuracy"] == round(metrics["accuracy"], 5)
    test = bars("mnist", None, train=False)
    right = [
        bl.predict(model, test.inputs(slice(None)).flatten(1)[:, zoo.permutation(task)], 16,
                   generator=torch.Generator().manual_seed(0)).labels == test.labels
        for task in range(3)
    ]  # fmt: skip
    assert float(torch.stack(right).double().mean()) == pytest.approx(metrics["accuracy"], abs=0.1)
    site = next(bl.posterior(model))
    assert site.prior_is_posterior and float(site.prior_precision.max()) > 10 * VOGN["prior_precision"]


def stopped_after(steps, patch):
    step, count = Training._step, iter(range(1, 99))

    def pressed(self, x, y):
        step(self, x, y)
        if next(count) == steps:
            os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(Training, "_step", pressed)


@pytest.mark.parametrize(
    ("optimizer", "steps"),  # within a task, at its end, within the next, within the last
    [(VOGN, 5), (VOGN, 12), (VOGN, 14), (VOGN, 30), (KFAC, 14)],
)
def test_it_is_stopped_and_resumed_bit_for_bit(steps, optimizer, whole, tmp_path, capsys):
    if optimizer is VOGN:
        reference, metrics = whole
    else:
        reference = tmp_path / "whole"
        metrics = Continual(config(reference, optimizer=KFAC)).train(command="bayeslayers train tiny")
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(steps, patch)
        assert Continual(config(tmp_path / "run", optimizer=optimizer)).train() is None
    assert "stopped and saved in epoch" in capsys.readouterr().err
    again = Continual(config(tmp_path / "run", optimizer=optimizer)).train(
        resume=True, command="bayeslayers train tiny"
    )
    assert again == metrics
    found, expected = (load_file(run / "posterior/model.safetensors") for run in (tmp_path / "run", reference))
    assert_close(found, expected, rtol=0, atol=0)
    for row, other in zip(rows_of(tmp_path / "run"), rows_of(reference), strict=True):
        assert_close(list(row.values()), list(other.values()), rtol=0, atol=0, equal_nan=True)


def test_tasks_of_several_sizes_and_a_head_each(tmp_path):
    model = {"name": "multi_head_mlp", "widths": [16], "mean": [0.2], "std": [0.3]}
    fields = {"data": "split-mnist", "tasks": 5, "model": model, "epochs": 20, "batch_size": 8}
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(25, patch)  # within the third task: 3 steps an epoch, 4 epochs a task
        assert Continual(config(tmp_path, **fields)).train() is None
    metrics = Continual(config(tmp_path, **fields)).train(resume=True)
    assert metrics["accuracy"] > 0.9 and metrics["test_examples"] == 60
    model = zoo.load(tmp_path / "posterior")
    x = torch.cat([torch.rand(4, 784), torch.full((4, 1), 3.0)], 1)
    probs = bl.predict(model, x, 2).probs
    assert (probs[:, [0, 1, 2, 3, 4, 5, 8, 9]] == 0).all() and (probs[:, 6:8] > 0).all()


def test_validation_holds_out_examples_of_each_task(tmp_path):
    Continual(config(tmp_path / "run", validation=20, epochs=3)).train()
    row = rows_of(tmp_path / "run")[-1]
    assert {"val_accuracy", "val_task2_accuracy"} <= row.keys() and "test_accuracy" not in row


# Baselines.


def test_baselines_of_a_point_estimate_forget_less_than_nothing_does(tmp_path):
    found = {}
    for penalty, strength in ((None, 1.0), ("l2", 20.0), ("ewc", 50.0)):
        folder = tmp_path / str(penalty)
        fields = {"optimizer": ADAM, "penalty": penalty, "strength": strength, "epochs": 30, "model": SMALL}
        found[penalty] = Continual(config(folder, **fields)).train()["backward_transfer"]
        assert not (folder / "posterior").exists()
    assert found["l2"] > found[None] + 0.01 and found["ewc"] > found[None] + 0.01


def test_the_penalty_is_minus_the_log_density_of_the_prior():
    net = bl.BayesLinear(2, 3)
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    loss = Penalised(bl.Categorical(), net, 10).loss(net(x), y)
    assert_close(loss, bl.Categorical().loss(net(x), y), rtol=0, atol=0)  # no task before
    remember(net, Points(x, y), "l2", 3.0, torch.Generator())
    net.weight.data += 0.5
    loss = Penalised(bl.Categorical(), net, 10).loss(net(x), y)
    assert_close(loss - bl.Categorical().loss(net(x), y), torch.tensor(3.0 * 6 * 0.25 / 20))


def test_online_ewc_adds_the_fisher_information_of_a_task_to_what_it_holds_already():
    torch.manual_seed(0)
    net = bl.BayesLinear(2, 3)
    data = Points(torch.randn(40, 2), torch.arange(40) % 3)
    before = float(net.weight_prior_precision)
    remember(net, data, "ewc", 1.0, torch.Generator().manual_seed(0))
    first = net.weight_prior_precision.clone()
    remember(net, data, "ewc", 1.0, torch.Generator().manual_seed(0))
    assert (first > before).all()
    assert_close(net.weight_prior_precision - first, first - before)


# What else a run is good for, and what is rejected.


def test_a_posterior_is_evaluated_verified_and_compared(whole):
    folder, _ = whole
    card = read_card(folder / "posterior")
    assert task_of(card) is Continual
    result = evaluate(EvaluationRequest(str(folder / "posterior"), num_samples=4, limit=20))
    assert result.evaluation.num_examples == 3 * 20 and "0: " in result.sections[0].text
    with pytest.raises(ValueError, match="ood must be empty"):
        evaluate(EvaluationRequest(str(folder / "posterior"), ood=["mnist"]))
    record(folder / "posterior")
    checks = verify(folder / "posterior")
    assert {check.metric for check in checks} >= {"accuracy", "nll", "kl"} and all(check.ok for check in checks)
    table = compare([folder]).to_markdown()
    assert "average accuracy" in table and "backward transfer" in table


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 7}, "epochs must be a multiple of the 3 tasks, which share them, got 7"),
        ({"tasks": 11}, "tasks must be from 1 to the 10 of permuted-mnist, got 11"),
        ({"tasks": 0}, "tasks must be from 1"),
        ({"data": "mnist"}, "unknown sequence of tasks 'mnist'. Did you mean"),
        ({"strength": 0.0}, "strength must be a finite number > 0"),
        ({"penalty": "ewx", "optimizer": ADAM}, "penalty must be one of l2, ewc, got 'ewx'. Did you mean 'ewc'"),
        ({"penalty": "ewc"}, "penalty must be left out for optimizer 'vogn'"),
        ({"compile": True}, "compile must be left out of a sequence of tasks"),
        ({"evaluation": Evaluation(ood=["mnist"])}, "evaluation.ood must be empty"),
        ({"model": {"name": "lenet5"}}, "model.input_size must be"),
    ],
)
def test_a_configuration_that_cannot_run_is_rejected(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Continual(config(tmp_path / "run", **fields)).train()


def test_the_shipped_configurations_are_of_this_task_and_pass_its_checks(monkeypatch):
    files = [path for folder in ("permuted-mnist", "split-mnist") for path in sorted((CONFIGS / folder).glob("*.yaml"))]
    assert {file.stem for file in files} == set("mlp_noisykfac mlp_vogn mlp_ivon mlp_adam mlp_l2 mlp_ewc".split()) | {
        "heads_vogn",
        "heads_noisykfac",
    }
    for file in files:
        found = []
        monkeypatch.setattr("recipes.tasks.task.Task.train", lambda task, *_, found=found: found.append(task) or {})
        assert main(["train", f"{file.parent.name}/{file.stem}"]) == 0
        assert isinstance(found[0], Continual) and found[0].config.data == file.parent.name
        found[0].check()
