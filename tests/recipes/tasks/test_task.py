"""A new task is one file: everything of a run works for it as for the others."""

from __future__ import annotations

import csv
import json
import math
import os
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.tiny import quick
from support.tiny_task import Config, Line
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.storage.posterior import read_card
from recipes.cli import main
from recipes.cli import train as command
from recipes.reports.compare import compare
from recipes.reports.compare_figure import draw
from recipes.reports.measure import EvaluationRequest
from recipes.tasks.evaluate import evaluate, task_of
from recipes.tasks.table import TASKS
from recipes.training.loop import Training

pytestmark = pytest.mark.usefixtures("one_thread")


SEED = 3


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    quick(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("line") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        metrics = Line(config(folder)).train(command="bayeslayers train line")
    return folder, metrics


def config(folder, **fields):
    return Config(**{"output": str(folder), "epochs": 6, "seed": SEED, **fields})


def rows_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def test_a_task_of_one_file_leaves_the_folder_of_a_run(whole):
    folder, metrics = whole
    names = {path.name for path in folder.iterdir()}
    assert names == set(
        "best checkpoint.safetensors config.json curves.png log.csv metrics.json posterior report.html "
        "report.json".split()
    )
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert 0.05 < metrics["rmse"] < 0.8 and metrics["test_examples"] == 30 and "accuracy" not in metrics
    assert metrics["ood_auroc_far"] > 0.9 and 0 <= metrics["ood_auroc_far_epistemic"] <= 1
    first, *_, last = rows_of(folder)
    assert {"train_loss", "train_mae", "test_rmse", "test_nll", "test_crps", "lr"} <= first.keys()
    assert last["test_rmse"] < 0.7 * first["test_rmse"] and last["train_mae"] < first["train_mae"]


def test_its_posterior_has_a_card_and_predicts_what_was_measured(whole):
    folder, metrics = whole
    card, model = read_card(folder / "posterior"), zoo.load(folder / "posterior")
    assert (card.likelihood, card.name, card.dataset) == ("gaussian", "line", "line (40 train, 30 test)")
    assert card.metrics["rmse"] == round(metrics["rmse"], 5) and not card.class_names
    test = Line(config(folder)).read_splits().test
    prediction = bl.predict(model, test.x, 8, generator=torch.Generator().manual_seed(0))
    assert_close(float((prediction.mean - test.labels).square().mean().sqrt()), metrics["rmse"], rtol=1e-5, atol=0)


def test_its_report_shows_its_metrics_and_its_section(whole):
    page = (whole[0] / "report.html").read_text()
    assert "rmse" in page and "Root mean squared error" in page and "The largest residual is" in page
    assert "far/<wbr>auroc" in page and "mutual information" not in page and "Reliability" not in page
    assert json.loads((whole[0] / "report.json").read_text())["metrics"]["rmse"] == whole[1]["rmse"]


def stopped_after(steps, patch):
    step, count = Training._step, iter(range(1, 99))

    def pressed(self, x, y):
        step(self, x, y)
        if next(count) == steps:
            os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(Training, "_step", pressed)


@pytest.mark.parametrize("steps", [3, 5, 17])
def test_it_is_stopped_by_ctrl_c_and_resumed_bit_for_bit(steps, whole, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(steps, patch)
        assert Line(config(tmp_path / "run")).train() is None
    assert "stopped and saved in epoch" in capsys.readouterr().err
    metrics = Line(config(tmp_path / "run")).train(resume=True, command="bayeslayers train line")
    assert metrics == whole[1] and rows_of(tmp_path / "run") == rows_of(whole[0])
    found, expected = (load_file(run / "posterior/model.safetensors") for run in (tmp_path / "run", whole[0]))
    assert_close(found, expected, rtol=0, atol=0)


def test_its_runs_are_compared_by_its_own_metrics(whole, tmp_path):
    other = tmp_path / "other"
    Line(config(other, seed=3, slope=2.5)).train()
    comparison = compare([whole[0], other])
    found = comparison.rows()
    assert [row["rmse"] for row in found] == [
        json.loads((run / "metrics.json").read_text())["rmse"] for run in (whole[0], other)
    ]
    assert "accuracy" not in found[0] and found[0]["method"] == "ivon" and math.isfinite(found[0]["ood_auroc_far"])
    table = comparison.to_markdown()
    assert "RMSE" in table and "AUROC far" in table and "accuracy" not in table
    best = min(found, key=lambda row: row["rmse"])["rmse"]
    assert f"**{best:.4f}**" in table  # the lowest
    figure = draw(comparison.runs)
    assert [axis.get_title() for axis in figure.axes] == ["RMSE", "NLL (test)"]
    assert figure.axes[0].get_ylabel() == "RMSE (m), log scale"


@pytest.fixture
def new_options():
    """The options of `train` are found again, with those of the tasks that the table has in the test."""
    command._fields.cache_clear()
    yield
    command._fields.cache_clear()


def test_the_command_line_finds_it_by_one_line_of_the_table(whole, tmp_path, monkeypatch, capsys, new_options):
    monkeypatch.setitem(TASKS, "line", lambda: Line)
    file = tmp_path / "line.yaml"
    file.write_text(yaml.safe_dump({"recipe": "line", "epochs": 6, "seed": SEED}))
    assert main(["train", str(file), "--output", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == whole[1]
    posterior = str(tmp_path / "run/posterior")
    assert task_of(read_card(posterior)) is Line
    result = evaluate(EvaluationRequest(posterior, ood=["far"], num_samples=8))
    assert result.evaluation.metrics["rmse"] == whole[1]["rmse"] and result.sections[0].title == "Residuals"
    with pytest.raises(ValueError, match="slope must be a number, got 'steep'"):
        monkeypatch.setenv("BAYESLAYERS_TRACEBACK", "1")
        main(["train", str(file), "--output", str(tmp_path / "no"), "--slope", "steep"])
