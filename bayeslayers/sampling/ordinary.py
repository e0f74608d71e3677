"""Sampled weights in modules that are not Bayesian layers.

A parameter of such a module may be uncertain too, as under IVON. While a scope that samples it is open, the module's
class is a subclass in which each parameter is a property. The property returns the sample of the calling thread's
scope, or the parameter itself if there is none. `named_parameters`, `state_dict`, copies and pickles never see samples.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from bayeslayers.layers.scope import NOTHING, scope_for

_readers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()  # scopes open for a module
_lock = threading.Lock()


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
        draw = scope_for(self).drawn.get(self, NOTHING).get(key)
        return self._parameters[key] if draw is None else draw

    return property(read)


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
