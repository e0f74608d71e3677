"""The metrics of a card beside its baseline's, one panel each: the picture of a posterior without test data at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslayers.plots.canvas import BLUE, GREY, finish, new_figure, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {  # with the better direction
    "accuracy": "accuracy ↑",
    "miou": "mIoU ↑",
    "rmse": "RMSE ↓",
    "nll": "NLL ↓",
    "brier": "Brier ↓",
    "ece": "ECE ↓",
}


def metric_bars(metrics: Mapping[str, Any], baseline: Mapping[str, Any], path: str | Path | None = None) -> Figure:
    """Plot the usual metrics as bars from zero, a panel each: accuracy, mIoU, RMSE, NLL, Brier, ECE.

    Args:
        metrics: Metrics by name, as a card has them; others than the usual ones are left out.
        baseline: The same of its baseline, whose `optimizer` is its label; empty for none.
        path: File to write, or None.

    Raises:
        ValueError: If no usual metric is finite.
    """
    shown = [name for name in _TITLES if _is_finite(metrics.get(name))]
    if not has_bars(metrics):
        raise ValueError(f"metrics must hold one of {', '.join(_TITLES)}, got {', '.join(metrics)[:200] or 'nothing'}.")
    figure = new_figure(1.35 * len(shown) + 0.6, 2.6)
    other = short(str(baseline.get("optimizer", "baseline")), 10)
    for axis, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        heights = {"posterior": metrics[name]}
        heights |= {other: baseline[name]} if _is_finite(baseline.get(name)) else {}
        bars = axis.bar(list(heights), list(heights.values()), color=[BLUE, GREY][: len(heights)], width=0.6)
        axis.bar_label(bars, [f"{height:.3g}" for height in heights.values()], fontsize=8, padding=2)
        axis.set_title(_TITLES[name], fontsize=10)
        axis.margins(x=0.3, y=0.15)
        axis.axhline(0, color="black", lw=0.8)
        axis.tick_params(labelsize=8, length=0)
        axis.set_yticks([])
        axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
    return finish(figure, path)


def has_bars(metrics: Mapping[str, Any]) -> bool:
    """Return whether `metric_bars` has something to show of these metrics."""
    return any(_is_finite(metrics.get(name)) for name in _TITLES)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
