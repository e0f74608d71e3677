"""The pass over the data: sums of curvature, the log likelihood, and the number of examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from bayeslayers.curvature.accumulate import Kind
from bayeslayers.curvature.counts import IGNORED
from bayeslayers.curvature.elements import LossFunctions, refuse_empty
from bayeslayers.dtypes import at_least_float32
from bayeslayers.inputs import Batch, call, on_tensors
from bayeslayers.likelihoods import Categorical, Likelihood, sampled_targets
from bayeslayers.likelihoods.fisher import fisher_columns
from bayeslayers.outputs import Output, tensor_output
from bayeslayers.sampling import Site, Tracker, evaluation_mode
from bayeslayers.sampling.units import layers_of

Fisher = Literal["empirical", "sampled", "exact"]
_INPUT = "_input_factor"


@dataclass(frozen=True)
class Question:
    """What the pass computes.

    Attributes:
        likelihood: Meaning of the outputs.
        kind: What is summed for layers that have it; squares for the others.
        fisher: Where the gradients are those of.
        elements_per_example: Elements that an example's loss is a mean over; None to find them.
        output: Which part of what the network returns.
        generator: Source of labels.
    """

    likelihood: Likelihood
    kind: Kind = "squares"
    fisher: Fisher = "empirical"
    elements_per_example: float | None = None
    output: Output | None = None
    generator: torch.Generator | None = None


@dataclass
class Sums:
    """What the pass found, in the units of one log likelihood over all examples.

    Attributes:
        curvature: Sums over examples by the names of the tracker's leaves. Those of input factors are sums of x x^T.
        log_likelihood: log p(data | means), in nats.
        examples: Number of labelled examples.
    """

    curvature: dict[str, Tensor] = field(default_factory=dict)
    log_likelihood: float = 0.0
    examples: int = 0


def one_pass(net: nn.Module, sites: Sequence[Site], batches: Iterator[tuple[Batch, Tensor]], asked: Question) -> Sums:
    """Return the sums over all batches.

    They belong to N times the mean over all elements of the data, so that the batch size does not matter.
    """
    uncertain = {site.mean for site in sites}
    flags = {parameter: parameter.requires_grad for parameter in net.parameters()}
    for parameter in flags:  # no gradient is computed unless it is squared
        parameter.requires_grad_(parameter in uncertain)
    tracker = Tracker(layers_of(net), kind=asked.kind, model=net)
    sums, elements = Sums(), 0.0
    try:
        with torch.enable_grad(), evaluation_mode(net):
            for x, y in batches:
                elements += _add(sums, net, tracker, sites, x, y, asked)
    finally:
        for parameter, flag in flags.items():
            parameter.grad = None
            parameter.requires_grad_(flag)
    if sums.examples == 0:
        raise ValueError("data must hold at least one labelled example, got none.")
    per_element = sums.examples / elements
    sums.log_likelihood *= per_element
    if asked.fisher != "exact":  # which has the units of one log likelihood already
        for name, value in sums.curvature.items():
            sums.curvature[name] = value if name.endswith(_INPUT) else value * per_element
    return sums


def _add(
    sums: Sums, net: nn.Module, tracker: Tracker, sites: Sequence[Site], x: Batch, y: Tensor, asked: Question
) -> float:
    """Add what a batch gives to the sums, and return how many elements its loss is a mean over."""
    refuse_empty(len(y))
    if not (y.is_floating_point() or (y != IGNORED).any()):
        return 0.0
    device = sites[0].mean.device
    y = y.to(device)
    found: dict[str, Tensor] = {}
    with tracker.track(), LossFunctions() as losses:
        output = tensor_output(call(net, on_tensors(lambda part: part.to(device), x)), asked.output)
        loss = asked.likelihood.loss(output, y)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss must be finite, got {loss.item()} on a batch of {len(y)} examples.")
        if asked.fisher == "exact":
            found = _exact(tracker, asked.likelihood, output, y)
            loss.backward()
        elif asked.fisher == "sampled":
            asked.likelihood.loss(output, _sampled_labels(asked, output, y)).backward()
        else:
            loss.backward()
    seen = losses.elements(len(y), asked.elements_per_example)
    if asked.fisher != "exact":
        leaves = {name: leaf.grad for name, leaf in tracker.leaves.items() if leaf.grad is not None}
        found = {n: value * (1 if n.endswith(_INPUT) else seen.number**2) for n, value in leaves.items()}
    _refuse_uncovered(sites, found)
    for name, value in found.items():
        sums.curvature[name] = sums.curvature[name] + value if name in sums.curvature else value.clone()
    if tracker.examples != len(y):
        raise RuntimeError(
            f"dimension 0 of every Bayesian layer's input must run over the {len(y)} examples of the targets, "
            f"got {tracker.examples}. Choose other layers."
        )
    sums.log_likelihood -= loss.item() * seen.number
    sums.examples += seen.examples
    return seen.number


def _exact(tracker: Tracker, likelihood: Likelihood, output: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return the sums that the Fisher information of each example's likelihood gives."""
    ignored = IGNORED if not isinstance(likelihood, Categorical) else likelihood.ignore_index
    counted = None
    if not y.is_floating_point() and y.dim() == 1:
        counted = ((y != IGNORED) & (y != (IGNORED if ignored is None else ignored)))[:, None]
    sums: dict[str, Tensor] = {}
    for column in fisher_columns(likelihood, at_least_float32(output)):
        start = column.to(output.dtype) if counted is None else column.to(output.dtype) * counted
        for name, value in tracker.sums_of((output * start).sum())[0].items():
            if name not in sums:
                sums[name] = value
            elif not name.endswith(_INPUT):  # which no gradient changes
                sums[name] = sums[name] + value
    return sums


def _sampled_labels(asked: Question, output: Tensor, y: Tensor) -> Tensor:
    """Return labels drawn from the output in the place of the data's, but for ignored ones."""
    drawn = sampled_targets(asked.likelihood, at_least_float32(output), asked.generator)
    return torch.where(y == IGNORED, y, drawn.to(y.dtype)) if not y.is_floating_point() else drawn.reshape(y.shape)


def _refuse_uncovered(sites: Sequence[Site], found: dict[str, Tensor]) -> None:
    """Raise if a tensor has a gradient but no curvature, or its curvature is not finite."""
    for site in sites:
        prefix = site.name.removesuffix(site.key)
        own = [name for name in (site.name, f"{prefix}weight{_INPUT}", f"{prefix}block") if name in found]
        if not own and site.mean.grad is not None:
            raise RuntimeError(
                f"parameter '{site.name}' must get its gradient through its own layer, but was used without calling "
                "it. Choose other layers."
            )
        if any(not found[name].isfinite().all() for name in own):
            raise FloatingPointError(f"the squared gradients of '{site.name}' must be finite, got some that are not.")
