"""A dry run of the recipes for ImageNet, on a generated folder: workers, bf16, accumulation, faults, and resume."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from support.ranks import WHAT_FORKS_SAY, run_ranks
from support.tiny import log_of, quick
from torch.testing import assert_close

from bayeslayers.storage.training_state import load_checkpoint
from recipes.cli import main
from recipes.training.loop import Training

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="workers and ranks are forks"),
    pytest.mark.filterwarnings(WHAT_FORKS_SAY),
    pytest.mark.usefixtures("one_thread"),
]
NET = "--model {name: lenet5, input_size: [3, 32, 32], num_classes: 3}"
SMALL = "--batch_size 6 --micro_batch 2 --epochs 2 --schedule {name: cosine} --augmentation.resize 40 --device cpu"
FEW = "--evaluation.num_samples 2 --evaluation.epoch_samples 1 --evaluation.batch_size 2"
GROUPS = "--optimizer.num_mc_groups 2 --optimizer.init_precision 1e4"
BROKEN = ("train/b/broken.jpg", "val/a/broken.jpg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of three classes in ImageNet's layout and of several sizes, two of them broken."""
    root, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for name in "abc":
            (root / part / name).mkdir(parents=True)
            for number in range(count - (part == "train" and name == "b")):
                size = int(rng.integers(40, 70)), int(rng.integers(40, 70)), 3
                picture = Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8))
                picture.save(root / part / name / f"{number}.jpg")
    for path in BROKEN:
        whole = (root / path).with_name("0.jpg").read_bytes()
        (root / path).write_bytes(whole[: len(whole) // 2])
    return root


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    quick(monkeypatch)
    monkeypatch.setenv("BAYESLAYERS_TRACEBACK", "1")


def train(name, folder, output, *more, options=""):
    words = [f"imagenet/{name}", "--data", f"imagefolder:{folder}", "--output", str(output)]
    for text in (NET, SMALL, FEW, options):
        for part in text.replace(" --", "\n--").split("\n"):
            words += [word for word in part.strip().split(" ", 1) if word]
    return main(["train", *words, *more])


def test_a_run_in_bf16_by_workers_is_resumed_inside_an_epoch_by_threads(folder, tmp_path, monkeypatch, capsys):
    assert train("resnet18_vogn", folder, tmp_path / "whole", options=f"{GROUPS} --workers 0") == 0
    said = capsys.readouterr().err
    assert said.count("left out: ") == 2 and all(path in said for path in BROKEN)
    assert [row["train_skipped"] for row in log_of(tmp_path / "whole")] == [1, 1]
    assert json.loads((tmp_path / "whole/metrics.json").read_text())["test_examples"] == 6
    config = json.loads((tmp_path / "whole/config.json").read_text())
    assert (config["precision"], config["channels_last"], config["on_error"]) == ("bfloat16", True, "skip")

    step, count = Training._step, iter(range(99))

    def stopped(self, x, y):
        if next(count) == 4:  # of the second epoch's three, where a picture has been left out
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, x, y)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", stopped)
        assert train("resnet18_vogn", folder, tmp_path / "run", options=f"{GROUPS} --workers 2") == 143
    state = load_checkpoint(tmp_path / "run/checkpoint.safetensors")
    assert (state["epoch"], state["step"]) == (1, 2)
    assert train("resnet18_vogn", folder, tmp_path / "run", "--resume", options=f"{GROUPS} --workers 0") == 0
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
    found, expected = (load_checkpoint(tmp_path / name / "checkpoint.safetensors") for name in ("run", "whole"))
    assert_close(found["model"], expected["model"], rtol=0, atol=0)


def by_two(world, root):
    """Train by two processes, of which one has a picture fewer in a step of each epoch."""
    torch.set_num_threads(1)
    return train("resnet50_ivon", root["folder"], root["output"], options=root["options"])


def test_two_processes_share_the_pictures_and_the_ones_left_out(folder, tmp_path):
    options = "--precision float32 --workers 0 --optimizer.lr 0.001"
    assert train("resnet50_ivon", folder, tmp_path / "one", options=options) == 0
    work = {"folder": folder, "output": tmp_path / "two", "options": options}
    assert run_ranks(lambda world, _: by_two(world, work), tmp_path) == [0, 0]
    for row, other in zip(log_of(tmp_path / "two"), log_of(tmp_path / "one"), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)
        assert row["train_skipped"] == 1
    found, expected = (load_checkpoint(tmp_path / name / "checkpoint.safetensors") for name in ("two", "one"))
    assert_close(found["model"], expected["model"], rtol=1e-3, atol=1e-4)


def test_a_picture_that_cannot_be_read_ends_the_run_unless_it_is_to_be_skipped(folder, tmp_path):
    with pytest.raises(ValueError, match=r"image must be a picture that Pillow reads, got .*broken\.jpg"):
        train("resnet18_ivon", folder, tmp_path / "run", options="--on_error raise --workers 0")
