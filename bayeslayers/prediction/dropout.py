"""The method "dropout" of `predict`: dropout masks are drawn, the weights stay at their means."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from bayeslayers.prediction.chunks import AtOnce, Plan, Run


def dropout_draws(model: nn.Module, plan: Plan) -> Iterator[Run]:
    """Draw dropout masks, the weights at their means: Monte-Carlo dropout.

    The masks are those of the `nn.Dropout` modules; what a network calls as a function stays off.
    Source: Gal & Ghahramani 2016 (arXiv 1506.02142).

    Raises:
        ValueError: If no module of the network is a dropout, or one is of a kind without a rule.
    """
    dropouts = [module for module in model.modules() if isinstance(module, _DropoutNd)]
    if not dropouts:
        raise ValueError("model must have nn.Dropout modules for method 'dropout', got none: no draw would differ.")
    for module in dropouts:
        if type(module) not in _MASK_DIMENSIONS:
            raise ValueError(f"method 'dropout' must have a rule for every dropout, got {type(module).__name__}.")
    at_once = AtOnce(model, plan)

    def forward(draws: slice, batch: Tensor) -> Tensor:
        handles = [module.register_forward_hook(partial(_mask, plan.generator)) for module in dropouts]
        try:
            return folded(model, draws, batch)
        finally:
            for handle in handles:
                handle.remove()

    for count in plan.counts(at_once):
        yield partial(at_once.outputs, forward, count)
        at_once.settle()


_MASK_DIMENSIONS = {nn.Dropout: None, nn.Dropout1d: 2, nn.Dropout2d: 2, nn.Dropout3d: 2}  # None: all of the input's


def _mask(generator: torch.Generator | None, module: _DropoutNd, arguments: object, output: Tensor) -> Tensor:
    """Return the output of a dropout in eval mode, dropped: units or whole channels, the rest scaled up."""
    shape = output.shape[: _MASK_DIMENSIONS[type(module)]]
    kept = output.new_empty(shape + (1,) * (output.dim() - len(shape))).bernoulli_(1 - module.p, generator=generator)
    return output * kept / (1 - module.p) if module.p < 1 else torch.zeros_like(output)


def folded(model: nn.Module, draws: slice, batch: Tensor) -> Tensor:
    """Return as many outputs as `draws` counts, `(s, n, *)`, of networks whose noise differs between examples."""
    number = draws.stop - draws.start
    repeated = batch.repeat(number, *[1] * (batch.dim() - 1)) if number > 1 else batch
    return model(repeated).unflatten(0, (number, len(batch)))
