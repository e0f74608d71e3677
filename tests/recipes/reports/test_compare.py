from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import bayeslayers as bl
from recipes.cli import main
from recipes.reports import compare_figure
from recipes.reports.compare import compare
from recipes.reports.compare_figure import draw
from recipes.reports.measure import EvaluationRequest, EvaluationResult
from recipes.tasks import posterior_task
from recipes.training import loop, run_folder
from recipes.training.run_folder import read_run

RELIABILITY = {
    "edges": [0.0, 0.25, 0.5, 0.75, 1.0],
    "confidence": [None, 0.4, 0.6, 0.9],
    "accuracy": [None, 0.2, 0.7, 1.0],
    "count": [0, 10, 30, 60],
}


def log_rows(accuracy=(0.5, 0.8, 0.9), nll=(1.5, 0.4, 0.3), seconds=(9.0, 2.0, 3.0), on="test"):
    return [
        {"epoch": k + 1, "seconds": s, "lr": 0.1, "temperature": "", "train_loss": 0.2, "train_accuracy": a - 0.01}
        | {f"{on}_accuracy": a, f"{on}_nll": n, f"{on}_ece": 0.02 + k / 1000}
        for k, (a, n, s) in enumerate(zip(accuracy, nll, seconds, strict=True))
    ]


def a_run(folder, rows=None, method=None, data="mnist", epochs=3, reliability=None, config=None, **metrics):
    folder.mkdir(parents=True)
    rows = rows or log_rows()
    with (folder / "log.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    if metrics:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    if method:
        plan = {"name": "n", "optimizer": {"name": method}, "data": data, "epochs": epochs, "laplace": None}
        (folder / "config.json").write_text(json.dumps(plan | {"evaluation": {"method": None}} | (config or {})))
    if reliability:
        (folder / "report.json").write_text(json.dumps({"metrics": {}, "reliability": reliability}))
    return folder


def metrics(accuracy=0.99, nll=0.03, ece=0.002, **more):
    return {"accuracy": accuracy, "nll": nll, "ece": ece, "num_samples": 64, "seed": 0} | more


def cells(comparison):
    """The cells of the Markdown table by run and column."""
    lines = [line for line in comparison.to_markdown().splitlines() if line.startswith("|")]
    titles, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0].strip("`"): dict(zip(titles, row, strict=True)) for row in rows}


def test_the_metrics_are_those_of_the_folder(tmp_path):
    more = {"misclassification_auroc_confidence": 0.95, "ood_auroc_svhn": 0.9, "ood_auroc_svhn_epistemic": 0.8}
    a_run(tmp_path / "vogn", method="vogn", **metrics(**more))
    a_run(tmp_path / "old", log_rows(seconds=(4.0, 4.0, 4.0)), **metrics(nll=None, ece=math.nan))
    vogn, old = compare([tmp_path / "vogn", tmp_path / "old"]).rows()
    assert vogn == {
        "run": "vogn",
        "folder": str(tmp_path / "vogn"),
        "method": "vogn",
        "data": "mnist",
        "epochs": 3,
        "planned_epochs": 3,
        "finished": True,
        "train_accuracy": 0.89,
        "accuracy": 0.99,
        "nll": 0.03,
        "ece": 0.002,
        "misclassification_auroc_confidence": 0.95,
        "ood_auroc_svhn": 0.9,
        "seconds_per_epoch": 3.0,  # the median of 9, 2 and 3
        "cost": 1.0,
    }
    unknown = ("method", "data", "planned_epochs", "nll", "ece", "misclassification_auroc_confidence", "ood_auroc_svhn")
    assert {key for key, value in old.items() if value is None} == set(unknown)
    assert old["cost"] == pytest.approx(4 / 3) and old["finished"]


def test_costs_are_beside_the_run_of_adam(tmp_path):
    a_run(tmp_path / "dropout", method="adam", config={"evaluation": {"method": "dropout"}}, **metrics())
    a_run(tmp_path / "vogn", log_rows(seconds=(6.0,) * 3), method="vogn", **metrics())
    a_run(tmp_path / "baseline", log_rows(seconds=(2.0,) * 3), method="adam", **metrics())
    comparison = compare([tmp_path / name for name in ("dropout", "vogn", "baseline")])
    assert comparison.reference == "baseline"
    assert [row["cost"] for row in comparison.rows()] == [1.5, 3.0, 1.0]
    assert [row["method"] for row in comparison.rows()] == ["adam, dropout", "vogn", "adam"]
    assert compare([tmp_path / "vogn", tmp_path / "dropout"]).reference == "vogn"


def test_a_method_names_the_approximation_after_the_training(tmp_path):
    config = {"laplace": {"last_layer": True}, "evaluation": {"method": "linearised"}}
    assert read_run(a_run(tmp_path / "a", method="adam", config=config)).plan.method == "adam, laplace, linearised"
    assert read_run(a_run(tmp_path / "b", method="adam", config={"laplace": {}})).plan.method == "adam, laplace"


def test_the_best_of_each_column_is_bold_as_it_reads(tmp_path):
    a_run(tmp_path / "a", log_rows(), **metrics(0.99001, 0.05, 0.004, misclassification_auroc_confidence=0.9))
    a_run(tmp_path / "b", log_rows((0.5, 0.6, 0.7)), **metrics(0.99002, 0.03, 0.001, ood_auroc_far=0.9))
    a_run(tmp_path / "c", log_rows(seconds=(1.0,) * 3), **metrics(0.5, 0.04, 0.004, ood_auroc_far=0.8))
    found = cells(compare([tmp_path / name for name in "abc"]))
    bold = {name: {title for title, cell in row.items() if cell.startswith("**")} for name, row in found.items()}
    assert bold == {"a": {"accuracy"}, "b": {"accuracy", "NLL", "ECE", "AUROC far"}, "c": {"s/epoch", "cost"}}
    assert found["a"]["accuracy"] == found["b"]["accuracy"] == "**99.00 %**" and found["b"]["NLL"] == "**0.0300**"
    assert found["a"]["AUROC errors"] == "0.900" and found["a"]["AUROC far"] == found["c"]["AUROC errors"] == "-"
    assert [row["training accuracy"] for row in found.values()] == ["89.00 %", "69.00 %", "89.00 %"]
    assert "**" not in compare([tmp_path / "a"]).to_markdown()


def test_no_metric_is_best_among_different_data(tmp_path):
    a_run(tmp_path / "a", method="sgd", data="mnist", **metrics(0.99))
    a_run(tmp_path / "b", method="sgd", data="cifar10", **metrics(0.8))
    a_run(tmp_path / "c", **metrics(0.7))
    comparison = compare([tmp_path / name for name in "abc"])
    assert [row["data"] for row in cells(comparison).values()] == ["mnist", "cifar10", "-"]
    assert "**" not in comparison.to_markdown()
    assert "data" not in cells(compare([tmp_path / "a", tmp_path / "c"]))["a"]


def test_runs_of_equal_names_are_told_apart_and_each_counts_once(tmp_path, monkeypatch):
    for name in ("x/vogn", "y/vogn", "x/ivon"):
        a_run(tmp_path / name, **metrics())
    monkeypatch.chdir(tmp_path / "x/vogn")
    comparison = compare([".", tmp_path / "y/vogn", tmp_path / "x/ivon", "../ivon", tmp_path / "x/../x/vogn"])
    assert list(comparison.runs) == ["x/vogn", "y/vogn", "ivon"]
    assert [str(run.folder) for run in comparison.runs.values()] == [
        ".",
        str(tmp_path / "y/vogn"),
        str(tmp_path / "x/ivon"),
    ]


def test_an_unfinished_run_shows_its_last_epoch(tmp_path):
    a_run(tmp_path / "new", method="sgd", epochs=20)
    a_run(tmp_path / "older", log_rows((0.1, 0.2), (2.0, 1.0), (1.0, 1.0), on="val"))
    a_run(tmp_path / "done", **metrics())
    new, older, done = compare([tmp_path / name for name in ("new", "older", "done")]).rows()
    assert (new["accuracy"], new["nll"], new["ece"], new["finished"]) == (0.9, 0.3, 0.022, False)
    assert (older["accuracy"], older["nll"], older["train_accuracy"]) == (0.2, 1.0, 0.19)
    comparison = compare([tmp_path / name for name in ("new", "older", "done")])
    assert [row["epochs"] for row in cells(comparison).values()] == ["3 of 20, unfinished", "2, unfinished", "3"]
    assert "Unfinished: test or validation metrics after the last epoch." in comparison.to_markdown()
    assert "nfinished" not in compare([tmp_path / "done"]).to_markdown()
    assert done["accuracy"] == 0.99


def test_a_log_may_lack_columns_and_metrics(tmp_path):
    rows = [{"epoch": 1, "test_accuracy": ""}, {"epoch": 2, "test_accuracy": ""}]
    comparison = compare([a_run(tmp_path / "bare", rows)], tmp_path / "bare.png")
    row = comparison.rows()[0]
    assert row["epochs"] == 2
    assert [row[key] for key in ("train_accuracy", "accuracy", "nll", "seconds_per_epoch", "cost")] == [None] * 5


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("log.csv", "", r"log.csv must be as training writes it, got .*run/log.csv, which is damaged"),
        ("log.csv", "epoch,seconds\n", "log.csv must be"),
        ("log.csv", "epoch,seconds\n1\n", "log.csv must be"),
        ("log.csv", "epoch,seconds\n1,2,3\n", "log.csv must be"),
        ("log.csv", "epoch,seconds\n1,fast\n", "log.csv must be"),
        ("log.csv", 'epoch,seconds\n1,"2', "log.csv must be"),
        ("log.csv", "seconds\n2\n", "log.csv must be"),
        ("log.csv", b"\xff\xfe\x00", "log.csv must be"),
        ("metrics.json", '{"accuracy": 0.9', "metrics.json must be"),
        ("metrics.json", "7", "metrics.json must be"),
        ("metrics.json", '{"accuracy": "high"}', "metrics.json must be"),
        ("config.json", "{}", "config.json must be"),
        ("config.json", "[]", "config.json must be"),
        ("report.json", '{"reliability": {"confidence": [1.0]}}', "report.json must be"),
        ("report.json", '{"reliability": {"confidence": [1], "accuracy": [], "count": [1]}}', "report.json must be"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, content, message):
    folder = a_run(tmp_path / "run", method="sgd", reliability=RELIABILITY, **metrics())
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        compare([folder], tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.log").touch()
    with pytest.raises(ValueError, match="runs must be one folder or more, got none"):
        compare([])
    with pytest.raises(FileNotFoundError, match=r"run must hold log.csv, got .*empty without"):
        compare([tmp_path / "empty"])
    toy = a_run(tmp_path / "toy", [{"epoch": 1, "vogn_accuracy": 0.9}])
    with pytest.raises(
        ValueError, match=r"run must have metrics of test or validation examples, got .*toy, whose log.csv has other"
    ):
        compare([toy])
    with pytest.raises(NotADirectoryError, match=r"run must be a folder, got .*a.log, which is a file"):
        compare([tmp_path / "a.log"])
    with pytest.raises(NotADirectoryError, match=r"run must be a folder, got .*none, which is not there"):
        compare([tmp_path / "none"])


def test_the_command_prints_three_forms(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    a_run(tmp_path / "[bold]|x", **metrics(0.9912, ood_auroc_svhn=0.9))
    a_run(tmp_path / "b", **metrics(0.98))
    words = [str(tmp_path / "[bold]|x"), str(tmp_path / "b")]
    comparison = compare(words)
    assert main(["compare", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == comparison.rows()
    assert main(["compare", *words, "--markdown", "--output", str(tmp_path / "out.svg")]) == 0
    out = capsys.readouterr().out
    assert out == comparison.to_markdown() and r"| `[bold]\|x` | - | 3 | 89.00 % | **99.12 %** |" in out
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")
    assert main(["compare", *words]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "[bold]|x" in line)
    assert "…" not in out and [cell.strip() for cell in line.strip("│").split("│")] == [
        *("[bold]|x", "-", "3", "89.00 %", "99.12 %", "0.0300", "0.0020", "-", "0.900", "3.0", "1.00")
    ]


def test_the_table_prints_the_best_in_bold(tmp_path):
    from rich.console import Console

    a_run(tmp_path / "a", **metrics(0.99))
    a_run(tmp_path / "b", **metrics(0.98))
    console = Console(force_terminal=True, width=200, color_system="standard")
    with console.capture() as text:
        console.print(compare([tmp_path / "a", tmp_path / "b"]))
    assert re.search("\x1b\\[1m *99.00 %", text.get()) and not re.search("\x1b\\[1m *98.00 %", text.get())


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "none")]) == 1
    assert main(["compare", str(a_run(tmp_path / "run")), "--output", str(tmp_path / "out.xyz")]) == 1
    out, error = capsys.readouterr()
    first, second = error.splitlines()
    assert first.startswith("bayeslayers: run must be a folder, got") and not out
    assert second.startswith("bayeslayers: path must end in .png, .svg or .pdf")


def the_runs(folder):
    accuracy, nll = [0.1, 0.3, 0.6, 0.80, 0.90, 0.95], [5.0, 2.0, 1.0, 0.5, 0.3, 0.2]
    a_run(folder / "long", log_rows(accuracy, nll, [1.0] * 6), reliability=RELIABILITY, **metrics())
    a_run(folder / "short", log_rows([0.2, 0.7], [9.0, 0.8], [1.0] * 2))
    return compare([folder / "long", folder / "short"]).runs


def test_the_picture_shows_curves_and_reliability(tmp_path):
    runs = the_runs(tmp_path)
    figure = draw(runs)
    accuracy, nll, reliability = figure.axes
    shown = [(line.get_linestyle(), list(line.get_xdata()), list(line.get_ydata())) for line in accuracy.lines]
    long, short = runs["long"].curves, runs["short"].curves
    assert shown == [
        ("-", long["epoch"], long["accuracy"]),
        ("--", long["epoch"], long["train_accuracy"]),
        ("-", short["epoch"], short["accuracy"]),
        ("--", short["epoch"], short["train_accuracy"]),
    ]
    assert [list(line.get_ydata()) for line in nll.lines] == [long["nll"], short["nll"]] and nll.get_yscale() == "log"
    assert len({line.get_color() for line in nll.lines}) == 2
    dots = reliability.collections
    assert len(dots) == 1 and dots[0].get_offsets().tolist() == [[0.4, 0.2], [0.6, 0.7], [0.9, 1.0]]
    assert 0.3 < dots[0].get_alpha() < 1 and dots[0].get_edgecolors()[0, :3].tolist() == [1, 1, 1]  # dots may overlap
    assert nll.get_ylabel().endswith(", log scale") and "log" not in reliability.get_ylabel()
    assert list(dots[0].get_sizes()) == pytest.approx([3 + 80 * share**0.5 for share in (0.1, 0.3, 0.6)])
    assert [list(line.get_xdata()) for line in reliability.lines] == [[0, 1], [0.4, 0.6, 0.9]]
    assert reliability.get_xlabel() == "confidence\nwithout report.json: short"
    names = [text.get_text() for text in figure.legends[0].texts]
    assert names == ["test", "training", "calibrated", "long", "short (unfinished)"]


def test_the_axes_hold_all_but_the_first_quarter_of_the_epochs_and_the_end_of_each_run(tmp_path):
    accuracy, nll, _ = draw(the_runs(tmp_path)).axes
    low, high = 0.29, 0.95  # training accuracy after epoch 2 of 6; test accuracy at the end
    margin = 0.06 * (high - low)
    assert accuracy.get_ylim() == pytest.approx((low - margin, high + margin))
    ratio = 10**0.06  # from 0.2 to 2
    assert nll.get_ylim() == pytest.approx((0.2 / ratio, 2 * ratio))
    a_run(tmp_path / "begun", log_rows([0.1], [8.0], [1.0]))
    accuracy, nll, _ = draw(compare([tmp_path / "long", tmp_path / "begun"]).runs).axes
    assert accuracy.get_ylim()[0] == pytest.approx(0.09 - 0.06 * (0.95 - 0.09)) and nll.get_ylim()[1] > 8


def test_the_picture_stands_extremes(tmp_path):
    a_run(tmp_path / "perfect", log_rows([1.0], [0.0], [1.0]), **metrics(1.0, 0.0, 0.0))
    a_run(tmp_path / "diverged", log_rows([0.1, 0.1], [3.0, math.nan], [1.0] * 2), **metrics(0.1, math.nan))
    a_run(tmp_path / "infinite", log_rows([0.1], [math.inf], [1.0]))
    runs = compare([tmp_path / name for name in ("perfect", "diverged", "infinite")], tmp_path / "out.png").runs
    accuracy, nll, reliability = draw(runs).axes
    assert accuracy.lines[0].get_marker() == "o"  # one epoch is a point, which no line shows
    assert nll.get_ylim() == pytest.approx((3.0 / 1.1, 3.0 * 1.1))
    assert reliability.get_xlabel() == "confidence\nwithout report.json: all runs"


def test_many_runs_differ_in_colour_or_marker(tmp_path):
    folders = [a_run(tmp_path / f"{'a long name of a run ' * 3}{k}", **metrics()) for k in range(20)]
    figure = draw(compare(folders).runs)
    lines = figure.axes[1].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 20
    assert len({(line.get_color(), line.get_marker()) for line in lines[:7]}) == 7
    FigureCanvasAgg(figure).draw()
    legend = figure.legends[0].get_window_extent()
    assert all(axis.get_tightbbox().y0 >= legend.y1 - 1 for axis in figure.axes) and legend.x0 >= 0
    assert figure.axes[0].get_window_extent().height > 100


def test_validation_metrics_are_named_so(tmp_path):
    folder = a_run(tmp_path / "a", log_rows(on="val"))
    figure = draw(compare([folder]).runs)
    assert figure.axes[1].get_title() == "NLL (validation)" and figure.legends[0].texts[0].get_text() == "validation"


def test_files_are_those_that_training_writes(tmp_path):
    names = (loop.LOG, posterior_task.METRICS, posterior_task.CONFIG)
    assert names == (run_folder.LOG, run_folder.METRICS, run_folder.CONFIG)
    torch.manual_seed(0)
    x, y = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    evaluation = bl.evaluate(bl.BayesLinear(4, 3), (x, y), num_samples=2)
    result = EvaluationResult(EvaluationRequest("net"), evaluation, sections=[], versions={}, command="")
    folder = a_run(tmp_path / "run")
    (folder / compare_figure.REPORT).write_text(result.to_json())
    reliability = evaluation.reliability
    filled = reliability.count > 0
    columns = reliability.confidence[filled], reliability.accuracy[filled], reliability.count[filled] / 60
    expected = torch.stack([column.double() for column in columns], 1)
    found = torch.tensor(read_run(folder).reliability, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not filled.all()


def test_an_import_stays_light():
    code = "import recipes.reports.compare, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "matplotlib", "rich"} & set(done.stdout.split())
