"""Ctrl-C and SIGTERM, by which a cluster stops a job, as a flag or at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_stopped_by = [int(signal.SIGINT)]  # the last signal that a scope has caught


@contextmanager
def interruption(*, at_once: bool = False) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM inside the scope into a flag, so that no step is cut in two.

    The second Ctrl-C raises KeyboardInterrupt, the second SIGTERM ends the process. Afterwards the handlers are as
    before. Outside the main thread, which alone gets signals, and for signals that are ignored nothing changes.

    Args:
        at_once: Raise KeyboardInterrupt by the first signal.
    """
    came: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        _stopped_by[:] = [number]
        came.append(number)
        if len(came) > 1 and number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if at_once or len(came) > 1:
            raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, on_signal)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_status() -> int:
    """Return the exit status of a command that was stopped: 143 by SIGTERM, 130 by Ctrl-C."""
    return 128 + _stopped_by[0]
