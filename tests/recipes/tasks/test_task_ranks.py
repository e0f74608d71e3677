"""Every task by several processes: the run of one, its evaluation included."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from safetensors.torch import load_file
from support.ranks import WHAT_FORKS_SAY, run_ranks
from support.scenes import write_camvid
from support.tiny import log_of, quick
from torch.testing import assert_close

from recipes.cli import main
from recipes.data import task_sequence
from recipes.data.augmentation import SceneAugmentation
from recipes.data.blobs import Blobs
from recipes.data.split import Split
from recipes.tasks.continual import Config as ContinualConfig
from recipes.tasks.continual import Continual
from recipes.tasks.regression import Config as TableConfig
from recipes.tasks.regression import Regression
from recipes.tasks.segmentation import Config as SceneConfig
from recipes.tasks.segmentation import Segmentation
from recipes.tasks.toy2d import Config as ToyConfig
from recipes.tasks.toy2d import ToyExperiment
from recipes.training.config import Evaluation

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks"),
    pytest.mark.filterwarnings(WHAT_FORKS_SAY),
    pytest.mark.usefixtures("one_thread"),
]
FEW = Evaluation(num_samples=2, epoch_samples=2, batch_size=2)
VOGN = {"name": "vogn", "lr": 0.05, "precision_lr": 0.1, "init_precision": 1e4}
ADAM = {"name": "adam", "lr": 0.01}


def noisy(name, root, *, train):
    """Return some images of ten classes."""
    generator = torch.Generator().manual_seed(int(train))
    labels = torch.arange(40 if train else 20) % 10
    images = torch.randint(255, (len(labels), 1, 28, 28), generator=generator, dtype=torch.uint8)
    return Split(images, labels, [str(k) for k in range(10)])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    quick(monkeypatch)
    monkeypatch.setattr(task_sequence, "load_split", noisy)
    monkeypatch.setattr(ToyExperiment, "frame", lambda self, epoch: epoch)
    for name in ("training_gif", "finish"):
        monkeypatch.setattr(f"recipes.tasks.toy2d.{name}", lambda *_, **__: None)


def scenes(root, folder, optimizer, **fields):
    """Return a run on six pictures, some pixels of which have no class, and whose classes have weights."""
    given = SceneConfig(
        name="scenes",
        model={"name": "unet_small", "width": 2, "num_classes": 11, "input_size": [3, 16, 24], "norm": "group"},
        data="camvid",
        data_root=str(root),
        augmentation=SceneAugmentation([16, 24], [0.8, 1.2], True, 0.1, 0.1),
        class_balance=0.5,
        optimizer=optimizer,
        batch_size=3,
        epochs=1,
        evaluation=FEW,
        output=str(folder),
        device="cpu",
    )
    return Segmentation(dataclasses.replace(given, **fields))


def table(root, folder, **fields):
    """Return a run on a table of 40 rows."""
    with (root / "cars.csv").open("w", newline="") as file:
        rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        csv.writer(file).writerows([["weight", "power", "price"], *rows.tolist()])
    model = {"name": "regressor", "widths": [8]}
    options = {"optimizer": VOGN, "batch_size": 5, "epochs": 2, "evaluation": FEW, "device": "cpu"} | fields
    return Regression(TableConfig(name="cars", data=f"csv:{root}/cars.csv", model=model, output=str(folder), **options))


def sequence(root, folder, **fields):
    """Return a run over two tasks."""
    given = ContinualConfig(
        name="tasks",
        model={"name": "mlp", "input_size": [784], "widths": [4], "mean": [0.2], "std": [0.3]},
        data="permuted-mnist",
        tasks=2,
        optimizer=VOGN,
        batch_size=20,
        epochs=2,
        evaluation=FEW,
        output=str(folder),
        device="cpu",
    )
    return Continual(dataclasses.replace(given, **fields))


def toy(root, folder, **fields):
    """Return a run of the toy, whose last batch has one example, and whose VOGN runs all samples at once."""
    data = Blobs(examples=21, test_examples=30)
    vogn = {"lr": 0.05, "init_precision": 20.0, "num_samples": 3, "vectorise": True}
    options = {"widths": [6], "epochs": 3, "num_samples": 5, "frames": 1, "batch_size": 5} | fields
    return ToyExperiment(ToyConfig(name="toy", data=data, vogn=vogn, output=str(folder), **options))


RUNS = {
    "scenes_vogn": lambda root, folder: scenes(root, folder, VOGN),
    "scenes_ivon": lambda root, folder: scenes(root, folder, {"name": "ivon", "lr": 0.1, "hess_init": 1.0}),
    "scenes_adam": lambda root, folder: scenes(root, folder, ADAM, micro_batch=1),
    "table": table,
    "tables": lambda root, folder: table(root, folder, splits=2, optimizer=ADAM),
    "sequence": sequence,
    "ewc": lambda root, folder: sequence(root, folder, optimizer=ADAM, penalty="ewc", strength=10.0),
    "toy": toy,
}


def all_runs(world, root):
    for name, make in RUNS.items():
        make(root, root / f"{name}2").train()


def assert_same_to_rounding(folder, whole):
    if (whole / "log.csv").exists():
        for row, other in zip(log_of(folder), log_of(whole), strict=True):
            for key, value in other.items():  # an AUROC counts pairs, of which rounding may turn one round
                rel = 5e-3 if "auroc" in key else 1e-4
                assert row[key] == pytest.approx(value, rel=rel, abs=1e-5, nan_ok=True), f"{whole.name} {key}"
            assert row.keys() == other.keys()
    for path in whole.rglob("model.safetensors"):
        if "best" not in path.parts:
            tensors = load_file(folder / path.relative_to(whole)), load_file(path)
            assert_close(*tensors, rtol=1e-4, atol=1e-5, msg=lambda text, name=whole.name: f"{name}: {text}")
    metrics, others = (json.loads((run / "metrics.json").read_text()) for run in (folder, whole))
    assert metrics == pytest.approx(others, rel=5e-3, abs=1e-5), whole.name  # ranks of scores that are nearly equal
    assert {path.name for path in folder.rglob("*")} == {path.name for path in whole.rglob("*")}


def printed(world, folder):
    """Return what the command prints."""
    words = "regression/gap_noisykfac --epochs 1 --passes 1 --evaluation.num_samples 2".split()
    words += ["--optimizer", "{name: vogn}", "--json", "--output", str(folder / "gap")]
    with redirect_stdout(StringIO()) as out:
        assert main(["train", *words]) == 0
    return out.getvalue()


def test_the_first_process_alone_prints_the_metrics(tmp_path):
    first, second = run_ranks(printed, tmp_path)
    assert json.loads(first)["num_samples"] == 2 and second == ""


def test_two_processes_leave_the_run_of_one_in_every_task(tmp_path):
    write_camvid(tmp_path, counts=(6, 2, 3))
    for name, make in RUNS.items():  # first, so that the forks find all modules imported
        make(tmp_path, tmp_path / name).train()
    assert run_ranks(all_runs, tmp_path) == [None, None]
    for name in RUNS:
        assert_same_to_rounding(tmp_path / f"{name}2", tmp_path / name)
