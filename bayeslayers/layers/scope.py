"""The open scope: what a call computes with in place of the means, and where its curvature goes.

A scope belongs to whoever opened it. It lies in a `ContextVar`, not in the layers: another thread that calls
the model computes with the means, and a copy or a pickle of a model never holds a draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bayeslayers.curvature.accumulate import Leaves
from bayeslayers.layers.perturbation import Perturbation


@dataclass(frozen=True, slots=True, eq=False)
class Scope:
    """What modules find in a scope, each under itself.

    Attributes:
        drawn: The drawn tensors of a module by their parameters' names.
        perturbations: How a layer draws its output, where no weight of it is drawn.
        leaves: Where a layer's curvature goes.
        reads: Where the curvature of a parameter goes that a module reads itself, by the parameter's name in it.
        observes: Layers get their leaves without gradients too, for the model is looked at.
    """

    drawn: Mapping[nn.Module, Mapping[str, Tensor]] = field(default_factory=dict)
    perturbations: Mapping[nn.Module, Perturbation] = field(default_factory=dict)
    leaves: Mapping[nn.Module, Leaves] = field(default_factory=dict)
    reads: Mapping[nn.Module, Mapping[str, Leaves]] = field(default_factory=dict)
    observes: bool = False

    def __contains__(self, module: nn.Module) -> bool:
        """Return whether the scope has something for a module."""
        return any(module in part for part in (self.drawn, self.perturbations, self.leaves, self.reads))


OUTSIDE = Scope()  # what holds outside every scope
NOTHING: Mapping[str, Tensor] = {}

_current: ContextVar[Scope] = ContextVar("bayeslayers_scope", default=OUTSIDE)
_open: set[Scope] = set()  # those of all threads


def current() -> Scope:
    """Return the scope of the calling thread."""
    return _current.get()


@contextmanager
def opened(scope: Scope) -> Iterator[None]:
    """Let the calling thread compute in a scope, and in the one before again after it."""
    before = _current.get()
    _current.set(scope)
    _open.add(scope)
    try:
        yield
    finally:
        _open.discard(scope)
        _current.set(before)


def scope_for(module: nn.Module) -> Scope:
    """Return the scope in which a module computes.

    On a GPU, autograd runs checkpointed modules again in a thread of its own, in which no scope was opened. They
    compute in the open scope that has something for them.

    Args:
        module: The module that asks.

    Raises:
        RuntimeError: If autograd's thread has a choice of several.
    """
    scope = _current.get()
    if scope is not OUTSIDE or torch.compiler.is_compiling() or not _open or torch._C._current_graph_task_id() == -1:
        return scope
    found = [other for other in tuple(_open) if module in other]
    if len(found) > 1 and not all(_agree(found[0], other, module) for other in found[1:]):
        raise RuntimeError(
            f"a checkpointed {type(module).__name__} must be recomputed in one scope, got {len(found)} that are open "
            "for it. Go backward in one thread at a time."
        )
    return found[-1] if found else scope


def _agree(one: Scope, other: Scope, module: nn.Module) -> bool:
    return all(
        getattr(one, part).get(module) is getattr(other, part).get(module)
        for part in ("drawn", "perturbations", "leaves", "reads")
    )
