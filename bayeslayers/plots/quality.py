"""Plots of an evaluation: calibration, errors among confident predictions, and out-of-distribution scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bayeslayers.checks import did_you_mean
from bayeslayers.plots.canvas import (
    BLACK,
    BLUE,
    COLOURS,
    GREY,
    LINES,
    ORANGE,
    array,
    finish,
    label,
    legend_below,
    new_figure,
    short,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayeslayers.evaluate import Evaluation

_BINS = 40  # of a histogram of scores


def reliability_diagram(evaluation: Evaluation, path: str | Path | None = None) -> Figure:
    """Plot accuracy against confidence, bin by bin, above the histogram of confidence.

    Bars that reach the diagonal are calibrated. The histogram names the number of examples in each bin, for an accuracy
    of few examples is uncertain itself. The gap is orange where accuracy is below confidence
    (overconfident), and hatched where it is above (Guo et al. 2017, arXiv 1706.04599, Fig. 1). A bin
    without examples is left empty.

    Args:
        evaluation: Evaluation of a classifier.
        path: File to write, or None.

    Raises:
        ValueError: If the evaluation has no reliability diagram.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    reliability = evaluation.reliability
    if reliability is None:
        raise ValueError(f"evaluation must be of classes to have a reliability, got a {evaluation.likelihood} one.")
    edges, confidence, accuracy, count = (
        array(part) for part in (reliability.edges, reliability.confidence, reliability.accuracy, reliability.count)
    )
    filled = count > 0
    left, width = edges[:-1][filled], np.diff(edges)[filled]
    confidence, accuracy = confidence[filled], accuracy[filled]
    figure = new_figure(5, 6)
    bars, histogram = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
    box = {"width": width, "align": "edge", "edgecolor": "white", "linewidth": 0.6}
    bars.bar(left, accuracy, color=BLUE, **box)
    over, low = confidence > accuracy, np.minimum(confidence, accuracy)
    for which, colour, hatch in ((over, ORANGE, None), (~over, "none", "////")):
        gap = box | {"width": width[which], "edgecolor": "white" if hatch is None else BLACK}
        bars.bar(left[which], abs(confidence - accuracy)[which], bottom=low[which], color=colour, hatch=hatch, **gap)
    bars.plot([0, 1], [0, 1], "--", color=BLACK, lw=1)
    bars.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.02))
    error = evaluation.metrics.get("ece")
    label(bars, "Reliability" if error is None else f"Reliability (ECE {error:.4f})", "", "accuracy")
    share = count[filled] / count.sum()
    histogram.bar(left, share, color=GREY, **box)
    means = (share * confidence).sum(), (share * accuracy).sum()
    histogram.axvline(means[1], color=BLUE, lw=1.5)
    histogram.axvline(means[0], color=BLACK, lw=1.5, ls=":")
    for at, part, number in zip(left + width / 2, share, count[filled], strict=True):
        inside = part > 0.6  # there is no room above
        style = {"va": "top" if inside else "bottom", "color": "white" if inside else BLACK, "zorder": 3}
        histogram.text(
            at, part + (-0.04 if inside else 0.04), f"{number:.0f}", ha="center", rotation=90, size=7, **style
        )
    histogram.set_ylim(0, 1)
    label(histogram, "", "confidence (a number: examples in the bin)", "share of examples")
    handles = [
        Patch(facecolor=BLUE, label="accuracy"),
        Patch(facecolor=ORANGE, label="overconfident by"),
        Patch(facecolor="none", edgecolor=BLACK, hatch="////", label="underconfident by"),
        Line2D([], [], color=BLACK, lw=1, ls="--", label="calibrated"),
        Line2D([], [], color=BLUE, lw=1.5, label=f"mean accuracy {means[1]:.3f}"),
        Line2D([], [], color=BLACK, lw=1.5, ls=":", label=f"mean confidence {means[0]:.3f}"),
    ]
    legend_below(figure, handles)
    return finish(figure, path)


def accuracy_by_confidence(evaluation: Evaluation, path: str | Path | None = None) -> Figure:
    """Plot the accuracy of the predictions whose confidence is at least a threshold, and how many these are.

    A useful confidence makes the curve rise. Thresholds are the edges of the reliability diagram's bins, so that a
    segmentation needs no more memory than a few numbers.
    Source: Lakshminarayanan et al. 2017 (arXiv 1612.01474), section 3.6.

    Args:
        evaluation: Evaluation of a classifier.
        path: File to write, or None.

    Raises:
        ValueError: If the evaluation has no reliability diagram.
    """
    reliability = evaluation.reliability
    if reliability is None:
        raise ValueError(f"evaluation must be of classes to have a confidence, got a {evaluation.likelihood} one.")
    edges, accuracy, count = (array(part) for part in (reliability.edges, reliability.accuracy, reliability.count))
    hits = np.where(count > 0, accuracy, 0) * count
    kept, right = np.cumsum(count[::-1])[::-1], np.cumsum(hits[::-1])[::-1]
    some = kept > 0
    figure = new_figure(5, 4.2)
    axis = figure.subplots()
    axis.plot(
        edges[:-1][some], (right[some] / kept[some]), color=BLUE, marker="o", ms=3, label="accuracy of those kept"
    )
    axis.plot(edges[:-1], kept / kept[0], color=ORANGE, ls="--", label="share that is kept")
    axis.set(xlim=(0, 1), ylim=(0, 1.02))
    label(axis, "Accuracy against confidence", "least confidence", "share")
    legend_below(figure, axis.get_legend_handles_labels()[0])
    return finish(figure, path)


def risk_coverage_curve(evaluations: Evaluation | Mapping[str, Evaluation], path: str | Path | None = None) -> Figure:
    """Plot the error rate of the predictions that are kept when the least confident ones are rejected.

    Source: Geifman & El-Yaniv 2017 (arXiv 1705.08500). Lower is better; the right end is the overall error rate.

    Args:
        evaluations: One evaluation, or several by name.
        path: File to write, or None.

    Raises:
        ValueError: If there is no evaluation, or one has no risk-coverage curve.
    """
    named = evaluations if isinstance(evaluations, Mapping) else {"": evaluations}
    if not named:
        raise ValueError("evaluations must hold one or more, got none.")
    figure = new_figure(5.6, 4.4)
    axis = figure.subplots()
    handles, greatest = [], 0.0
    for k, (name, evaluation) in enumerate(named.items()):
        curve = evaluation.risk_coverage
        if curve is None:
            raise ValueError(
                f"evaluation {name!r} must be of classes to have a risk, got a {evaluation.likelihood} one."
            )
        text = short(name)
        if (area := evaluation.metrics.get("aurc")) is not None:
            text += f"{', ' if text else ''}AURC {area:.4g}"
        colour, line = COLOURS[k % len(COLOURS)], LINES[k // len(COLOURS) % len(LINES)]
        coverage, risk = array(curve.coverage), array(curve.risk)
        marker = "o" if len(risk) == 1 else None
        handles += axis.plot(coverage, risk, line, color=colour, lw=1.8, marker=marker, label=text)
        greatest = max(greatest, float(risk.max()))
    axis.set(xlim=(0, 1), ylim=(0, 1.08 * greatest or 0.01))
    axis.grid(alpha=0.3)
    label(axis, "Errors among the predictions that are kept", "coverage (share that is kept)", "risk (error rate)")
    if any(handle.get_label() for handle in handles):
        legend_below(figure, handles)
    return finish(figure, path)


def score_histograms(evaluation: Evaluation, score: str = "entropy", path: str | Path | None = None) -> Figure:
    """Plot the distribution of a score over in-distribution examples and over each out-of-distribution set.

    All panels have the same bins. The share of examples is on a square-root scale, which keeps tails visible.

    Args:
        evaluation: Evaluation, with or without out-of-distribution sets.
        score: "confidence", "entropy", "epistemic" or "aleatoric".
        path: File to write, or None.

    Raises:
        ValueError: If the evaluation has no such score.
    """
    known = [name for name in evaluation.scores if all(name in scores for scores in evaluation.ood.values())]
    if score not in known:
        raise ValueError(f"score must be one of {', '.join(known)}, got {score!r}.{did_you_mean(score, known)}")
    sets = {"known": array(evaluation.scores[score])}
    sets |= {name: array(scores[score]) for name, scores in evaluation.ood.items()}
    low, high = min(values.min() for values in sets.values()), max(values.max() for values in sets.values())
    edges = np.linspace(min(low, 0.0), high if high > min(low, 0.0) else min(low, 0.0) + 1, _BINS + 1)
    figure = new_figure(6.4, 1.5 * len(sets) + 0.9)
    axes = figure.subplots(len(sets), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for k, (axis, (name, values)) in enumerate(zip(axes, sets.items(), strict=True)):
        share = np.histogram(values, edges)[0] / len(values)
        axis.bar(edges[:-1], share, np.diff(edges), align="edge", color=BLUE if k == 0 else ORANGE)
        axis.axvline(np.median(values), color=BLACK, lw=1.2, ls="--")
        auroc = evaluation.metrics.get(f"{name}/auroc_{score}")
        text = f"{short(name, 40)}: {len(values)} examples" + (f", AUROC {auroc:.3f}" if auroc is not None else "")
        axis.set_title(text, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("function", functions=(np.sqrt, np.square))
    axes[0].set(ylim=(0, 1), yticks=[0, 0.1, 0.5, 1])
    axes[0].set_yticks([0, 0.1, 0.5, 1], ["0", "0.1", "0.5", "1"])
    unit = "" if score == "confidence" else " (nats)"
    axes[-1].set_xlabel(f"{score}{unit}; dashed: the median")
    figure.supylabel("share of examples (square-root scale)", fontsize=10)
    return finish(figure, path)
