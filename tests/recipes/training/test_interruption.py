from __future__ import annotations

import json
import os
import signal

import pytest
from support.tiny import assert_same_run, quick, tiny, whole_run

from bayeslayers.storage.training_state import load_checkpoint
from recipes.tasks.classification import train
from recipes.training.interruption import exit_status, interruption
from recipes.training.loop import Training

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    quick(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_run(tmp_path_factory.mktemp("data"))


def send(number):
    os.kill(os.getpid(), number)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_flag_or_raises_and_handlers_are_restored(number):
    before = handlers()
    with interruption() as interrupted:
        assert not interrupted()
        send(number)
        assert interrupted()
    assert handlers() == before and exit_status() == 128 + number
    with pytest.raises(KeyboardInterrupt), interruption(at_once=True):
        send(number)
    assert handlers() == before


def test_the_signal_that_stopped_last_names_the_status():
    with interruption():
        send(signal.SIGTERM)
    assert exit_status() == 143
    with pytest.raises(KeyboardInterrupt), interruption(at_once=True):
        send(signal.SIGINT)
    assert exit_status() == 130


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with interruption() as interrupted:
            send(signal.SIGINT)
            assert not interrupted() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ends a fork of this process")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_second_sigterm_ends_the_process():
    if (child := os.fork()) == 0:
        with interruption():
            send(signal.SIGTERM)
            send(signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("number", "steps", "left"),
    [(signal.SIGINT, 2, (0, 2)), (signal.SIGTERM, 2, (0, 2)), (signal.SIGTERM, 3, (1, 0)), (signal.SIGTERM, 4, (1, 1))],
)
def test_a_run_stopped_in_a_step_is_saved_and_goes_on(number, steps, left, whole, tmp_path, monkeypatch, capsys):
    step, count, before = Training._step, iter(range(1, 99)), handlers()

    def stopped(self, x, y):
        step(self, x, y)
        if next(count) == steps:
            send(number)

    config = tiny(whole.parent, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", stopped)
        assert train(config) is None
    assert handlers() == before and "stopped and saved in epoch" in capsys.readouterr().err
    saved = load_checkpoint(tmp_path / "run/checkpoint.safetensors")
    assert (saved["epoch"], saved["step"]) == left
    assert train(config, resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_stopped_while_an_epoch_is_measured_is_saved_at_once(number, whole, tmp_path, monkeypatch):
    config = tiny(whole.parent, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("recipes.tasks.posterior_task.evaluate_network", lambda *_: send(number))
        assert train(config) is None
    saved = load_checkpoint(tmp_path / "run/checkpoint.safetensors")
    assert (saved["epoch"], saved["step"]) == (0, 3) and not (tmp_path / "run/log.csv").exists()
    assert train(config, resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("number", "place", "said"),
    [
        (signal.SIGTERM, "task.training_curves", "before it was measured"),
        (signal.SIGTERM, "posterior_task.measure", "before it was measured"),
        (signal.SIGINT, "posterior_task.write_report", "before its report was written"),
        (signal.SIGTERM, "posterior_task.write_report", "before its report was written"),
    ],
)
def test_a_run_stopped_after_its_training_goes_on(number, place, said, whole, tmp_path, monkeypatch, capsys):
    config = tiny(whole.parent, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(f"recipes.tasks.{place}", lambda *_: send(number))
        assert train(config) is None
    assert f"stopped and saved {said}; continue with --resume" in capsys.readouterr().err
    assert train(config, resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_ends_with_the_status_of_its_signal(number, status, tmp_path, monkeypatch):
    from recipes.cli import main

    config = tiny(tmp_path, tmp_path / "run")
    words = [f"--{key}={getattr(config, key)}" for key in ("name", "data", "batch_size", "epochs", "output", "device")]
    words += [f"--{key}={json.dumps(getattr(config, key))}" for key in ("model", "optimizer")]
    monkeypatch.setattr(Training, "_step", lambda self, x, y: send(number))
    monkeypatch.setattr(Training, "_means", lambda self: {})
    monkeypatch.setattr(Training, "save", lambda self: None)
    monkeypatch.setattr(Training, "_end_epoch", lambda self, write: False)
    assert main(["train", *words]) == status
