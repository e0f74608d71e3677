from __future__ import annotations

import os

# Before torch is imported. Some tests fork, and the fork of a process whose OpenMP threads have run waits for them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the Hub but those that have one on loopback

import gc
import struct
import sys

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _compiled_for_one_test():
    """Forget what a test has compiled: torch gives up a function that many compile, as that of `nn.Sequential`."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]:
        dynamo.utils.counters.clear()
        torch.compiler.reset()


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """MNIST and Fashion-MNIST as torchvision lays them out: 300 + 100 noisy copies of a pattern per class."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("MNIST", "FashionMNIST"):
        patterns = 200 * (rng.random((10, 28, 28)) < 0.3)
        for part, n in (("train", 300), ("t10k", 100)):
            labels = np.arange(n, dtype=np.uint8) % 10
            images = np.uint8(patterns[labels] + rng.integers(0, 50, (n, 28, 28)))
            write_idx(root / name / "raw" / f"{part}-images-idx3-ubyte", images)
            write_idx(root / name / "raw" / f"{part}-labels-idx1-ubyte", labels)
    return root


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def new_tensors():
    """Return a function that returns the tensors alive that were not before the test, which it keeps alive."""

    def alive():
        gc.collect()
        return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]

    before = {id(tensor): tensor for tensor in alive()}
    return lambda: [tensor for tensor in alive() if id(tensor) not in before]


@pytest.fixture(scope="module")
def one_thread():
    """Keep to one thread: on tensors this small a second one, where cores are shared, costs 10 times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
