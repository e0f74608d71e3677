"""What a run begins with: the network of another run or of a posterior, and the metrics of its baseline."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import nn

import zoo
from bayeslayers.storage.training_state import load_checkpoint
from bayeslayers.storage.weight_file import Weights
from recipes.training.run_folder import CHECKPOINT, CONFIG, METRICS, plan_of


def go_on_from(start: str, model: nn.Module) -> None:
    """Give a network the state of a run's, or of a posterior."""
    folder = Path(os.path.expanduser(start))
    run = folder / CHECKPOINT
    try:
        state = load_checkpoint(run).get("model") if run.is_file() else zoo.load(start).state_dict()
    except (OSError, ValueError) as error:
        if folder.exists():
            raise
        reason = f"no folder has this name, and {error} Train that run first, or name another."
        raise FileNotFoundError(f"start must be a run's folder, or a posterior, got {start}: {reason}") from None
    try:
        Weights(run if run.is_file() else folder, state or {}).fill(model)
    except ValueError as error:
        name = zoo.card_of(model).name
        raise ValueError(f"start must be of the run's model, {name}, got {start}: {error}") from None


def read_baseline(folder: str | None) -> dict[str, float | int | str]:
    """Return the metrics of a baseline's run, rounded, with its method."""
    if folder is None:
        return {}
    for name in (METRICS, CONFIG):
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(f"baseline must be a finished run, got {folder} without {name}. Train it first.")
    try:
        metrics = {key: round(value, 5) for key, value in json.loads((Path(folder) / METRICS).read_text()).items()}
        plan = plan_of((Path(folder) / CONFIG).read_text())
    except (ValueError, TypeError, AttributeError, KeyError):
        raise ValueError(
            f"baseline must be a finished run, got {folder}, whose {METRICS} or {CONFIG} is damaged. Train it again."
        ) from None
    return {"optimizer": plan.method} | metrics
