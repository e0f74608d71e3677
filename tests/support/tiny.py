"""A training that takes a second: nine examples, two epochs of three steps, all files of a run."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from recipes.tasks.classification import train
from recipes.tasks.images import Config
from recipes.training.config import Evaluation
from recipes.training.run_lock import LOCK

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (12, 4, 4), dtype=np.uint8), np.arange(12) % 3


def tiny(root, folder, **fields):
    """Return the configuration, whose data is written to `root`."""
    for split, part in (("train", slice(0, 9)), ("test", slice(9, 12))):
        if not (root / f"{split}.npz").exists():
            np.savez(root / f"{split}.npz", images=IMAGES[part], labels=LABELS[part], classes=["a", "b", "c"])
    given = Config(
        name="tiny",
        model={"name": "mlp", "widths": [4], "input_size": [1, 4, 4], "num_classes": 3},
        data=f"npz:{root}/{{split}}.npz",
        optimizer={"name": "vogn", "lr": 0.1, "init_precision": 1e3},
        batch_size=3,
        epochs=2,
        evaluation=Evaluation(num_samples=2, epoch_samples=2),
        output=str(folder),
        device="cpu",
    )
    return dataclasses.replace(given, **fields)


def quick(patch):
    """Draw no pictures, which take most of the time of a run as small as this; they are written all the same."""
    patch.setattr("bayeslayers.plots.canvas.rendered", lambda figure, kind="png", dpi=110: b"picture")
    patch.setattr("recipes.reports.html.rendered", lambda figure, kind="png", dpi=110: b"picture")


def log_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def assert_same_run(folder, whole):
    """Assert that two runs ended in the same state, bit for bit, and left the same files."""
    assert log_of(folder) == log_of(whole)
    for name in ("posterior", "best"):
        found, expected = (load_file(run / name / "model.safetensors") for run in (folder, whole))
        assert_close(found, expected, rtol=0, atol=0)
        assert (folder / name / "config.json").read_text() == (whole / name / "config.json").read_text()
    assert json.loads((folder / "metrics.json").read_text()) == json.loads((whole / "metrics.json").read_text())
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in folder.iterdir()} == names and LOCK not in names
    assert not [name for name in names if name.startswith(".")]


def whole_run(root):
    """Return the folder of a run that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        train(tiny(root, root / "whole"))
    return root / "whole"
