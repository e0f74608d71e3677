"""A training that is killed, or whose disk is full, at any moment of writing goes on to the same end, bit for bit."""

from __future__ import annotations

import errno
import itertools
import os
import signal

import pytest
from support.tiny import assert_same_run, quick, tiny, whole_run

from recipes.tasks.classification import train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork of this process")
CALLS = ("mkdir", "open", "fdopen", "fsync", "chmod", "replace", "rename", "unlink", "rmdir")
OFTEN = 1e-9  # minutes: a checkpoint after every step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted, and how many calls it makes that change the disk."""
    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        folder = whole_run(root)
        quick(patch)
        count = itertools.count()
        at_each_write(patch, lambda: next(count))
        train(tiny(root, root / "counted", checkpoint_minutes=OFTEN))
    return folder, next(count)


def at_each_write(patch, act):
    """Act before each call that changes the disk."""
    for name in CALLS:
        real = getattr(os, name)

        def call(*args, real=real, **kwargs):
            act()
            return real(*args, **kwargs)

        patch.setattr(os, name, call)


def killed_at(moment, config, patch):
    """Train in a fork of this process, which is killed at a moment of writing; return whether it was."""
    if (child := os.fork()) == 0:
        try:
            count = itertools.count()
            at_each_write(patch, lambda: next(count) == moment and os.kill(os.getpid(), signal.SIGKILL))
            train(config)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def assert_goes_on(config, folder, whole):
    """Resume, as anybody would who finds a folder there, and compare with the run that nothing interrupted."""
    train(config, resume=folder.exists())
    assert_same_run(folder, whole)


def killed_and_resumed(moment, whole, tmp_path, patch):
    folder = tmp_path / str(moment)
    config = tiny(whole.parent, folder, checkpoint_minutes=OFTEN)
    with pytest.MonkeyPatch.context() as inner:
        assert killed_at(moment, config, inner)
    assert_goes_on(config, folder, whole)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("share", [0.0, 0.01, 0.03, 0.2, 0.55, 0.9, 0.97, 1.0])
def test_a_run_killed_while_it_writes_goes_on_to_the_same_end(share, whole, tmp_path, monkeypatch):
    quick(monkeypatch)
    folder, moments = whole
    killed_and_resumed(round(share * (moments - 1)), folder, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_killed_at_any_moment_of_writing_goes_on_to_the_same_end(whole, tmp_path, monkeypatch):
    quick(monkeypatch)
    folder, moments = whole
    assert moments >= 60
    for moment in range(moments):
        killed_and_resumed(moment, folder, tmp_path, monkeypatch)


def full_from(moment, config):
    """Train on a disk that is full from a moment of writing on; return what is said of it."""
    count = itertools.count()

    def write():
        if next(count) >= moment:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        at_each_write(patch, write)
        with pytest.raises(OSError, match="No space left on device") as caught:
            train(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98])
def test_a_run_whose_disk_is_full_goes_on_to_the_same_end(share, whole, tmp_path, monkeypatch):
    quick(monkeypatch)
    folder, moments = whole
    config = tiny(folder.parent, tmp_path / "run", checkpoint_minutes=OFTEN)
    said = full_from(round(share * moments), config)
    saved = (tmp_path / "run/checkpoint.safetensors").exists()
    assert saved == (share >= 0.5) == ("The last checkpoint is kept: repair this, and add --resume." in said)
    assert_goes_on(config, tmp_path / "run", folder)


@pytest.mark.slow
def test_a_run_whose_disk_is_full_at_any_moment_goes_on_to_the_same_end(whole, tmp_path, monkeypatch):
    quick(monkeypatch)
    folder, moments = whole
    for moment in range(0, moments - 1, 3):  # the last call removes the lock, which may fail
        config = tiny(folder.parent, tmp_path / str(moment), checkpoint_minutes=OFTEN)
        full_from(moment, config)
        assert_goes_on(config, tmp_path / str(moment), folder)
