"""What a conversion in place owes the model's owner: no change on an error, a warning of what stays deterministic."""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bayeslayers.convert.report import ConversionReport

_NAMES = 10  # that a warning lists for one reason


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Undo a conversion in place if the scope raises: classes, attributes and buffers are those from before it.

    Args:
        model: Model that the scope converts. Values inside its tensors are not restored.
    """
    before = [
        (module, type(module), dict(vars(module)), dict(module._buffers))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)  # has no rule, and no attributes to put back
    ]
    try:
        yield
    except BaseException:
        for module, kind, attributes, buffers in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        raise


def warn_of_deterministic(report: ConversionReport) -> None:
    """Warn once of the parameters that a conversion in place left deterministic, with all reasons and the remedy.

    Frozen parameters are not trained at all, and not named.

    Args:
        report: Report of the conversion.
    """
    names: dict[str, list[str]] = defaultdict(list)
    for entry in report.entries:
        if entry.status != "converted" and not entry.frozen:
            names[entry.reason].append(entry.name)
    if not names:
        return
    parts = [f"{_listed(several)} ({reason})" for reason, several in names.items()]
    warnings.warn(
        f"these parameters are trained deterministically, by Adam: {'; '.join(parts)}. optimizer.report lists every "
        "parameter. IVON makes all of them Bayesian; to_bayesian(model, include=..., exclude=..., inplace=True) "
        "chooses the layers beforehand, without this warning.",
        stacklevel=_users_level(),
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(f"'{name}'" for name in names[:_NAMES]) + more


def _users_level() -> int:
    """Return the `stacklevel`, as the caller passes it, of the first frame outside the package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "bayeslayers":
        level, frame = level + 1, frame.f_back
    return level
