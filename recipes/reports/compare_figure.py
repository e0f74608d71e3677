"""The picture of several training runs: their curves side by side, and their reliability."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslayers.plots.canvas import BLACK, COLOURS, YELLOW, finish, label, legend_below, new_figure, short
from recipes.training.run_folder import REPORT, Column, Run, measured_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = [colour for colour in COLOURS if colour != YELLOW]
_MARKERS = ("", "s", "^", "X", "D")  # of the first seven runs, the next seven, and so on


def draw(runs: Mapping[str, Run], path: str | Path | None = None) -> Figure:
    """Draw the first two metrics against epochs, and accuracy against confidence, a line for each run.

    As Osawa et al. 2019 (arXiv 1906.02506, Fig. 1) show optimisers. The curves' axes hold all but the first quarter
    of the epochs, for later ones differ by little, and the end of each run; what is beyond is cut off. Bins of the
    confidence without examples are left out, and the larger a bin's dot, the more of the examples it holds. Runs whose
    reports have no reliability have no such panel.

    Args:
        runs: By name.
        path: File to write, or None.
    """
    from matplotlib.lines import Line2D

    reliable = any(run.reliability is None or run.reliability for run in runs.values())
    columns = list({column.name: column for run in runs.values() for column in run.columns}.values())[:2]
    figure, styles = new_figure(13 if reliable else 9, 5), _styles(len(runs))
    axes = figure.subplots(1, len(columns) + reliable, squeeze=False)[0]
    held_out = measured_on(runs.values())
    for axis, column in zip(axes, columns, strict=False):
        _draw_metric(axis, runs, styles, column, held_out if column is not columns[0] else "")
    if reliable:
        _draw_reliability(axes[-1], list(runs.values()), styles)
        label(axes[-1], "Reliability (test)", "confidence", "accuracy")
        _name_missing(axes[-1], runs)
    handles = [
        Line2D([], [], color=BLACK, label=held_out),
        Line2D([], [], color=BLACK, ls="--", lw=1, label="training"),
        *[Line2D([], [], color=BLACK, ls=":", lw=1, label="calibrated")] * reliable,
    ]
    for (name, run), style in zip(runs.items(), styles, strict=True):
        handles.append(Line2D([], [], label=short(name, 32) + " (unfinished)" * (not run.finished), lw=2, **style))
    legend_below(figure, handles)
    return finish(figure, path)


def _draw_metric(
    axis: Axes, runs: Mapping[str, Run], styles: Sequence[dict[str, Any]], column: Column, held_out: str
) -> None:
    """Draw a metric against epochs; with that of the training data, unless it is named which examples it is of."""
    keys = (column.name,) if held_out else (column.name, f"train_{column.name}")
    shown = [run for run in runs.values() if column in run.columns]
    below = any(x < 0 for run in shown for key in keys for x in run.curves[key])
    if column.better == "lower" and not below:
        axis.set_yscale("log")
    own = [style for run, style in zip(runs.values(), styles, strict=True) if column in run.columns]
    _draw_curves(axis, shown, own, keys)
    title, unit = short(column.title), f" ({short(column.unit)})" * bool(column.unit)
    scale = ", log scale" * (axis.get_yscale() == "log")
    label(axis, title[:1].upper() + title[1:] + f" ({held_out})" * bool(held_out), "epoch", title + unit + scale)


def _name_missing(axis: Axes, runs: Mapping[str, Run]) -> None:
    """Name runs without a report below the axis."""
    missing = [short(name) for name, run in runs.items() if run.reliability is None]
    if missing:
        without = f"without {REPORT}: {', '.join(missing) if len(missing) < len(runs) else 'all runs'}"
        lines = textwrap.wrap(without, 46, max_lines=3, placeholder=" and others", break_on_hyphens=False)
        axis.set_xlabel("\n".join(["confidence", *lines]))


def _styles(count: int) -> list[dict[str, Any]]:
    """Return colour and marker of each run."""
    turns = [divmod(k, len(_COLOURS)) for k in range(count)]
    return [{"color": _COLOURS[k], "marker": _MARKERS[turn % len(_MARKERS)], "ms": 4} for turn, k in turns]


def _draw_curves(axis: Axes, runs: Sequence[Run], styles: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    """Draw the first metric as a line, and the second, if there is one, as a thin dashed one."""
    from matplotlib.ticker import MaxNLocator

    early, late = max(run.epochs for run in runs) / 4, []
    low = 0 if axis.get_yscale() == "log" else -math.inf
    for run, style in zip(runs, styles, strict=True):
        epochs = run.curves["epoch"]
        markers = style["marker"] or "o" * (len(epochs) == 1), "o" * (len(epochs) == 1)  # a point is no line
        for key, line, width, marker in zip(keys, ("-", "--"), (1.7, 0.9), markers, strict=False):
            marks: dict[str, Any] = style | {"marker": marker, "markevery": max(1, len(epochs) // 8)}
            marks["markerfacecolor"] = style["color"] if line == "-" else "none"
            axis.plot(epochs, run.curves[key], line, lw=width, **marks)
            values = [(epoch, x) for epoch, x in zip(epochs, run.curves[key], strict=True) if x > low]  # and no NaN
            late += [x for epoch, x in values if epoch > early] or [x for _, x in values[-1:]]
    late = [x for x in late if math.isfinite(x)]
    if late:
        _show_values(axis, min(late), max(late))
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def _show_values(axis: Axes, low: float, high: float) -> None:
    """Let an axis of metrics, linear or logarithmic, show those from low to high, with ticks in plain numbers."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    if axis.get_yscale() == "linear":
        margin = 0.06 * (high - low) or 0.01
        axis.set_ylim(low - margin, high + margin)
        return
    margin = (high / low) ** 0.06 if high > low else 1.1
    axis.set_ylim(low / margin, high * margin)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)) if high > 4 * low else MaxNLocator(6))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _draw_reliability(axis: Axes, runs: Sequence[Run], styles: Sequence[dict[str, Any]]) -> None:
    axis.plot([0, 1], [0, 1], ":", color=BLACK, lw=1)
    for run, style in zip(runs, styles, strict=True):
        if run.reliability:
            confidence, accuracy, share = zip(*run.reliability, strict=True)
            axis.plot(confidence, accuracy, lw=1, alpha=0.5, color=style["color"])
            areas = [3 + 80 * x**0.5 for x in share]
            look = {"color": style["color"], "marker": style["marker"] or "o", "edgecolors": "white", "lw": 0.5}
            axis.scatter(confidence, accuracy, areas, alpha=0.7, zorder=2, **look)  # dots of several runs overlap
    axis.set(xlim=(0, 1.03), ylim=(0, 1.03))
    axis.grid(alpha=0.3)
