"""A posterior's folder, changed in thousands of ways: it loads, or PosteriorError says in a line what is wrong."""

from __future__ import annotations

import random
import resource
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from mutations import KINDS, WEIGHTS, Files
from safetensors.torch import load_file
from torch.testing import assert_close

import bayeslayers as bl
import zoo

MUTATIONS = 2100


def listing(folder: Path):
    """What lies where, with its size and the time of its last change."""
    return {
        (str(path.relative_to(folder)), path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")
    }


def fresh(folder: Path) -> Path:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return folder


@pytest.fixture
def valid(tmp_path):
    torch.manual_seed(0)
    model = zoo.create("mlp", widths=[3], input_size=[1, 2, 2], num_classes=2)
    bl.save_posterior(model, tmp_path / "outside", class_names=["a", "b"], dataset="d", metrics={"accuracy": 0.5})
    return tmp_path / "outside"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_every_mutation_loads_or_is_refused_in_a_sentence(valid, tmp_path, monkeypatch, capsys):
    folder, sandbox = tmp_path / "folder", tmp_path / "sandbox"
    for path in (folder, sandbox):
        path.mkdir()
    monkeypatch.chdir(sandbox)
    reference, figures, slowest = zoo.load(valid).state_dict(), Counter(), 0.0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(MUTATIONS):
        kind = KINDS[seed % len(KINDS)]
        files = Files(valid)
        kind(random.Random(seed), files, fresh(folder))
        for name, content in files.raw.items():
            (folder / name).write_bytes(content)
        before, start = listing(tmp_path), time.perf_counter()
        try:
            model = zoo.load(folder)
        except bl.PosteriorError as error:
            text = str(error)
            assert text.isprintable() and 20 < len(text) < 700, (kind, seed, text)
            assert str(folder) in text, (kind, seed, text)
            figures[kind.__name__, "refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{kind.__name__}, seed {seed}: {type(error).__name__}: {error}") from error
        else:  # what loads is whole, finite and positive
            assert model.state_dict().keys() == reference.keys(), (kind, seed)
            for name, tensor in load_file(folder / WEIGHTS).items():
                assert_close(model.state_dict()[name], tensor.float(), rtol=0, atol=0)
                assert tensor.isfinite().all() and ("precision" not in name or (tensor > 0).all()), (kind, seed)
            bl.predict(model, torch.zeros(1, 1, 2, 2), 1)
            figures[kind.__name__, "loaded"] += 1
        slowest = max(slowest, time.perf_counter() - start)
        assert listing(tmp_path) == before, (kind, seed)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / (1024 if sys.platform == "linux" else 2**20)
    with capsys.disabled():
        print(f"\n{sum(figures.values())} mutations, slowest {slowest:.2f} s, memory grew by {grown:.0f} MB")
        for kind in KINDS:
            loaded, refused = figures[kind.__name__, "loaded"], figures[kind.__name__, "refused"]
            print(f"  {kind.__name__}: {loaded} loaded, {refused} refused")
    assert sum(figures.values()) == MUTATIONS
    assert slowest < 5 and grown < 300
    for kind in KINDS:
        assert figures[kind.__name__, "refused"] >= 10
