"""A Laplace approximation after the training of a point estimate, as a configuration describes it."""

from __future__ import annotations

from torch import nn

import bayeslayers as bl
from recipes.data.examples import Examples, InOrder
from recipes.training.config import RunConfig, device_of


def fit_laplace(model: nn.Module, config: RunConfig, data: Examples) -> nn.Module:
    """Return the trained network with the precisions of its Laplace approximation."""
    assert config.laplace
    return bl.laplace(
        model,
        InOrder(data, config.evaluation.batch_size, device_of(config)),
        prior_precision="marglik" if config.laplace.prior_precision is None else config.laplace.prior_precision,
        layers=bl.last_layer if config.laplace.last_layer else None,
        temperature=config.laplace.temperature,
    )
