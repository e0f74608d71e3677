"""A run of a method that writes its posterior at the end: the average is saved, and training is not disturbed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.tiny import IMAGES, assert_same_run, log_of, quick, tiny
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.distributions.gaussian import POINT_PRECISION
from bayeslayers.storage.posterior import read_card
from bayeslayers.storage.training_state import load_checkpoint
from recipes.tasks.classification import train
from recipes.training.loop import Training

SWAG = {"name": "swag", "lr": 0.1, "start_step": 4, "average_every": 1}
EPOCHS = 4


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    quick(monkeypatch)


def averaging(root, folder, **fields):
    """Return a run of 4 epochs of 3 steps, which averages from the 4th step on."""
    return tiny(root, folder, optimizer=SWAG, epochs=EPOCHS, **fields)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        train(averaging(root, root / "whole"))
    return root / "whole"


def test_the_posterior_is_the_average_and_the_optimiser_keeps_the_iterate(whole):
    state = load_checkpoint(whole / "checkpoint.safetensors")
    model = zoo.load(whole / "posterior")
    names, states = [name for name, _ in model.named_parameters()], state["optimizer"]["state"]
    assert states.keys() == set(range(len(names)))
    for number, name in enumerate(names):
        own = states[number]
        assert own["averages"] == 9 and own["step"] == 12
        assert_close(model.get_parameter(name).detach(), own["average"], rtol=0, atol=0)
        assert not torch.equal(own["iterate"], own["average"])
        precision = 1 / (own["variance"] + 1 / POINT_PRECISION)
        assert_close(model.get_buffer(f"{name}_precision"), precision, rtol=1e-6, atol=0)


def test_the_best_posterior_is_one_that_was_written(tmp_path, monkeypatch):
    measure, nll = Training._end_epoch, iter([0.1, 0.4, 0.3, 0.5])

    def end(self, write):
        value = next(nll)
        self.task.measure_epoch = lambda: {"test_accuracy": 0.5, "test_nll": value, "test_brier": 0.5, "test_ece": 0.1}
        return measure(self, write)

    monkeypatch.setattr(Training, "_end_epoch", end)
    train(averaging(tmp_path, tmp_path / "run"))
    assert [row["test_nll"] for row in log_of(tmp_path / "run")] == [0.1, 0.4, 0.3, 0.5]
    assert "Epoch 3 of 4" in read_card(tmp_path / "run" / "best").notes


@pytest.mark.parametrize("stop", range(1, 4 * EPOCHS, 3))
def test_a_run_that_is_stopped_goes_on_exactly(stop, whole, tmp_path, monkeypatch):
    save, count = Training.save, iter(range(1, 99))

    def crash(self):
        save(self)
        if next(count) == stop:
            raise MemoryError

    config = averaging(whole.parent, tmp_path / "run", checkpoint_minutes=1e-9)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Training, "save", crash)
        train(config)
    train(dataclasses.replace(config, checkpoint_minutes=10), resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_measuring_an_epoch_does_not_move_the_path(whole, tmp_path, monkeypatch):
    """The state at the end is that of a run whose posterior was written at its end alone."""
    finalize, calls = bl.SWAG.finalize, iter(range(1, 9))
    monkeypatch.setattr(bl.SWAG, "finalize", lambda self: finalize(self) if next(calls) == EPOCHS - 1 else None)
    monkeypatch.setattr("recipes.tasks.posterior_task.PosteriorTask.on_best", lambda *_: None)
    train(averaging(whole.parent, tmp_path / "run"))
    assert next(calls) == EPOCHS
    found, expected = (load_checkpoint(run / "checkpoint.safetensors") for run in (tmp_path / "run", whole))
    assert_close(found["model"], expected["model"], rtol=0, atol=0)
    assert_close(found["optimizer"]["state"], expected["optimizer"]["state"], rtol=0, atol=0)


def test_batch_statistics_are_those_of_the_average(tmp_path):
    model = {"name": "resnet20", "input_size": [1, 4, 4], "num_classes": 3}
    train(averaging(tmp_path, tmp_path / "run", model=model))
    net = zoo.load(tmp_path / "run" / "posterior")
    (norm, *_) = (module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d))
    assert int(norm.num_batches_tracked) == 3  # one pass over the data since they were reset
    inputs = net.conv1(net.normalise(torch.as_tensor(IMAGES[:9, None]) / 255))
    assert_close(norm.running_mean, inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_a_run_too_short_for_a_posterior_says_so_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"optimizer must have a posterior to write after 1 epochs of 3 steps, .* 5 s"):
        train(tiny(tmp_path, tmp_path / "run", optimizer=SWAG, epochs=1))
    assert not (tmp_path / "run" / "log.csv").exists()
