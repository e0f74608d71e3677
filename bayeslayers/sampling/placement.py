"""Where a draw is put for modules to find it, and how it is taken away again.

A Bayesian layer reads its draws from `drawn`. Any other module finds a draw under its parameter's own
name: an instance's attribute comes before `nn.Module`'s look-up of parameters, which stay in place, so
that `named_parameters` and `state_dict` know nothing of draws.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from bayeslayers.layers import BayesianLayer

Place: TypeAlias = tuple[nn.Module, str]  # a module and the name that a tensor has there

_ABSENT = object()
_PARAMETERS = "_parameters"


def slots_of(places: Iterable[Place]) -> list[Place]:
    """Return the attributes that draws for parameters at these places change."""
    slots: dict[Place, None] = {}
    for module, key in places:
        if isinstance(module, BayesianLayer):
            slots |= {(module, "drawn"): None, (module, "perturbation"): None}
        else:
            slots |= {(module, key): None, (module, _PARAMETERS): None}
    return list(slots)


@contextmanager
def cleared(slots: Sequence[Place]) -> Iterator[None]:
    """Take draws out of the slots for the scope, and put them back after it."""
    # Past nn.Module.__setattr__, which costs as much as the draw of a small tensor.
    before = [(vars(module), name, vars(module).get(name, _ABSENT)) for module, name in slots]
    try:
        for module, name in slots:
            if isinstance(module, BayesianLayer):
                vars(module)[name] = {} if name == "drawn" else None
            elif name == _PARAMETERS:
                vars(module)[name] = dict(module._parameters)
            else:
                vars(module).pop(name, None)
        refresh(slots)
        yield
    finally:
        for attributes, name, value in before:
            if value is _ABSENT:
                attributes.pop(name, None)
            else:
                attributes[name] = value


def put(place: Place, value: Tensor) -> None:
    """Let a module compute with a value in its parameter's place."""
    module, key = place
    if isinstance(module, BayesianLayer):
        module.drawn[key] = value
        return
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None:
        # Padding stands for nothing, of which there is no uncertainty: its row is not drawn.
        padding = torch.arange(module.num_embeddings, device=value.device) == module.padding_idx
        value = torch.where(padding.unsqueeze(1), module._parameters[key].detach(), value)  # pyright: ignore
    vars(module)[key] = value


def refresh(slots: Iterable[Place]) -> None:
    """Let compiled modules take notice of what has been put.

    torch.compile guards the type of the dict where it found a parameter, but not that no attribute has
    come before it.
    """
    for module, name in slots:
        if name == _PARAMETERS and vars(module).keys() & module._parameters.keys():
            vars(module)[name] = OrderedDict(module._parameters)


def at_means(model: nn.Module) -> AbstractContextManager[None]:
    """Compute with the means inside the scope, also in a scope of draws; it is then that a model can be copied."""
    return cleared(slots_of((module, key) for module in model.modules() for key in module._parameters))
