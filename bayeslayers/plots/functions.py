"""Predictions of a network with one or two inputs, over a grid around the data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bayeslayers.checks import at_least_one
from bayeslayers.likelihoods import Likelihood, likelihood_of
from bayeslayers.outputs import TensorNetwork
from bayeslayers.plots.canvas import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    UNCERTAINTY,
    YELLOW,
    array,
    finish,
    label,
    legend_below,
    new_figure,
    short,
)
from bayeslayers.prediction import Prediction, predict
from bayeslayers.sampling import evaluation_mode, sampled
from bayeslayers.unwrap import unwrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FILLS, _MARKERS = (GREEN, ORANGE, PURPLE, SKY, YELLOW, "#FFFFFF", BLACK), "osD^vPX"
_CHUNK = 4096  # points of a forward pass


def decision_boundary(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    draws: int = 20,
    baseline: nn.Module | None = None,
    likelihood: Likelihood | None = None,
    num_samples: int = 64,
    class_names: Sequence[str] | None = None,
    names: tuple[str, str] = ("posterior predictive", "deterministic"),
    title: str | None = None,
    grid: int = 150,
    generator: torch.Generator | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Plot the decision boundary of a classifier of two inputs, and the entropy of its predictions.

    The boundary of the posterior predictive is red, those of single posterior samples are light red, and that of
    a deterministic baseline is blue. The baseline's entropy has its own panel.

    Args:
        model: Model with Bayesian layers, from `(n, 2)` to logits `(n, c)`, or binary logits `(n,)` or `(n, 1)`.
        x: Examples `(n, 2)`; the plot covers their surroundings.
        y: Their classes, `(n,)`.
        draws: Number of single posterior samples whose boundaries are plotted.
        baseline: An ordinary network with the same input and output shapes.
        likelihood: Meaning of the outputs, as for `predict`.
        num_samples: Posterior samples that are averaged.
        class_names: Names of the classes; their numbers if None.
        names: Names of the model and of the baseline.
        title: Title over all panels, or None.
        grid: Points along each side at which the networks are evaluated.
        generator: Source of the samples.
        path: File to write, or None.

    Raises:
        ValueError: If there are not two inputs, or a class lacks a name.
    """
    at_least_one("draws", draws)
    at_least_one("grid", grid)
    y = y.detach().flatten().long().cpu()
    classes = _class_names(x, y, class_names)
    likelihood, model = likelihood or likelihood_of(model), unwrapped(model)
    plane = _Plane.around(x, grid)
    prediction = predict(
        model, plane.points, num_samples, likelihood=likelihood, generator=generator, batch_size=_CHUNK
    )
    shown = [(names[0], prediction.probs, prediction.total, _STYLES[0])]
    if baseline is not None:
        shown.append((names[1], *_one_pass(baseline, plane.points, likelihood), _STYLES[1]))
    figure = new_figure(5.0 * (1 + len(shown)), 4.8)
    if title is not None:
        figure.suptitle(title)
    decisions, *maps = figure.subplots(1, 1 + len(shown), sharex=True, sharey=True)
    for _ in range(draws):
        with sampled(model, generator):
            plane.draw_boundary(decisions, _one_pass(model, plane.points, likelihood)[0], _STYLE_OF_A_SAMPLE)
    for axis, (name, probs, entropy, style) in zip(maps, shown, strict=True):
        plane.draw_map(axis, entropy, math.log(max(2, probs[0].numel())))
        _scatter(axis, x, y, classes, size=9)
        label(axis, f"Entropy, {short(name)}" if baseline is not None else "Predictive entropy", "input 1", "")
        plane.draw_boundary(decisions, probs, style)
        plane.draw_boundary(axis, probs, style)
    figure.colorbar(maps[0].images[0], ax=maps, label="entropy (nats)")
    handles = _scatter(decisions, x, y, classes, size=26)
    lines = [(name, style) for name, _, _, style in shown]
    lines.insert(1, (f"{draws} posterior samples", {**_STYLE_OF_A_SAMPLE, "alpha": 0.4}))
    label(decisions, "Decision boundary", "input 1", "input 2")
    legend_below(figure, handles + [_line(name, style) for name, style in lines])
    return finish(figure, path)


_STYLES: tuple[dict[str, Any], ...] = (
    {"colors": RED, "linewidths": 2.2},
    {"colors": BLUE, "linewidths": 2.0, "linestyles": "--"},
)
_STYLE_OF_A_SAMPLE: dict[str, Any] = {"colors": RED, "linewidths": 0.8, "alpha": 0.3}


def _class_names(x: Tensor, y: Tensor, class_names: Sequence[str] | None) -> list[str]:
    """Check examples of two inputs, and return a name for each class."""
    if x.dim() != 2 or x.shape[1] != 2 or len(x) != len(y) or len(x) == 0:
        raise ValueError(f"x must hold two inputs for each of the {len(y)} classes in y, got shape {tuple(x.shape)}.")
    names = [str(k) for k in range(int(y.max()) + 1)] if class_names is None else list(class_names)
    if y.min() < 0 or len(names) <= y.max():
        raise ValueError(f"class_names must name the classes {int(y.min())} to {int(y.max())}, got {len(names)} names.")
    return names


def _line(name: str, style: Mapping[str, Any]) -> Any:
    """Return the legend handle of a boundary, from the style of its contour."""
    from matplotlib.lines import Line2D

    line = {"color": style["colors"], "linewidth": style["linewidths"], "linestyle": style.get("linestyles", "-")}
    return Line2D([], [], label=short(name), alpha=style.get("alpha", 1.0), **line)


class _Plane(NamedTuple):
    """The rectangle of inputs that is plotted.

    Attributes:
        sides: Coordinates along each axis, `(grid,)` each.
        points: All their pairs `(grid * grid, 2)`.
    """

    sides: list[Tensor]
    points: Tensor

    @classmethod
    def around(cls, x: Tensor, grid: int) -> _Plane:
        """Return the rectangle around examples `(n, 2)`."""
        sides = [torch.linspace(*_around(x[:, axis]), grid) for axis in (0, 1)]
        return cls(sides, torch.cartesian_prod(*sides).to(x.dtype))

    def draw_boundary(self, axis: Axes, probs: Tensor, style: Mapping[str, Any]) -> None:
        """Plot the lines where the most probable class changes, from probabilities at the points."""
        for margin in _margins(probs):
            if margin.min() < 0 < margin.max():
                axis.contour(*map(array, self.sides), array(self._as_image(margin)), levels=[0], **style)

    def draw_map(self, axis: Axes, entropy: Tensor, greatest: float) -> None:
        """Plot the entropy `(grid * grid,)`, in nats, as colours from 0 to its maximum."""
        ends = [float(side[end]) for side in self.sides for end in (0, -1)]
        axis.imshow(
            array(self._as_image(entropy)),
            origin="lower",
            extent=tuple(ends),  # pyright: ignore[reportArgumentType]
            aspect="auto",
            interpolation="bilinear",
            cmap=UNCERTAINTY,
            vmin=0,
            vmax=greatest,
        )

    def _as_image(self, values: Tensor) -> Tensor:
        return values.view(len(self.sides[0]), len(self.sides[1])).T


def regression_bands(
    x: Tensor,
    prediction: Prediction,
    x_train: Tensor | None = None,
    y_train: Tensor | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Plot a regression over one input: its mean, and two standard deviations of each uncertainty on either side.

    The inner band is epistemic uncertainty. The outer band is total uncertainty, which adds the aleatoric variance.
    Dotted lines show aleatoric uncertainty alone.

    Args:
        x: Inputs `(n,)` or `(n, 1)`, in any order.
        prediction: Prediction of a Gaussian likelihood for them, of one output.
        x_train: Inputs of training examples to show, or None.
        y_train: Their targets.
        path: File to write, or None.

    Raises:
        ValueError: If the prediction is one of classes, or of several outputs.
    """
    if prediction.likelihood.discrete or prediction.mean.numel() != x.numel() or x.numel() != len(x):
        raise ValueError(
            f"prediction must be of one real target for each of the {x.numel()} inputs, got "
            f"{prediction.likelihood.name} of shape {tuple(prediction.mean.shape)}."
        )
    if (x_train is None) != (y_train is None):
        raise ValueError("x_train and y_train must be given together, got one of them.")
    order = x.flatten().argsort().cpu()
    at, mean = (array(part.flatten().cpu()[order]) for part in (x, prediction.mean))
    total, aleatoric, epistemic = (
        2 * array(part.flatten().cpu()[order]) ** 0.5
        for part in (prediction.total, prediction.aleatoric, prediction.epistemic)
    )
    figure = new_figure(7, 4.6)
    axis = figure.subplots()
    handles: list[Any] = [
        axis.fill_between(at, mean - total, mean + total, color=SKY, alpha=0.35, lw=0, label="total, ±2 sd"),
        axis.fill_between(
            at, mean - epistemic, mean + epistemic, color=ORANGE, alpha=0.6, lw=0, label="epistemic, ±2 sd"
        ),
        axis.plot(at, mean - aleatoric, ":", color=BLUE, lw=1.2, label="aleatoric, ±2 sd")[0],
        axis.plot(at, mean, color=RED, lw=2, label="mean")[0],
    ]
    axis.plot(at, mean + aleatoric, ":", color=BLUE, lw=1.2)
    if x_train is not None and y_train is not None:
        places = array(x_train.flatten()), array(y_train.flatten())
        handles.append(axis.scatter(*places, s=12, color=BLACK, zorder=3, label="training examples"))
    label(axis, "Regression", "input", "target")
    legend_below(figure, handles)
    return finish(figure, path)


def _around(values: Tensor) -> tuple[float, float]:
    """Return the range of the values with a third of it on either side."""
    low, high = float(values.min()), float(values.max())
    margin = (high - low) / 3 or 1.0
    return low - margin, high + margin


def _one_pass(model: nn.Module, points: Tensor, likelihood: Likelihood) -> tuple[Tensor, Tensor]:
    """Return probabilities and their entropy from one pass with the current weights."""
    network, parameter = TensorNetwork(unwrapped(model)), next(model.parameters(), points)
    with torch.no_grad(), evaluation_mode(model):
        passes = [likelihood.per_draw(network(part.to(parameter.device))) for part in points.split(_CHUNK)]
    probs, entropies = zip(*passes, strict=True)
    return torch.cat(probs), torch.cat(entropies)


def _margins(probs: Tensor) -> list[Tensor]:
    """Return functions `(n,)` whose zeros are the boundaries: of each class but the first against the rest."""
    flat = probs.flatten(1) if probs.dim() > 1 else probs[:, None]
    if flat.shape[1] == 1:
        return [flat[:, 0] - 0.5]
    (first, second), index = flat.topk(2, dim=1).values.T, flat.argmax(1)
    return [torch.where(index == k, flat[:, k] - second, flat[:, k] - first) for k in range(1, flat.shape[1])]


def _scatter(axis: Axes, x: Tensor, y: Tensor, names: Sequence[str], size: float) -> list[Any]:
    """Plot the examples, and return the legend handles of the classes."""
    points = array(x)
    return [
        axis.scatter(
            *points[(y == k).numpy()].T,
            s=size,
            color=_FILLS[k % len(_FILLS)],
            marker=_MARKERS[(k + k // len(_FILLS)) % len(_MARKERS)],
            edgecolors=BLACK,
            linewidths=0.5,
            zorder=3,
            label=short(name),
        )
        for k, name in enumerate(names)
        if (y == k).any()
    ]
