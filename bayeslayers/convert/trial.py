"""A trial step of a converted network: every layer whose exact curvature a step of VOGN would refuse."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bayeslayers.convert.report import Refusal
from bayeslayers.curvature.refusal import CurvatureRefusal
from bayeslayers.inputs import Batch, as_batch, call, leaves
from bayeslayers.sampling import Tracker
from bayeslayers.sampling.units import layers_of, reads_of


def refusals_of(net: nn.Module, example_inputs: Any) -> tuple[Refusal, ...]:
    """Return what a step of VOGN would refuse, found by steps of a copy in train mode; each leaves out one refusal.

    Args:
        net: Network with Bayesian layers, left as it is.
        example_inputs: A batch of two examples or more.

    Raises:
        ValueError: If that is no such batch, or the network returns nothing that a gradient goes through.
    """
    batch = as_batch(example_inputs)
    if batch is None or _examples(batch) < 2:
        found = type(example_inputs).__name__ if batch is None else f"{_examples(batch)}"
        raise ValueError(
            f"example_inputs must be a batch of two examples or more, got {found}. Give what bl.predict takes."
        )
    trial = copy.deepcopy(net).train()
    layers, refusals = layers_of(trial), list[Refusal]()
    while (error := _refusal(trial, layers, batch)) is not None:
        refusals.append(Refusal(_leave_out(error.name, layers), error.reason))
    return tuple(refusals)


def _examples(batch: Batch) -> int:
    return len(batch) if not isinstance(batch, Tensor) or batch.dim() else 0


def _refusal(net: nn.Module, layers: dict[str, nn.Module], batch: Batch) -> CurvatureRefusal | None:
    """Return the first refusal of a step with the curvature of some layers, None if there is none."""
    try:
        with torch.random.fork_rng(), torch.enable_grad(), Tracker(layers, model=net).track() as tracker:
            tracker.sums_of(_loss(call(net, batch)))
    except CurvatureRefusal as error:
        return error
    return None


def _loss(output: Any) -> Tensor:
    """Return a loss in which every output with a gradient takes part."""
    terms = [x.float().square().mean() for x in leaves(output) if x.requires_grad]
    if not terms:
        raise ValueError(
            f"the model must return tensors that a gradient goes through for a trial, got {type(output).__name__}. "
            "Give no example_inputs."
        )
    return torch.stack(terms).sum()


def _leave_out(name: str, layers: dict[str, nn.Module]) -> str:
    """Follow a layer or a parameter no longer; return its name, that of the layer for one of the layer's ops."""
    reads = reads_of(layers)
    if name in reads:
        module, key = reads[name]
        module._parameters[key].requires_grad_(False)  # pyright: ignore[reportOptionalMemberAccess]
        return name
    owner = max((path for path in layers if name == path or name.startswith(f"{path}.")), key=len)
    for path in [path for path in layers if path == owner or path.startswith(f"{owner}.")]:
        del layers[path]  # an exclude pattern selects a module with all that is inside it
    return owner
