"""Posteriors that are loaded in a process with a limit of memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import bayeslayers as bl
import zoo

MEGABYTES = 8
LIMITED = """
import resource, sys
import torch, zoo, bayeslayers as bl
torch.zeros(1) @ torch.zeros(1)  # threads and caches of torch
held = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (int(held.split()[1]) * 1024 + int(sys.argv[1]) * 2**20,) * 2)
for name in sys.argv[2:]:
    try:
        print("loaded", sum(p.numel() for p in zoo.load(name).parameters()))
    except bl.PosteriorError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_posterior_takes_a_few_times_its_size_and_a_claim_of_more_than_there_is_nothing(tmp_path):
    torch.manual_seed(0)
    for claim in ("network", "header"):
        bl.save_posterior(zoo.create("mlp", input_size=[1, 4, 4], widths=[3]), tmp_path / claim)
    card = json.loads((tmp_path / "network" / "config.json").read_text())
    card["kwargs"]["widths"] = [30_000, 30_000]  # 3.6 GB of means
    (tmp_path / "network" / "config.json").write_text(json.dumps(card))
    weights = tmp_path / "header" / "model.safetensors"
    weights.write_bytes((2**40).to_bytes(8, "little") + weights.read_bytes()[8:])

    names = [str(tmp_path / "network"), str(tmp_path / "header"), "resnet20-cifar10"]  # the last one of 2.2 MB
    words = [sys.executable, "-c", LIMITED, str(MEGABYTES), *names]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    network, header, loaded = done.stdout.splitlines()
    assert loaded == "loaded 269722"
    assert "model.safetensors" in network and "must" in network, network
    assert "model.safetensors" in header, header
