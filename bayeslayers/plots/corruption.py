"""The plot of an evaluation on corrupted images: quality against severity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bayeslayers.plots.canvas import BLACK, COLOURS, array, finish, label, legend_below, new_figure, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayeslayers.evaluate import Evaluation

_PANELS = {"accuracy": "accuracy", "nll": "NLL (nats)", "ece": "ECE"}


def corruption_boxes(evaluations: Evaluation | Mapping[str, Evaluation], path: str | Path | None = None) -> Figure:
    """Plot accuracy, NLL and ECE of corrupted images against the severity, one box per evaluation and severity.

    A box spans the quartiles over the kinds of corruption, its whiskers reach the extremes, the dot is the mean.
    Severity 0 is the data without corruption. As Ovadia et al. 2019 (arXiv 1906.02530, Fig. 2) compare methods.

    Args:
        evaluations: One evaluation with corruptions, or several by name, such as a posterior and its baseline.
        path: File to write, or None.

    Raises:
        ValueError: If there is no evaluation, more than eight, or one without corruptions.
    """
    from matplotlib.patches import Patch

    named = evaluations if isinstance(evaluations, Mapping) else {"": evaluations}
    if not 1 <= len(named) <= len(COLOURS):
        raise ValueError(f"evaluations must hold 1 to {len(COLOURS)}, got {len(named)}.")
    figure = new_figure(11, 4)
    panels = dict(zip(_PANELS, figure.subplots(1, len(_PANELS)), strict=True))
    width = 0.8 / len(named)
    kinds = 0
    for k, (name, evaluation) in enumerate(named.items()):
        corruptions, colour = evaluation.corruptions, COLOURS[k]
        if corruptions is None:
            raise ValueError(
                f"evaluation {name!r} must have corruptions, got none. Call evaluate(..., corruptions=True)."
            )
        kinds = len(corruptions.kinds)
        shift = (k - (len(named) - 1) / 2) * width
        for metric, axis in panels.items():
            values = array(corruptions.values[metric])
            places = [severity + shift for severity in range(1, values.shape[1] + 1)]
            boxes = axis.boxplot(
                values, positions=places, widths=0.8 * width, whis=(0, 100), patch_artist=True, manage_ticks=False
            )
            for box in boxes["boxes"]:
                box.set(facecolor=colour, alpha=0.75)
            for line in boxes["medians"]:
                line.set(color=BLACK)
            means = [corruptions.clean[metric], *values.mean(0)]
            axis.plot([shift, *places], means, "-", color=colour, lw=1, marker="o", ms=4.5, mec="white", zorder=3)
    for metric, axis in panels.items():
        axis.set_xticks(range(6), ["clean", "1", "2", "3", "4", "5"])
        axis.set_ylim(0, 1.02 if metric == "accuracy" else None)
        axis.grid(axis="y", alpha=0.3)
        label(axis, "", "severity", _PANELS[metric])
    text = f"{kinds} kind{'s' * (kinds > 1)} of corruption"
    figure.suptitle(f"{text}: quartiles over the kinds (box), extremes (whiskers), mean (dot)", fontsize=11)
    handles = [Patch(facecolor=COLOURS[k], alpha=0.75, label=short(name)) for k, name in enumerate(named) if name]
    if handles:
        legend_below(figure, handles)
    return finish(figure, path)
