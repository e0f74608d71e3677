"""A posterior folder of release 0.1.0, byte for byte as its wheel had it, still loads, predicts and verifies."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from recipes.data.slices import load_slice
from recipes.reports.verify import verify

OLD = Path(__file__).parents[1] / "support/old_posterior"
SHA256 = {
    "README.md": "8b72d3a703db92357ea04ce3855340b7eafcf85cbd1e06772aff22bafc912c2e",
    "config.json": "f84234e7e0060e47a7bdb208a3b992aec8f2acd21e8f88d4bd33d3838452e221",
    "model.safetensors": "bae2568a9d8fe116cba3937e6088bc5e9aeda7a488e4555df21b04926038a1d2",
}


def test_the_folder_is_the_old_one():
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in OLD.iterdir()} == SHA256


def test_an_old_posterior_loads_and_predicts():
    model, data = zoo.load(OLD), load_slice("blobs")
    card = zoo.card_of(model)
    assert (card.name, card.builder, card.likelihood, card.format_version) == ("mlp-blobs", "mlp", "bernoulli", 1)
    prediction = bl.predict(model, data.x, 16, method="sample", generator=torch.Generator().manual_seed(0))
    assert (prediction.labels == data.labels).float().mean() > 0.98
    assert_close(model.output.weight_precision.mean(), torch.tensor(25.6860), rtol=1e-4, atol=0)


def test_an_old_posterior_loads_into_a_network_of_ones_own():
    net = zoo.create("mlp", num_classes=1, input_size=[2], widths=[128])
    bl.load_posterior(OLD, net)
    expected = zoo.load(OLD).state_dict()
    assert net.state_dict().keys() == expected.keys()
    assert_close(dict(net.state_dict()), dict(expected), rtol=0, atol=0)


def test_an_old_posterior_verifies():
    checks = verify(str(OLD))
    assert len(checks) > 3 and all(check.ok for check in checks)
