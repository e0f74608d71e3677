"""What a checkpoint must hold before a run continues from it: whoever wrote it, its content is checked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayeslayers.storage.card import PosteriorError

_REDUCED = ("_inverse", "_root")  # ends of the names of what may have a low rank


@contextmanager
def in_a_sentence(path: Path) -> Iterator[None]:
    """Turn what torch raises for a state that does not fit, or a part that is missing, into one sentence."""
    try:
        yield
    except PosteriorError:
        raise
    except KeyError as error:
        raise PosteriorError(f"{path} must be a checkpoint of this run, got one without {error}.") from None
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise PosteriorError(f"{path} must be a checkpoint of this run, got one that does not fit: {reason}.") from None


def check_progress(state: Mapping[str, Any], sums: Mapping[str, float], tensors: Mapping[str, Tensor]) -> None:
    """Check how far a run is, and what it has logged.

    Args:
        state: State of the run.
        sums: Sums over an epoch's steps, whose names the state must have.
        tensors: What else is added up over them, whose names and shapes the state must have.

    Raises:
        ValueError: If something is of another kind.
    """
    for key in ("epoch", "step"):
        if type(state[key]) is not int or state[key] < 0:
            raise ValueError(f"{key} must be an integer >= 0, got {state[key]!r:.40}")
    if state["sums"].keys() != sums.keys() or not all(_is_number(value) for value in state["sums"].values()):
        raise ValueError(f"sums must be numbers named {', '.join(sums)}")
    for name, own in tensors.items():
        found = state[name]
        if not isinstance(found, Tensor) or found.shape != own.shape or not found.isfinite().all():
            raise ValueError(f"{name} must be finite, of shape {tuple(own.shape)}")
    rows = state["rows"]
    if not isinstance(rows, list) or len(rows) != state["epoch"]:
        raise ValueError("rows must be one for each epoch")
    for row in rows:
        if not isinstance(row, dict) or not all(isinstance(key, str) and _is_number(row[key]) for key in row):
            raise ValueError("rows must hold numbers by name")


def check_identity(path: Path, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another configuration.

    Args:
        path: Of the checkpoint.
        state: What it holds.
        identity: What must be as in the run to resume.
    """
    with in_a_sentence(path):
        before = dict(state["identity"])
    for key, value in identity.items():
        if before.get(key) != value:
            raise ValueError(
                f"{key} must be as in the run to resume, {before.get(key)!r}, got {value!r}. "
                "Choose another --output to start a new run."
            )


def check_extent(state: Mapping[str, Any], steps: int, epochs: int, chosen_by: str | None) -> None:
    """Refuse progress beyond the end of the run, and a log without what the best epoch is chosen by.

    Args:
        state: What the checkpoint holds.
        steps: Steps of an epoch.
        epochs: Of the run.
        chosen_by: A column of the log; None for none.
    """
    if state["epoch"] > epochs or state["step"] > steps:
        raise ValueError(
            f"it is at step {state['step']} of epoch {state['epoch'] + 1}, beyond {epochs} epochs of {steps}"
        )
    if any(row.keys() != state["rows"][0].keys() or chosen_by not in {None, *row} for row in state["rows"]):
        raise ValueError(f"rows must have the same columns, with {chosen_by}")


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Check the tensors that an optimizer has loaded: finite, of a parameter's shape or those of a Kronecker factor.

    The inverse and the root of a factor may have a low rank.

    Raises:
        ValueError: If one is not.
    """
    for group in optimizer.param_groups:
        for key, value in group.items():
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{key} of the optimizer must be a number, got nan")
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                _check_tensor(key, value, parameter.shape)


def _check_tensor(key: str, value: Tensor, shape: torch.Size) -> None:
    tall = value.dim() == 2 and key.endswith(_REDUCED) and value.shape[1] <= value.shape[0]
    square = value.dim() == 2 and len(set(value.shape)) == 1
    if value.numel() != 1 and value.shape != shape and not (square or tall):
        raise ValueError(f"{key} of the optimizer must have the shape {tuple(shape)}, got {tuple(value.shape)}")
    if not value.isfinite().all():
        raise ValueError(f"{key} of the optimizer must be finite, got NaN or infinite values")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
