"""A small untrained posterior on disk, and whether a name loads it."""

from __future__ import annotations

import torch
from torch.testing import assert_close

import bayeslayers as bl
import zoo


def network(seed=0, **kwargs):
    torch.manual_seed(seed)
    return uncertain(zoo.create("mlp", **{"widths": [5], "input_size": [1, 4, 4], "num_classes": 3} | kwargs))


def uncertain(model):
    """Return a network after giving it different precisions."""
    with torch.no_grad():
        for site in bl.posterior(model):
            site.precision.uniform_(1.0, 50.0)
    return model


def predicted(model):
    x = torch.linspace(0, 1, 32).reshape(2, 1, 4, 4)
    return bl.predict(model, x, 4, generator=torch.Generator().manual_seed(0)).probs


def saved(folder, seed=0, **fields):
    bl.save_posterior(network(seed), folder, **{"dataset": "digits"} | fields)
    return folder


def same(name, seed=0):
    """Check that a name loads the posterior of a seed."""
    assert_close(predicted(zoo.load(name)), predicted(network(seed)), rtol=0, atol=0)
