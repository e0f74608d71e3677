"""How ranks start and meet, what they refuse, and what they say when one is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from support.ranks import WHAT_FORKS_SAY, run_ranks

import bayeslayers as bl
from bayeslayers.distributed.launch import Place, launcher_of, place_by_slurm, place_by_torchrun
from bayeslayers.distributed.messages import Kind, exchange

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks")
quiet_fork = pytest.mark.filterwarnings(WHAT_FORKS_SAY)
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1234567"}


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, "alone"),
        ({"SLURM_NTASKS": "4"}, "alone"),  # a script of sbatch, not one of srun's tasks
        ({"WORLD_SIZE": "4"}, "alone"),
        (TORCHRUN, "torchrun"),
        (TORCHRUN | SLURM, "torchrun"),
        (SLURM, "slurm"),
        (SLURM | {"PMI_SIZE": "8"}, "slurm"),
        (SLURM | {"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}, "mpirun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
        ({"PMI_SIZE": "2"}, "mpirun"),
    ],
)
def test_the_launcher_is_found_by_its_variables(environment, launcher):
    assert launcher_of(environment) == launcher


def test_the_place_is_what_the_variables_say():
    assert place_by_torchrun(TORCHRUN) == Place("torchrun", 3, 8, 1, 2)
    place = place_by_slurm(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_STEP_NODELIST": "gpu[08-10],x"})
    assert place == Place("slurm", 5, 8, 1, 2, "gpu08", 15_000 + 1234567 % 20_000)
    named = place_by_slurm(SLURM | {"MASTER_ADDR": "here", "MASTER_PORT": "77", "SLURM_STEP_NUM_TASKS": "6"})
    assert (named.address, named.port, named.size) == ("here", 77, 6)
    with pytest.raises(ValueError, match="SLURM_PROCID must be an integer >= 0, as the launcher sets it, got '-1'"):
        place_by_slurm(SLURM | {"SLURM_PROCID": "-1"})


def test_a_process_alone_is_a_world_of_one_without_a_group():
    with bl.distributed.start("cpu", environment={}) as world:
        assert (world.rank, world.size, world.leads, world.launcher) == (0, 1, True, "alone")
        assert world.part(5) == slice(0, 5) and world.seed(3) == 3
        assert not dist.is_initialized()
        assert bl.distributed.gather_text("alone") == ["alone"]
        bl.distributed.agree({"a": 1})
    with pytest.raises(ValueError, match="timeout must be"), bl.distributed.start(timeout=0):
        pass


def meeting(world, folder):
    """Say and refuse things; return what was said."""
    found = {"parts": [world.part(7).start, world.part(7).stop], "texts": bl.distributed.gather_text(f"é{world.rank}")}
    with pytest.raises(bl.distributed.RankError) as caught:
        bl.distributed.agree({"model": {"lr": 0.1, "size": world.rank}, "z": 0})
    found["difference"] = str(caught.value)
    with pytest.raises(Exception) as caught, bl.distributed.telling_failures():
        if world.rank == 1:
            raise OSError("disk full")
        exchange(Kind.STEP)
    found["failure"] = f"{type(caught.value).__name__}: {caught.value}"
    with pytest.raises(KeyboardInterrupt):
        if exchange(Kind.STOPPED if world.rank == 0 else Kind.STEP) and world.rank == 0:
            raise KeyboardInterrupt
    with bl.distributed.start("cpu") as nested:  # a group that is there is used, and left
        found["nested"] = nested.rank
    exchange(Kind.STEP)
    return found


@needs_fork
@quiet_fork
def test_ranks_meet_tell_their_failures_and_their_stops(tmp_path):
    found = run_ranks(meeting, tmp_path, size=3)
    assert [own["parts"] for own in found] == [[0, 2], [2, 4], [4, 7]]
    assert [own["nested"] for own in found] == [0, 1, 2]
    for own in found:
        assert own["texts"] == ["é0", "é1", "é2"]
        text = "model must be the same on all ranks, got size: 1 on rank 1 and size: 0 on rank 0. Start all ranks"
        assert own["difference"].startswith(text)
    assert found[1]["failure"] == "OSError: disk full"
    for rank in (0, 2):
        assert found[rank]["failure"] == "RankError: rank 1 has failed, where all ranks stop. OSError: disk full"


def killed_in_a_step(world, folder):
    """Lose rank 1 while the others wait for it, or compute; return how long that took, and what was said."""
    exchange(Kind.STEP)
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if world.rank == 2:
        time.sleep(1.5)  # it is alive, and slow
    began = time.monotonic()
    try:
        exchange(Kind.STEP)
    except bl.distributed.RankError as error:
        return [time.monotonic() - began, str(error), error.ranks]


@needs_fork
@quiet_fork
def test_a_killed_rank_ends_all_others_with_a_sentence_that_names_it(tmp_path):
    for seconds, text, ranks in run_ranks(killed_in_a_step, tmp_path, size=3, survivors=(0, 2)):
        assert seconds < 15 and ranks == [1]  # of a timeout of 20
        assert text.startswith("rank 1 (") and "must take part in each step, but is gone. All ranks stop." in text


SCRIPT = """
import torch, torch.nn.functional as F, bayeslayers as bl
with bl.distributed.start("cpu", timeout=60) as world:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    generator = torch.Generator().manual_seed(1)
    optimizer = bl.VOGN(model, 8, generator=generator, sync=world.size > 1)
    for step in range(3):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step)).double()
        own = world.part(8)
        with optimizer.sampled():
            F.cross_entropy(model(x[own]), torch.arange(8)[own] % 2).backward()
        optimizer.step()
    if world.leads:
        print(world.size, f"{model.weight.sum().item():.9f}")
"""


def test_one_script_runs_alone_and_under_mpirun(tmp_path):
    script, mpirun = tmp_path / "train.py", Path(sys.executable).parent / "mpirun"
    script.write_text(SCRIPT)
    if not mpirun.exists():
        pytest.skip("mpirun is not installed: pip install mpi4py mpich")
    environment = os.environ | {"PYTHONPATH": str(Path(bl.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    words = [str(mpirun), "-n", "2", sys.executable, str(script)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    alone = {}
    exec(compile(SCRIPT, "train.py", "exec"), {"print": lambda size, total: alone.update({size: total})})
    assert done.stdout.split() == ["2", alone[1]]
