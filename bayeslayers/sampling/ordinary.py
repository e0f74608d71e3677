"""Sampled weights in modules that are not Bayesian layers, and in layers whose tensors other modules read.

A parameter of such a module may be uncertain too, as a class token. While a scope that samples or tracks it is open,
the module's class is a subclass in which each parameter is a property. The property returns the sample of the calling
thread's scope, or the parameter itself if there is none, and lets curvature arrive from where it is read.
`named_parameters`, `state_dict`, copies and pickles never see samples.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bayeslayers.curvature.parameter import read as tracked_read
from bayeslayers.layers import BayesianLayer
from bayeslayers.layers.scope import NOTHING, Scope, scope_for

_readers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()  # scopes open for a module
_lock = threading.Lock()


def is_read(module: nn.Module) -> bool:
    """Return whether a module's parameters are read as attributes, not by the forward of a Bayesian layer alone.

    Args:
        module: Any module.
    """
    return module.is_read if isinstance(module, BayesianLayer) else True


@contextmanager
def reading_draws(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let ordinary modules read sampled weights inside the scope; scopes of several threads may overlap."""
    modules = tuple(modules)
    if not modules:
        yield
        return
    with _lock:
        for module in modules:
            _readers[module] = (count := _readers.get(module, 0)) + 1
            if count == 0:
                module.__class__ = _reading(type(module), tuple(module._parameters))
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                _readers[module] -= 1
                if _readers[module] == 0:
                    module.__class__ = type(module).__mro__[1]


@functools.cache
def _reading(kind: type[nn.Module], keys: tuple[str, ...]) -> type[nn.Module]:
    """Return the subclass whose instances read samples, always the same for the same class and parameters."""
    members: Any = {key: _property(key) for key in keys}
    if issubclass(kind, nn.RNNBase):  # keeps a list of its weights, which no sample may enter
        members |= {"_flat_weights": property(_flat_weights, _forget), "_weights_have_changed": _never}
    members |= {"__reduce_ex__": _reduce, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    reading: Any = type(kind.__name__, (kind,), members)
    return reading


def _property(key: str) -> property:
    def read(self: nn.Module) -> Any:
        scope = scope_for(self)
        draw = scope.drawn.get(self, NOTHING).get(key)
        value: Any = self._parameters[key] if draw is None else draw
        leaves = scope.reads.get(self, {}).get(key)
        return value if leaves is None or value is None or not _tracks(scope) else tracked_read(value, leaves)

    return property(read)


def _tracks(scope: Scope) -> bool:
    return torch.is_grad_enabled() or scope.observes


def _flat_weights(self: Any) -> list[Any]:
    return [getattr(self, name) for name in self._flat_weights_names]


def _forget(self: Any, value: object) -> None:
    pass


def _never(self: object) -> bool:
    return False


def _reduce(self: Any, protocol: Any) -> Any:
    """Copy and pickle a module as an instance of its original class."""
    function, arguments, *state = super(type(self), self).__reduce_ex__(protocol)
    if arguments[:1] == (type(self),):
        function, arguments = _blank, (type(self).__mro__[1], *arguments[1:])
    return (function, arguments, *state)


def _blank(kind: type[nn.Module], *arguments: Any) -> nn.Module:
    return kind.__new__(kind, *arguments)
