"""Steps by the thousand: precisions stay positive and memory stays flat; and steps under deterministic algorithms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.steps import seeded
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl

WEIGHTS, STEPS = 5000, 200  # a million steps of a weight
OPTIMIZERS = {
    "vogn": lambda net: bl.VOGN(net, 100, lr=1e-3, precision_lr=0.3, generator=seeded()),
    "ivon-price": lambda net: bl.IVON(net, 100, lr=1e-3, beta2=0.7, estimator="price", generator=seeded()),
    "ivon-gradsq": lambda net: bl.IVON(net, 100, lr=1e-3, beta2=0.7, estimator="gradsq", generator=seeded()),
    "noisykfac": lambda net: bl.NoisyKFAC(net, 100, lr=1e-3, generator=seeded()),
}


@pytest.mark.parametrize("name", ["vogn", "ivon-price", "ivon-gradsq"])
def test_precisions_stay_positive_for_a_million_random_steps_of_a_weight(name):
    """Gradients span 28 orders of magnitude."""
    net = bl.BayesLinear(WEIGHTS, 1, bias=False)
    optimizer, generator = OPTIMIZERS[name](net), seeded(1)
    for _ in range(STEPS):
        scale = 10 ** (28 * torch.rand(4, WEIGHTS, generator=generator) - 20)
        x = scale * torch.randn(4, WEIGHTS, generator=generator)

        def closure(x=x):
            optimizer.zero_grad()
            loss = net(x).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        for key, value in net.state_dict().items():
            assert value.isfinite().all(), key
            if key.endswith("_precision"):
                assert (value > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_memory_is_flat_over_20000_steps(name):
    net = nn.Sequential(bl.BayesLinear(8, 16), nn.ReLU(), bl.BayesLinear(16, 3))
    optimizer, generator = OPTIMIZERS[name](net), seeded(1)
    x, y = torch.randn(16, 8, generator=generator), torch.arange(16) % 3

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    for step in range(20_000):
        optimizer.step(closure)
        if step == 2_000:
            before = resident()
    assert resident() - before < 4 * 2**20


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_and_predictions_run_under_deterministic_algorithms(name):
    states = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            torch.manual_seed(0)
            net = nn.Sequential(
                nn.Embedding(9, 4, padding_idx=0), nn.Conv1d(6, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(),
                nn.Flatten(), nn.Linear(16, 3),
            )  # fmt: skip
            net = bl.to_bayesian(net)[0]
            optimizer = OPTIMIZERS[name](net)
            ids, y = torch.randint(9, (8, 6)), torch.arange(8) % 3

            def closure(net=net, optimizer=optimizer, ids=ids, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(net(ids), y)
                loss.backward()
                return loss

            for _ in range(3):
                assert optimizer.step(closure).isfinite()
            prediction = bl.predict(net.eval(), ids, 4, generator=seeded())
            states.append(net.state_dict() | {"probs": prediction.probs})
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(*states, rtol=0, atol=0)
