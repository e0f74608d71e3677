"""The default of `predict`: each layer samples its weights or its outputs, whichever costs less for one batch.

One sample of a linear layer's weights is i o normal values, whatever the batch; one of its outputs on `(n, i)` is n o.
Given its input, the output of such a layer has an exact distribution, independent between its units (Kingma et al.
2015, arXiv 1506.02557). So each example's prediction is distributed as under sampled weights. Samples of different
examples become independent, and a `Prediction` shows nothing of them together.

That is exact only where a layer runs once on one row for each example: positions that share a weight are correlated. A
forward pass at the means, on one example, finds these layers, and each sample checks them again. It sees one example
alone, so an input that has as many rows as the batch by accident, such as a table of positions, is not taken for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from bayeslayers.dtypes import at_least_float32
from bayeslayers.inputs import Batch, split
from bayeslayers.layers import BayesLinear
from bayeslayers.layers.perturbation import Op, Perturbation
from bayeslayers.prediction.chunks import AtOnce, Plan, Run
from bayeslayers.prediction.draws import Networks, network_draws
from bayeslayers.prediction.output_draws import OncePerExample, Outputs, layers_that_draw
from bayeslayers.sampling import posterior
from bayeslayers.sampling.placement import placed

# Costs in nanoseconds, measured on one CPU core; only their ratios matter.
_WEIGHT = 4.0  # of one normal value, its scaling and its mean
_OUTPUT = 5.0  # likewise, with the square root of the variance
_SQUARE = 0.5  # of an input's entry
_PRODUCT = 0.035  # of one multiplication and addition in a matrix product
_CALL = 5e4  # of the operations of one more call


def samples_outputs(rows: int, inputs: int, outputs: int, first: bool) -> bool:
    """Return whether samples of a linear layer's outputs cost less than samples of its weights.

    Args:
        rows: Examples of the batch.
        inputs: The layer's inputs.
        outputs: Its outputs.
        first: Whether its input is the same for all samples: both products are then computed once, and the samples of
            outputs save the product of each sample. Elsewhere they cost a second product, that of the variances.

    Example:
        >>> [samples_outputs(rows, 400, 400, first=False) for rows in (1, 64, 512)]
        [True, True, False]
    """
    product = rows * inputs * outputs * _PRODUCT
    own = _CALL + rows * outputs * _OUTPUT + (-product if first else product + rows * inputs * _SQUARE)
    return own < inputs * outputs * _WEIGHT


def automatic_draws(model: nn.Module, plan: Plan, batch: Batch) -> Iterator[Run]:
    """Sample for one batch: outputs of the layers that `samples_outputs` and the inspection allow, else weights.

    Args:
        model: The network.
        plan: How samples are drawn.
        batch: The batch, the only one that passes through the yielded functions.

    Raises:
        NotOncePerExampleError: By the yielded functions, if a layer runs otherwise than in the inspection.
    """
    at_once = AtOnce(model, plan)
    networks = Networks(model, plan, _chosen(model, batch, at_once))
    if at_once.inspected:
        at_once.settle(networks.bytes)
    return network_draws(networks, plan, at_once)


def _chosen(model: nn.Module, batch: Batch, at_once: AtOnce) -> Mapping[Any, Outputs]:
    """Return the distributions of the outputs to sample; empty where no layer gains."""
    sites = list(posterior(model))
    first, rows = sites[0].module, len(batch)
    found = {
        layer: {key: at_least_float32(site.precision).reciprocal() for key, site in own.items()}
        for layer, own in layers_that_draw(sites).items()
        if isinstance(layer, BayesLinear)
        and not layer.is_read
        and samples_outputs(rows, layer.in_features, layer.out_features, layer is first)
    }
    if not found:
        return {}
    seen: dict[nn.Module, _Seen] = {layer: _Seen() for layer in found}
    try:
        with placed(sites, {}, seen), at_once.inspecting(rows):
            model(split(batch, 1)[0])
    except Exception:  # such as a network that does not take one example alone: it shows in the samples if it matters
        return {}
    once = [layer for layer in found if seen[layer].shapes == [(1,)]]
    return {layer: OncePerExample(found[layer], rows, layer is first) for layer in once}


class _Seen(Perturbation):
    """Notes the rows on which a layer runs, and lets it compute with its means."""

    def __init__(self) -> None:
        super().__init__("local", None)
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, op: Op, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.shapes.append(tuple(input.shape[:-1]))
        return op(input, weight, bias)
