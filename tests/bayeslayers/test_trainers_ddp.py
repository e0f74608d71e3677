"""The examples of docs/trainers_ddp.md run as they stand, by two processes, and train."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bayeslayers as bl

PAGE = Path(__file__).parents[2] / "docs" / "trainers_ddp.md"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize(("name", "start"), [("lightning", []), ("accelerate", TORCHRUN)])
def test_an_example_trains_by_two_processes(name, start, tmp_path):
    pytest.importorskip(name)
    (block,) = (text for text in blocks() if f"{name}-posterior" in text)
    ranks = "\nopen(f'rank{torch.distributed.get_rank()}of{torch.distributed.get_world_size()}', 'w').close()\n"
    place = block.index("\nif trainer" if name == "lightning" else "\nif accelerator")
    (tmp_path / "example.py").write_text(block[:place] + ranks + block[place:])
    known = {"PATH", "HOME", "LANG"}  # not what an outer launcher has set
    environment = {key: value for key, value in os.environ.items() if key in known}
    environment |= {"PYTHONPATH": str(PAGE.parent.parent), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, *start, "example.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("rank*")} == {"rank0of2", "rank1of2"}
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    model, _ = bl.to_bayesian(net)
    bl.load_posterior(tmp_path / f"{name}-posterior", model)
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(1))
    prediction = bl.predict(model, x, 16, generator=torch.Generator().manual_seed(2))
    assert 0.85 < (prediction.labels == x[:, :3].argmax(1)).float().mean() <= 1


def test_every_block_is_run():
    assert len(blocks()) == 2
