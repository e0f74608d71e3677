"""The regression task: tables train in their own units, on one split or several, and are evaluated and predicted."""

from __future__ import annotations

import csv
import dataclasses
import json
import re

import pytest
import torch
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from recipes.cli.parser import main
from recipes.data.tables import load_table
from recipes.reports.measure import EvaluationRequest
from recipes.reports.verify import verify
from recipes.tasks.evaluate import evaluate
from recipes.tasks.regression import Config, Regression, scales, train
from recipes.training.config import Evaluation

FAST = {"name": "vogn", "lr": 0.1, "prior_precision": 1.0, "init_precision": 1e4, "deterministic_lr": 0.05}


@pytest.fixture(scope="module")
def cars(tmp_path_factory):
    """A CSV file of 60 rows, whose target is 1000 + 50 weight - 20 power, with noise."""
    path, generator = tmp_path_factory.mktemp("cars") / "cars.csv", torch.Generator().manual_seed(0)
    x = torch.tensor([300.0, 5.0]) + torch.tensor([40.0, 2.0]) * torch.randn(60, 2, generator=generator)
    y = 1000 + 50 * x[:, 0] - 20 * x[:, 1] + 30 * torch.randn(60, generator=generator)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["weight", "power", "price"], *torch.cat([x, y[:, None]], 1).tolist()])
    return path


def config(cars, folder, **options):
    options = {"optimizer": FAST, "batch_size": 16, "epochs": 2, "passes": 3, **options}
    model = {"name": "regressor", "widths": [8], **options.pop("model", {})}
    few = Evaluation(num_samples=4, epoch_samples=2)
    return Config(name="cars", data=f"csv:{cars}", model=model, evaluation=few, output=str(folder), **options)


@pytest.fixture(scope="module")
def run(cars, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "cars"
    return folder, train(config(cars, folder))


def test_a_run_leaves_a_posterior_in_the_units_of_the_data(run, cars):
    folder, metrics = run
    assert {"posterior", "best", "log.csv", "metrics.json", "report.html", "curves.png"} <= {
        path.name for path in folder.iterdir()
    }
    assert metrics is not None and {"rmse", "nll", "mixture_nll", "crps", "coverage_0.9"} <= metrics.keys()
    model = zoo.load(folder / "posterior")
    card, table = zoo.card_of(model), load_table(f"csv:{cars}")
    train_rows, test_rows = table.split(0)
    assert card.kwargs["features"] == ["weight", "power"] and card.dataset == "cars (54 train, 6 test)"
    assert_close(torch.tensor(card.kwargs["target_mean"]), train_rows.labels.mean(0), rtol=1e-6, atol=0.0)
    found = bl.predict(model, test_rows.x, 4)
    assert 5e3 < float(found.mean.mean()) < 3e4 and float(found.aleatoric.sqrt().mean()) > 100
    assert "Predictions" in (folder / "report.html").read_text()


def test_evaluate_measures_what_the_run_did(run, cars):
    folder, metrics = run
    result = evaluate(EvaluationRequest(str(folder / "posterior"), data=f"csv:{cars}", num_samples=4))
    assert result.evaluation.num_examples == 6
    for name in ("rmse", "mixture_nll", "crps"):
        assert result.evaluation.metrics[name] == pytest.approx(metrics[name], rel=1e-5)
    assert len(result.sections) == 1 and len(result.sections[0].pictures) == 2


def test_evaluate_measures_all_rows_of_another_file_with_its_columns_by_name(run, cars, tmp_path):
    folder, table = run[0], load_table(f"csv:{cars}")
    rows = torch.cat([table.y, table.x[:, [1, 0]]], 1).tolist()  # the target first, and the features in another order
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["price", "power", "weight"], *rows])
    found = evaluate(EvaluationRequest(str(folder / "posterior"), data=f"csv:{tmp_path / 'new.csv'}", num_samples=4))
    expected = bl.evaluate(zoo.load(folder / "posterior"), (table.x.float(), table.y.float()), method="mean")
    assert found.evaluation.num_examples == 60
    assert found.evaluation.metrics["rmse"] == pytest.approx(expected.metrics["rmse"], rel=0.2)
    (tmp_path / "new.csv").write_text("price,powr,weight\n1,2,3\n")
    with pytest.raises(
        ValueError, match=r"new.csv must have the posterior's columns, got none of the name 'power'\. Did"
    ):
        evaluate(EvaluationRequest(str(folder / "posterior"), data=f"csv:{tmp_path / 'new.csv'}"))


def test_evaluate_says_what_to_do_where_the_card_does_not_know_the_place_of_its_data(run):
    with pytest.raises(ValueError, match="names the data 'cars' without its place: give it by --data"):
        evaluate(EvaluationRequest(str(run[0] / "posterior"), data="card"))
    with pytest.raises(ValueError, match="unknown table 'cras'") as error:
        evaluate(EvaluationRequest(str(run[0] / "posterior"), data="cras"))
    assert "without its place" not in str(error.value)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(cars, tmp_path):
    whole = Regression(config(cars, tmp_path / "whole"))
    whole.prepare(False, "")
    per_epoch = whole.steps_per_epoch
    every = [x for x, _ in whole.batches(1, 0)]
    assert len(every) == per_epoch == 9
    for start in (2, 3, 8):
        rest = [x for x, _ in whole.batches(1, start)]
        assert len(rest) == per_epoch - start
        assert all(torch.equal(a, b) for a, b in zip(every[start:], rest, strict=True))


def test_several_splits_give_mean_and_standard_error(cars, tmp_path, capsys):
    folder = tmp_path / "all"
    one = train(config(cars, folder, splits=2, epochs=1))
    runs = [json.loads((folder / f"split-{k}" / "metrics.json").read_text()) for k in (0, 1)]
    values = [found["rmse"] for found in runs]
    assert one is not None and one["splits"] == 2 and values[0] != values[1]
    assert one["rmse"] == pytest.approx(sum(values) / 2) and one["rmse_se"] == pytest.approx(
        abs(values[0] - values[1]) / 2
    )
    assert json.loads((folder / "metrics.json").read_text()) == one
    assert zoo.card_of(zoo.load(folder / "split-1" / "posterior")).dataset == "cars@1 (54 train, 6 test)"
    with pytest.raises(FileExistsError, match="Add --resume"):
        train(config(cars, folder, splits=2, epochs=1))
    (folder / "split-1" / "metrics.json").unlink()
    assert train(config(cars, folder, splits=2, epochs=1), resume=True) == one
    assert "standard error" in str(Regression.metrics_table(one).columns[2].header)


def test_a_run_on_one_split_of_several_is_named(cars, tmp_path):
    task = Regression(dataclasses.replace(config(cars, tmp_path), data=f"csv:{cars}@7"))
    task.prepare(False, "")
    expected = load_table(f"csv:{cars}").split(7)[1]
    assert_close(task.splits.test.targets, expected.labels)


def test_known_noise_is_that_of_the_configuration(cars, tmp_path):
    task = Regression(config(cars, tmp_path, variance=900.0))
    task.check()
    task.prepare(False, "")
    x = task.splits.test.inputs(slice(None))
    assert_close(bl.predict(task.model, x, 2).aleatoric, torch.full((6, 1), 900.0))


def test_held_out_rows_are_training_rows(cars, tmp_path):
    task = Regression(config(cars, tmp_path, validation=10))
    task.prepare(False, "")
    parts = task.splits
    assert (len(parts.train), len(parts.held_out), len(parts.test), parts.split) == (44, 10, 6, "val")
    rows = {
        tuple(row) for part in (parts.train, parts.held_out, parts.test) for row in part.inputs(slice(None)).tolist()
    }
    assert len(rows) == 60


def test_a_feature_that_does_not_vary_keeps_its_scale():
    table = load_table("gap")
    points = dataclasses.replace(table.points(), x=torch.full((400, 1), 7.0))
    assert scales(points, table)["std"] == [1.0] and scales(points, table)["mean"] == [7.0]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"splits": 0}, "splits must be an integer >= 1, got 0"),
        ({"passes": 0}, "passes must be an integer >= 1, got 0"),
        ({"variance": -1.0}, "variance must be a finite number > 0"),
        ({"model": {"name": "mlp"}}, "model must be regressor for a table, got 'mlp'"),
        ({"validation": 54}, "validation must leave training rows, got 54 of 54"),
        ({"target": ["prize"]}, "Did you mean 'price'"),
    ],
)
def test_a_bad_configuration_is_named(cars, tmp_path, options, error):
    with pytest.raises(ValueError, match=error):
        train(config(cars, tmp_path / "bad", **options))


def test_data_of_other_columns_is_named(run):
    folder, _ = run
    with pytest.raises(ValueError, match="must have the posterior's 2 features and 1 targets, got 1 and 1"):
        evaluate(EvaluationRequest(str(folder / "posterior"), data="gap"))


def test_predict_reads_columns_by_name_and_prints_intervals(run, cars, tmp_path, capsys):
    folder, _ = run
    (tmp_path / "new.csv").write_text("power,weight\n5,300\n6,280\n")
    words = ["predict", str(folder / "posterior"), str(tmp_path / "new.csv"), "--num-samples", "8"]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    model = zoo.load(folder / "posterior")
    x = torch.tensor([[300.0, 5.0], [280.0, 6.0]])
    expected = bl.predict(model, x, 8, generator=torch.Generator().manual_seed(0))
    assert [row["row"] for row in rows] == [1, 2] and rows[0]["file"] == "new.csv"
    assert [row["mean"] for row in rows] == pytest.approx(expected.mean.flatten().tolist(), rel=1e-4)
    low, high = expected.quantile([0.05, 0.95])
    assert [row["low"] for row in rows] == pytest.approx(low.flatten().tolist(), rel=1e-4)
    assert [row["high"] for row in rows] == pytest.approx(high.flatten().tolist(), rel=1e-4)
    assert main(words) == 0
    assert "epistemic_sd" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("power,wait\n5,300\n", "none of the name 'weight'"),
        ("5,300,7\n", "the posterior's 2 features and no other column, got 3 columns"),
        ("weight,power\n5,many\n", "row 2 of .*new.csv must have a number in column power, got 'many'"),
    ],
)
def test_predict_names_what_does_not_fit(run, tmp_path, text, error, capsys):
    (tmp_path / "new.csv").write_text(text)
    assert main(["predict", str(run[0] / "posterior"), str(tmp_path / "new.csv")]) != 0
    assert re.search(error, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["mlp-gap", "mlp-energy"])
def test_bundled_posteriors_do_what_their_cards_say(name):
    checks = verify(name)
    assert {"rmse", "mixture_nll", "coverage_0.9"} <= {check.metric for check in checks}
    assert all(check.ok for check in checks)


def test_bands_widen_in_the_gap():
    model, table = zoo.load("mlp-gap"), load_table("gap")
    _, test = table.split(0)
    generator = torch.Generator().manual_seed(0)
    known = bl.predict(model, test.x, 64, generator=generator)
    gap = bl.predict(model, load_table("inside-gap").points().x, 64, generator=generator)
    assert float(gap.epistemic.sqrt().mean()) > 2 * float(known.epistemic.sqrt().mean())
    assert 0.08 < float(known.aleatoric.sqrt().mean()) < 0.16


def test_energy_is_predicted_as_closely_as_by_the_best_published_networks():
    checks = {check.metric: check.measured for check in verify("mlp-energy")}
    assert 0.3 < checks["rmse"] < 1.1 and checks["mixture_nll"] < 1.21 and 0.86 <= checks["coverage_0.9"] <= 0.94
