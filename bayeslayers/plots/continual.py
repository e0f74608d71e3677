"""Plots of a sequence of tasks: how each one is remembered while the next ones are learned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from bayeslayers.plots.canvas import (
    COLOURS,
    GREY,
    LINES,
    UNCERTAINTY,
    array,
    finish,
    label,
    legend_below,
    new_figure,
    short,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def forgetting_curves(curves: Mapping[str, Tensor], path: str | Path | None = None) -> Figure:
    """Plot the accuracy of each task while the later ones are learned: a panel for each task, a curve for each method.

    As Figure 5 of Osawa et al. 2019 (arXiv 1906.02506). The x axis counts tasks, so that methods with different numbers
    of epochs can be compared; a grey line marks where the panel's task begins.

    Args:
        curves: Accuracies `(epochs, tasks)` of each method, from 0 to 1; NaN before a task is seen.
        path: File to write, or None.

    Raises:
        ValueError: If there is no curve, or methods differ in their number of tasks.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    if not curves or len({values.shape[1:] for values in curves.values()}) > 1:
        found = ", ".join(str(tuple(values.shape)) for values in curves.values()) or "none"
        raise ValueError(f"curves must have the shape (epochs, tasks) with one number of tasks, got {found}.")
    tasks = next(iter(curves.values())).shape[1]
    across = min(5, tasks)
    figure = new_figure(2.3 * across, 2.2 * -(-tasks // across) + 0.6)
    axes = figure.subplots(-(-tasks // across), across, sharex=True, sharey=True, squeeze=False)
    for task, axis in enumerate(axes.flat):
        axis.set_visible(task < tasks)
        if task >= tasks:
            continue
        for number, values in enumerate(curves.values()):
            progress = [(epoch + 1) * tasks / len(values) for epoch in range(len(values))]
            style = {"color": COLOURS[number % len(COLOURS)], "ls": LINES[number // len(COLOURS) % len(LINES)]}
            axis.plot(progress, 100 * array(values[:, task]), lw=1.4, **style)
        axis.axvline(task, color=GREY, lw=0.8)
        left, low = task % across == 0, task + across >= tasks
        label(axis, f"task {task + 1}", "tasks learned" if low else "", "accuracy (%)" if left else "")
        axis.set_xlim(0, tasks)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    handles = [
        Line2D([], [], color=COLOURS[k % len(COLOURS)], ls=LINES[k // len(COLOURS) % len(LINES)], label=short(name))
        for k, name in enumerate(curves)
    ]
    legend_below(figure, handles)
    return finish(figure, path)


def accuracy_matrix(matrix: Tensor, path: str | Path | None = None) -> Figure:
    """Plot the accuracy of each task after each task as a table of coloured numbers, in percent.

    Args:
        matrix: `(tasks, tasks)`, row i after task i, column j of task j, from 0 to 1; entries above the diagonal, of
            tasks that are not learned yet, are not shown.
        path: File to write, or None.

    Raises:
        ValueError: If it is not square.
    """
    if matrix.dim() != 2 or len(matrix) != matrix.shape[1]:
        raise ValueError(f"matrix must have a row and a column for each task, got the shape {tuple(matrix.shape)}.")
    import numpy as np

    tasks = len(matrix)
    shown = np.where(np.tri(tasks, dtype=bool), 100 * array(matrix), np.nan)
    figure = new_figure(0.55 * tasks + 1.6, 0.42 * tasks + 1.2)
    axis = figure.subplots()
    image = axis.imshow(shown, cmap=UNCERTAINTY, aspect="auto")
    middle = (np.nanmin(shown) + np.nanmax(shown)) / 2
    for row, column in zip(*np.nonzero(np.isfinite(shown)), strict=True):
        value = shown[row, column]
        colour = "white" if value < middle else "black"
        axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(tasks), [str(k + 1) for k in range(tasks)])
    axis.set_yticks(range(tasks), [str(k + 1) for k in range(tasks)])
    label(axis, "Accuracy (%)", "of task", "after task")
    figure.colorbar(image)
    return finish(figure, path)
