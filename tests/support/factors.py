"""Kronecker factors of a network's layers, as a tracker sums them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import bayeslayers as bl
from bayeslayers.sampling import Tracker


def tracked_factors(net: nn.Module, forward: Callable[[], object]) -> dict[str, torch.Tensor]:
    """Return the sums of a function's backward passes, by the leaves' names."""
    layers = {name: m for name, m in net.named_modules() if isinstance(m, bl.BayesianLayer)}
    tracker = Tracker(layers, kind="factors")
    with tracker.track():
        forward()
    return {name: leaf.grad for name, leaf in tracker.leaves.items()}
