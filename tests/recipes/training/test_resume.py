from __future__ import annotations

import dataclasses
import errno
import math
import shutil

import pytest
import torch
from support.tiny import assert_same_run, log_of, quick, tiny, whole_run

import bayeslayers as bl
from bayeslayers.files import write_atomically
from bayeslayers.storage.posterior import read_card
from bayeslayers.storage.training_state import load_checkpoint, save_checkpoint
from recipes.tasks import toy2d
from recipes.tasks.classification import train
from recipes.training.loop import Training
from recipes.training.schedules import Schedule

CHECKPOINT = "checkpoint.safetensors"


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    quick(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_run(tmp_path_factory.mktemp("data"))


def saves(monkeypatch):
    """Return a list that gets epoch and step of each checkpoint."""
    save, seen = Training.save, []

    def recorded(self):
        save(self)
        seen.append((self.epoch, self.step))

    monkeypatch.setattr(Training, "save", recorded)
    return seen


def test_a_checkpoint_is_written_when_the_minutes_are_over(whole, tmp_path, monkeypatch):
    seen, now = saves(monkeypatch), [0.0]
    monkeypatch.setattr("recipes.training.loop.time.monotonic", lambda: now.__setitem__(0, now[0] + 60) or now[0])
    train(tiny(whole.parent, tmp_path / "run", checkpoint_minutes=2.5))  # the clock is read once or twice a step
    assert set(seen) > {(1, 0), (2, 0)} and len(seen) < 8
    assert_same_run(tmp_path / "run", whole)
    seen.clear()
    train(tiny(whole.parent, tmp_path / "rare", checkpoint_minutes=1e6))
    assert seen == [(1, 0), (2, 0)]


@pytest.mark.parametrize("stop", [1, 3, 5, 6])
def test_a_run_goes_on_from_a_checkpoint_within_an_epoch(stop, whole, tmp_path, monkeypatch):
    """Also from that of the last step, before the epoch is measured."""
    save, count = Training.save, iter(range(1, 99))

    def crash(self):
        save(self)
        if next(count) == stop:
            raise MemoryError

    config = tiny(whole.parent, tmp_path / "run", checkpoint_minutes=1e-9)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Training, "save", crash)
        train(config)
    torch.manual_seed(5)
    train(dataclasses.replace(config, checkpoint_minutes=10), resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "left",
    [[], ["config.json"], ["config.json", "best"], [".best-ab12/model.safetensors", ".checkpoint.safetensors-x1"]],
)
def test_what_a_run_left_before_its_first_checkpoint_is_begun_again(left, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in left:
        if (whole / name).is_dir():
            shutil.copytree(whole / name, folder / name)
        else:
            write_atomically(folder / name, b"unfinished")
    (folder / ".mine").write_text("kept")
    config = tiny(whole.parent, folder)
    if "best" in left:
        with pytest.raises(FileExistsError, match=r"got .* with best\. Add --resume or choose another\."):
            train(config)
    assert train(config, resume=True)
    assert "no checkpoint yet: the run starts from the beginning" in capsys.readouterr().err
    (folder / ".mine").unlink()  # no file of ours
    assert_same_run(folder, whole)
    if "best" not in left:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in left:
            write_atomically(folder / name, b"unfinished")
        assert train(config)
        assert_same_run(folder, whole)


@pytest.mark.parametrize("left", ["log.csv", "metrics.json", "posterior"])
def test_a_run_that_lost_its_checkpoint_is_not_written_over(left, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for path in folder.iterdir():
        if path.name not in (left, "config.json", "best"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(bl.PosteriorError, match="must be a training checkpoint, got no such file"):
        train(tiny(whole.parent, folder), resume=True)
    assert {path.name for path in folder.iterdir()} == before


def changed(**fields):
    return lambda state: state.update(fields)


@pytest.mark.parametrize(
    "change",
    [
        *(lambda state, key=key: state.pop(key) for key in ("model", "optimizer", "schedulers", "rng", "sums", "rows")),
        *(changed(**{key: 3.5}) for key in ("model", "optimizer", "schedulers", "rng", "sums", "rows", "bins")),
        *(changed(**{key: None}) for key in ("identity", "epoch", "step")),
        changed(epoch=99),
        changed(step=-1),
        changed(step=4),
        changed(bins=torch.zeros(1)),
        changed(rows=[{"epoch": 1.0}, {}]),
        changed(rows=[{}, {}]),
        lambda state: state["model"].popitem(),
        lambda state: state["model"].update(more=torch.ones(1)),
        lambda state: state["model"]["output.weight"].fill_(math.nan),
        lambda state: state["model"]["output.weight_precision"].fill_(0.0),
        lambda state: state["model"].update({"output.weight": torch.ones(2)}),
        lambda state: state["optimizer"].update(param_groups=[]),
    ],
)
def test_a_checkpoint_whose_content_is_another_is_one_sentence(change, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    state = load_checkpoint(whole / CHECKPOINT)
    change(state)
    save_checkpoint(tmp_path / "run" / CHECKPOINT, state)
    with pytest.raises(ValueError, match=r"checkpoint.*, got |checkpoint.*: ") as caught:
        train(tiny(whole.parent, tmp_path / "run"), resume=True)
    assert "\n" not in str(caught.value)


def test_weights_that_a_step_makes_infinite_are_not_saved(tmp_path, monkeypatch):
    sgd = {"name": "sgd", "lr": 1.0, "weight_decay": 19.0}
    config = tiny(tmp_path, tmp_path / "run", optimizer=sgd, schedule=Schedule("constant"))
    with monkeypatch.context() as patch:
        patch.setattr(Schedule, "factor", lambda self, step, *rest: 0.1 if step < 5 else 3e38)
        with pytest.raises(
            FloatingPointError,
            match=r"^'.*weight' must be finite, got -?(inf|nan) after step 3 of epoch 2, .*Lower optimizer.lr. "
            "The checkpoint after step 2 of epoch 2 is kept.$",
        ):
            train(dataclasses.replace(config, checkpoint_minutes=1e-9))
    kept = load_checkpoint(tmp_path / "run" / CHECKPOINT)
    assert (kept["epoch"], kept["step"], len(log_of(tmp_path / "run"))) == (1, 2, 1)
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())


def test_a_loss_that_is_not_finite_keeps_the_checkpoint(whole, tmp_path, monkeypatch):
    from bayeslayers.likelihoods import Categorical

    loss, count, config = Categorical.loss, iter(range(99)), tiny(whole.parent, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Categorical, "loss", lambda *args: loss(*args) * (math.nan if next(count) == 4 else 1.0))
        with pytest.raises(FloatingPointError, match=r"got nan in step 2 of epoch 2.* step 0 of epoch 2 is kept\.$"):
            train(config)
    assert train(config, resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_an_epoch_whose_score_is_nan_is_not_the_best_one(tmp_path, monkeypatch):
    from recipes.tasks.posterior_task import PosteriorTask

    measure, count = PosteriorTask.measure_epoch, iter(range(99))
    monkeypatch.setattr(
        PosteriorTask,
        "measure_epoch",
        lambda self: measure(self) | ({"test_nll": math.nan} if next(count) in (0, 2) else {}),
    )
    train(tiny(tmp_path, tmp_path / "run", epochs=3))
    assert read_card(tmp_path / "run/best").notes.startswith("Epoch 2 of 3")


def test_a_file_that_cannot_be_written_is_named_and_as_it_was(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomically(tmp_path / "f", b"old")
    for name in ("fsync", "replace", "chmod"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device.*f'$") as caught:
            patch.setattr(f"bayeslayers.storage.posterior.os.{name}", full)
            write_atomically(tmp_path / "f", b"new")
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


TOY = {"epochs": 1, "frames": 1, "num_samples": 2, "widths": [3], "vogn": {"lr": 0.01, "init_precision": 100.0}}


def test_a_toy_that_was_killed_while_it_wrote_starts_again(tmp_path, monkeypatch):
    config = toy2d.Config(output=str(tmp_path / "toy"), **TOY)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(toy2d, "save", lambda *_: (_ for _ in ()).throw(MemoryError))
        toy2d.train(config)
    assert {path.name for path in (tmp_path / "toy").iterdir()} == {"boundary.gif", "boundary.png", "log.csv"}
    (tmp_path / "toy/.posterior-ab12").mkdir()
    assert toy2d.train(config)
    names = {path.name for path in (tmp_path / "toy").iterdir()}
    assert names == {"boundary.gif", "boundary.png", "log.csv", "posterior", "metrics.json"}
    with pytest.raises(FileExistsError, match="which holds something"):
        toy2d.train(config)
    (tmp_path / "toy/metrics.json").unlink()
    (tmp_path / "toy/notes.txt").touch()  # not the toy's
    with pytest.raises(FileExistsError, match="which holds something"):
        toy2d.train(config)
