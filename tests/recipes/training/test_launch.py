"""Trainings by several processes: the run of one, faults that end all of them, and runs that go on."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.ranks import WHAT_FORKS_SAY, run_ranks
from support.tiny import log_of, quick, tiny
from torch.testing import assert_close

import recipes
from bayeslayers.storage.training_state import load_checkpoint
from recipes.tasks.classification import train
from recipes.training.loop import Training
from recipes.training.run_folder import CHECKPOINT

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks"),
    pytest.mark.filterwarnings(WHAT_FORKS_SAY),
]
VOGN = {"name": "vogn", "lr": 0.1, "init_precision": 1e3}
KFAC = {"name": "noisykfac", "lr": 0.1, "init_precision": 1e3}
CASES = {
    "vogn": {"optimizer": VOGN},
    "groups": {"optimizer": VOGN | {"num_mc_groups": 2}, "batch_size": 4},
    "kfac": {"optimizer": KFAC, "micro_batch": 1, "batch_size": 4},
    "shards": {"optimizer": VOGN | {"shard": True}},
    "adam": {"optimizer": {"name": "adam", "lr": 0.01}},
}


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    quick(monkeypatch)


def assert_same_to_rounding(folder, whole, rtol=1e-5):
    found, expected = log_of(folder), log_of(whole)
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
    state, other = (load_checkpoint(run / CHECKPOINT) for run in (folder, whole))
    assert_close(state["model"], other["model"], rtol=rtol, atol=rtol / 10)
    assert state["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()
    metrics, others = (json.loads((run / "metrics.json").read_text()) for run in (folder, whole))
    assert metrics == pytest.approx(others, rel=1e-4, abs=1e-5)


def train_all(world, root):
    for name, fields in CASES.items():
        train(tiny(root, root / f"{name}2", **fields))


def test_two_processes_leave_the_run_of_one(tmp_path):
    tiny(tmp_path, tmp_path)  # writes the data
    assert run_ranks(train_all, tmp_path) == [None, None]
    for name, fields in CASES.items():
        train(tiny(tmp_path, tmp_path / name, **fields))
        rtol = 1e-4 if name == "kfac" else 1e-5  # inverses of factors enlarge what is rounded
        assert_same_to_rounding(tmp_path / f"{name}2", tmp_path / name, rtol)
        for folder, processes in ((name, 1), (f"{name}2", 2)):
            assert json.loads((tmp_path / folder / "config.json").read_text())["processes"] == processes
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            path.name for path in (tmp_path / f"{name}2").iterdir()
        }


def at_step(number, act):
    """Let the training call `act` with itself before a step, counted from 1."""
    step, count = Training._step, iter(range(1, 99))

    def changed(self, x, y):
        if next(count) == number:
            x = act(self, x)
        step(self, x, y)

    Training._step = changed


def stopped(world, root):
    """Stop by a signal to one rank in the middle of the second epoch; each rank counts what it saves."""
    saves, save = [], Training.save

    def counted(self):
        saves.append((self.epoch, self.step))
        save(self)

    Training.save = counted
    if world.rank == 1:
        at_step(5, lambda self, x: os.kill(os.getpid(), signal.SIGTERM) or x)
    assert train(tiny(root, root / "stopped")) is None
    return saves


def test_a_signal_to_one_rank_saves_once_and_any_number_of_processes_goes_on(tmp_path):
    tiny(tmp_path, tmp_path)
    assert run_ranks(stopped, tmp_path) == [[[1, 0], [1, 2]]] * 2
    train(tiny(tmp_path, tmp_path / "whole"))
    state = load_checkpoint(tmp_path / "stopped" / CHECKPOINT)
    assert (state["epoch"], state["step"], len(state["rank_rng"])) == (1, 2, 1)
    (tmp_path / "by3").mkdir()
    (tmp_path / "by3" / CHECKPOINT).write_bytes((tmp_path / "stopped" / CHECKPOINT).read_bytes())
    assert train(tiny(tmp_path, tmp_path / "stopped"), resume=True)
    assert_same_to_rounding(tmp_path / "stopped", tmp_path / "whole")
    run_ranks(lambda world, root: train(tiny(root, root / "by3"), resume=True) and None, tmp_path, size=3)
    assert_same_to_rounding(tmp_path / "by3", tmp_path / "whole")


def not_finite(world, root):
    if world.rank == 1:
        at_step(5, lambda self, x: x * math.nan)
    train(tiny(root, root / "nan"))


def disk_full(world, root):
    import recipes.training.loop as loop

    save, count = loop.save_checkpoint, iter(range(9))

    def full(path, state):
        if next(count):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, state)

    loop.save_checkpoint = full
    train(tiny(root, root / "full"))


def killed(world, root):
    if world.rank == 1:
        at_step(5, lambda self, x: os.kill(os.getpid(), signal.SIGKILL))
    train(tiny(root, root / "killed"))


def other_configuration(world, root):
    train(tiny(root, root / "other", seed=world.rank))


def test_a_fault_of_one_rank_ends_all_with_a_sentence_and_keeps_the_checkpoint(tmp_path):
    tiny(tmp_path, tmp_path)
    first, second = run_ranks(not_finite, tmp_path)
    sentence = "the loss must be finite, got nan in step 2 of epoch 2, where the run stops."
    assert second.startswith(f"FloatingPointError: {sentence}")
    assert first.startswith(f"NumbersError: rank 1 has failed, where all ranks stop. FloatingPointError: {sentence}")
    first, second = run_ranks(disk_full, tmp_path)
    assert "No space left on device" in first and "The last checkpoint is kept" in first
    assert second.startswith("RankError: rank 0 has failed, where all ranks stop. OSError") and "No space" in second
    (first,) = run_ranks(killed, tmp_path, survivors=[0])
    assert first.startswith("RankError: rank 1 (") and first.endswith("but is gone. All ranks stop.")
    for name in ("nan", "full", "killed"):
        state = load_checkpoint(tmp_path / name / CHECKPOINT)
        assert (state["epoch"], state["step"]) == (1, 0), name
    first, second = run_ranks(other_configuration, tmp_path)
    assert first == second
    assert first.startswith("RankError: configuration must be the same on all ranks, got seed: 1 on rank 1 and seed: 0")


SCRIPT = """
import os, signal, sys
from recipes.cli import main
from recipes.training.loop import Training
step, count = Training._step, iter(range(1, 99))
def killed(self, x, y):
    if next(count) == 5 and self.world.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, x, y)
Training._step = killed
sys.exit(main(sys.argv[1:]))
"""


def test_torchrun_starts_a_run_again_that_goes_on_to_the_same_posterior(tmp_path):
    config = tiny(tmp_path, tmp_path / "killed")
    (tmp_path / "train.py").write_text(SCRIPT)
    fields = {"name": "tiny", "model": config.model, "data": config.data, "optimizer": config.optimizer}
    fields |= {"batch_size": 3, "epochs": 2, "device": "cpu", "evaluation": {"num_samples": 2, "epoch_samples": 2}}
    (tmp_path / "tiny.yaml").write_text(json.dumps(fields))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    words += [str(tmp_path / "train.py"), "train", str(tmp_path / "tiny.yaml")]
    words += ["--output", str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": str(Path(recipes.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run_ranks(lambda world, root: train(tiny(root, root / "whole")) and None, tmp_path)
    found, expected = (load_file(tmp_path / name / "posterior" / "model.safetensors") for name in ("killed", "whole"))
    assert_close(found, expected, rtol=0, atol=0)
