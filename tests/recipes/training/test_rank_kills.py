"""Ranks that are killed at random moments, one after another, and started again: the run comes to the same end."""

from __future__ import annotations

import itertools
import os
import random
import signal

import pytest
import torch.distributed as dist
from safetensors.torch import load_file
from support.ranks import WHAT_FORKS_SAY, run_ranks
from support.tiny import log_of, quick, tiny
from torch.testing import assert_close

from recipes.tasks.classification import train

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks"),
    pytest.mark.filterwarnings(WHAT_FORKS_SAY),
]
OFTEN = 1e-9  # minutes: a checkpoint after every step
MOMENTS = {"other": 40, "leader": 90}  # messages and writes of a rank within about three steps


def killed_at(moment, mark):
    """Let this process kill itself before a message or a write, and leave a mark."""
    count = itertools.count()

    def wrapped(real):
        def call(*args, **kwargs):
            if next(count) == moment:
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for module, name in ((dist, "all_gather"), (dist, "all_reduce"), (os, "fsync"), (os, "replace"), (os, "unlink")):
        setattr(module, name, wrapped(getattr(module, name)))


def config(root, name, epochs):
    return tiny(root, root / name, epochs=epochs, checkpoint_minutes=OFTEN)


@pytest.mark.parametrize(("kills", "epochs"), [(2, 2), pytest.param(20, 12, marks=pytest.mark.slow)])
def test_random_ranks_are_killed_and_the_run_comes_to_the_same_end(kills, epochs, tmp_path, monkeypatch):
    quick(monkeypatch)
    tiny(tmp_path, tmp_path)  # writes the data
    chance = random.Random(kills)
    for number in range(kills):
        victim, mark = chance.randrange(2), tmp_path / f"killed{number}"
        moment = chance.randrange(MOMENTS["leader" if victim == 0 else "other"])

        def work(world, root, victim=victim, moment=moment, mark=mark):
            if world.rank == victim:
                killed_at(moment, mark)
            train(config(root, "killed", epochs), resume=(root / "killed").exists())

        (said,) = run_ranks(work, tmp_path, survivors=[1 - victim])
        assert mark.exists(), f"kill {number} came too late"
        assert said.startswith(f"RankError: rank {victim} ") and said.endswith("but is gone. All ranks stop.")
    for name in ("killed", "whole"):
        run_ranks(
            lambda world, root, name=name: train(config(root, name, epochs), (root / name).exists()) and None, tmp_path
        )
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    found, expected = (load_file(tmp_path / name / "posterior" / "model.safetensors") for name in ("killed", "whole"))
    assert_close(found, expected, rtol=0, atol=0)
