"""State that threads share when they use one model: its eval mode, who may train it, and process-wide settings.

Posterior samples belong to one thread (`layers.scope`). A module's flag `training` and the means do not: a
prediction needs both unchanged, and a training step changes the means. So predictions run concurrently, and
predictions and optimiser steps wait for each other.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

from torch import nn

_PATIENCE = 300.0  # seconds that a prediction waits for a training step


@dataclass(frozen=True, eq=False)
class _Use:
    """One thread's use of a model."""

    thread: int
    model: nn.Module
    trains: bool

    def excludes(self, other: _Use) -> bool:
        """Return whether two uses must not overlap: they belong to two threads, and one trains a shared module."""
        if self.thread == other.thread or not (self.trains or other.trains):
            return False
        return self.model is other.model or not set(self.model.modules()).isdisjoint(other.model.modules())


_changed = threading.Condition()
_uses: list[_Use] = []
_waiting: list[_Use] = []  # training steps, which take precedence over predictions that have not begun


@contextmanager
def in_use(model: nn.Module, *, trains: bool) -> Iterator[None]:
    """Use a model inside the scope, waiting until no other thread's use excludes it; scopes of one thread nest.

    Args:
        model: The model.
        trains: Whether its posterior changes, or gradients of it are recorded.

    Raises:
        RuntimeError: If a prediction has waited minutes for a training step.
    """
    use = _Use(threading.get_ident(), model, trains)
    with _changed:
        nested = any(other.thread == use.thread for other in _uses)
        if trains:
            _waiting.append(use)
            try:
                _changed.wait_for(lambda: not any(use.excludes(other) for other in _uses))
            finally:
                _waiting.remove(use)
        elif not _changed.wait_for(lambda: not _is_blocked(use, nested), timeout=_PATIENCE):
            raise RuntimeError(
                f"model must not be in a training step of another thread, but was for {_PATIENCE:.0f} s. "
                "Predict with a copy.deepcopy of the model."
            )
        _uses.append(use)
    try:
        yield
    finally:
        with _changed:
            _uses.remove(use)
            _changed.notify_all()


def _is_blocked(use: _Use, nested: bool) -> bool:
    return any(use.excludes(other) for other in _uses) or (
        not nested and any(use.excludes(other) for other in _waiting)
    )


_modes: weakref.WeakKeyDictionary[nn.Module, list[int]] = weakref.WeakKeyDictionary()  # scopes, and the mode before
_modes_lock = threading.Lock()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode inside the scope, and restore the mode of each module after it.

    If scopes of several threads overlap, the last one to end restores the modes.
    """
    modules = list(model.modules())
    with _modes_lock:
        for module in modules:
            _modes.setdefault(module, [0, module.training])[0] += 1
        if any(module.training for module in modules):
            model.eval()
    try:
        yield
    finally:
        with _modes_lock:
            for module in modules:
                _modes[module][0] -= 1
                if _modes[module][0] == 0:
                    before = bool(_modes.pop(module)[1])
                    if module.training != before:
                        module.training = before


class Shared:
    """A process-wide setting, made when the first thread needs it and undone when the last one has finished.

    Args:
        make: Returns the scope of the setting.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[object]]):
        self._make = make
        self._lock, self._count, self._stack = threading.Lock(), 0, ExitStack()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the setting inside the scope."""
        with self._lock:
            if self._count == 0:
                self._stack.enter_context(self._make())
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if self._count == 0:
                    self._stack.close()
