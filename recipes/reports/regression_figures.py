"""What the report of a regression shows: bands over one input, or predictions against targets and their coverage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import bayeslayers as bl
from bayeslayers.plots import regression_bands
from bayeslayers.plots.canvas import BLACK, BLUE, RED, array, finish, label, new_figure
from bayeslayers.prediction import Prediction
from recipes.data.examples import Examples
from recipes.reports.measure import EvaluationRequest, Picture, Section, method_options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST, _GRID = 1000, 300  # rows in a picture, points of a curve


def regression_sections(model: nn.Module, request: EvaluationRequest, data: Examples) -> Sequence[Section]:
    """Return the sections of a report of real targets, one of which a row has; none for several."""
    x, y = data.inputs(slice(0, _MOST)), data.targets[:_MOST]
    if y.shape[1] != 1:
        return []
    prediction = predicted(model, request, x)
    pictures = [
        Picture(against_targets(prediction, y), "Predictions and targets", [["Bars are two standard deviations."]]),
        Picture(
            interval_coverage(prediction, y), "Coverage of intervals", [["On the dashed line they are calibrated."]]
        ),
    ]
    sections = [Section("Predictions", pictures=pictures)]
    if x.shape[1] == 1:
        low, high = float(x.min()), float(x.max())
        grid = torch.linspace(low - (high - low) / 4, high + (high - low) / 4, _GRID)[:, None]
        bands = regression_bands(grid, predicted(model, request, grid), x.cpu(), y.cpu())
        sections += [Section("Bands", pictures=[Picture(bands, "Bands over the input")], layout="wide")]
    return sections


def predicted(model: nn.Module, request: EvaluationRequest, x: Tensor) -> Prediction:
    """Return the prediction that a request asks for."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(request.seed)
    return bl.predict(
        model, x.to(device), request.num_samples, generator=generator, result_device="cpu", **method_options(request)
    )


def against_targets(prediction: Prediction, target: Tensor) -> Figure:
    """Plot predictive means over the targets, with two standard deviations on either side."""
    figure = new_figure(5, 4.4)
    axis = figure.subplots()
    y, mean, bar = (array(values.flatten()) for values in (target, prediction.mean, 2 * prediction.total.sqrt()))
    axis.errorbar(y, mean, bar, fmt="o", ms=3, lw=0.6, color=BLUE, ecolor=BLUE, alpha=0.5)
    ends = [float(target.min()), float(target.max())]
    axis.plot(ends, ends, "--", color=BLACK, lw=1)
    label(axis, "Predictions", "target", "predictive mean")
    return finish(figure, None)


def interval_coverage(prediction: Prediction, target: Tensor) -> Figure:
    """Plot the share of targets inside central intervals over their level."""
    figure = new_figure(5, 4.4)
    axis = figure.subplots()
    z = (target - prediction.mean).abs() / prediction.total.sqrt()
    levels = torch.linspace(0.02, 0.98, 49)
    shares = [float((z <= torch.special.ndtri((1 + level) / 2)).float().mean()) for level in levels]
    axis.plot([0, 1], [0, 1], "--", color=BLACK, lw=1)
    axis.plot(array(levels), shares, color=RED, lw=2)
    label(axis, "Coverage", "level of the central interval", "share of targets inside")
    return finish(figure, None)
