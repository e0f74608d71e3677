"""What a network makes of one or two inputs, everywhere between and around the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayeslayers.checks import at_least_one
from bayeslayers.likelihoods import Likelihood, likelihood_of
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FILLS, _MARKERS = (GREEN, ORANGE, PURPLE, SKY, YELLOW, "#FFFFFF", BLACK), "osD^vPX"
_GRID = 150  # points along each side
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
    generator: torch.Generator | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draw where a classifier of two inputs decides, and beside it the entropy of what it predicts.

    The boundary of the posterior predictive is red, that of single draws of the weights light red, and that of
    a deterministic twin blue.

    Args:
        model: Model with Bayesian layers, from `(n, 2)` to logits `(n, c)`, or of yes `(n,)` or `(n, 1)`.
        x: Examples `(n, 2)`, whose surroundings are drawn.
        y: Their classes, `(n,)`.
        draws: Boundaries of single draws.
        baseline: An ordinary network of the same shapes.
        likelihood: Meaning of the outputs, as for `predict`.
        num_samples: Draws that are averaged.
        class_names: Names of the classes; their numbers if None.
        generator: Source of the draws.
        path: File to write, or None.

    Raises:
        ValueError: If the inputs are not two, or a class lacks a name.
    """
    from matplotlib.lines import Line2D

    at_least_one("draws", draws)
    y = y.detach().flatten().long().cpu()
    if x.dim() != 2 or x.shape[1] != 2 or len(x) != len(y) or len(x) == 0:
        raise ValueError(f"x must hold two inputs for each of the {len(y)} classes in y, got shape {tuple(x.shape)}.")
    names = [str(k) for k in range(int(y.max()) + 1)] if class_names is None else list(class_names)
    if y.min() < 0 or len(names) <= y.max():
        raise ValueError(f"class_names must name the classes {int(y.min())} to {int(y.max())}, got {len(names)} names.")
    likelihood = likelihood or likelihood_of(model)
    sides = [torch.linspace(*_around(x[:, axis]), _GRID) for axis in (0, 1)]
    grid = torch.cartesian_prod(*sides).to(x.dtype)
    prediction = predict(model, grid, num_samples, likelihood=likelihood, generator=generator, batch_size=_CHUNK)

    figure = new_figure(10, 4.8)
    decisions, entropies = figure.subplots(1, 2, sharex=True, sharey=True)

    def contour(axis: Axes, probs: Tensor, **style: Any) -> None:
        for margin in _margins(probs):
            if margin.min() < 0 < margin.max():
                axis.contour(*map(array, sides), array(margin.view(_GRID, _GRID).T), levels=[0], **style)

    for _ in range(draws):
        with sampled(model, generator):
            contour(decisions, _probs(model, grid, likelihood), colors=RED, linewidths=0.8, alpha=0.3)
    if baseline is not None:
        contour(decisions, _probs(baseline, grid, likelihood), colors=BLUE, linewidths=2.0, linestyles="--")
    contour(decisions, prediction.probs, colors=RED, linewidths=2.2)
    greatest = float(torch.tensor(float(max(2, prediction.probs[0].numel()))).log())
    image = entropies.imshow(
        array(prediction.total.view(_GRID, _GRID).T),
        origin="lower",
        extent=(*_around(x[:, 0]), *_around(x[:, 1])),
        aspect="auto",
        cmap=UNCERTAINTY,
        vmin=0,
        vmax=greatest,
    )
    contour(entropies, prediction.probs, colors=RED, linewidths=2.2)
    figure.colorbar(image, ax=entropies, label="entropy (nats)")
    handles = _scatter(decisions, x, y, names, size=26)
    _scatter(entropies, x, y, names, size=9)
    lines = [("posterior predictive", RED, 2.2, "-", 1.0), (f"{draws} draws of the weights", RED, 0.8, "-", 0.4)]
    if baseline is not None:
        lines.append(("deterministic", BLUE, 2.0, "--", 1.0))
    handles += [Line2D([], [], label=n, color=c, lw=w, ls=style, alpha=a) for n, c, w, style, a in lines]
    label(decisions, "Decision boundary", "input 1", "input 2")
    label(entropies, "Entropy of the prediction", "input 1", "")
    legend_below(figure, handles)
    return finish(figure, path)


def regression_bands(
    x: Tensor,
    prediction: Prediction,
    x_train: Tensor | None = None,
    y_train: Tensor | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draw a regression over one input: its mean, and two standard deviations of each uncertainty on either side.

    The inner band is epistemic; the outer one is total, aleatoric variance added; dotted lines are aleatoric alone.

    Args:
        x: Inputs `(n,)` or `(n, 1)`, in any order.
        prediction: Prediction of a Gaussian likelihood for them, of one output.
        x_train: Inputs of examples to show, or None.
        y_train: Their targets.
        path: File to write, or None.

    Raises:
        ValueError: If the prediction is of classes, or of several outputs.
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


def _probs(model: nn.Module, grid: Tensor, likelihood: Likelihood) -> Tensor:
    """Return the probabilities of one pass with the weights as they are."""
    parameter = next(model.parameters(), grid)
    with torch.no_grad(), evaluation_mode(model):
        passes = [likelihood.per_draw(model(part.to(parameter.device)))[0] for part in grid.split(_CHUNK)]
    return torch.cat(passes)


def _margins(probs: Tensor) -> list[Tensor]:
    """Return functions `(n,)` whose zeros are the boundaries: of each class but the first against the rest."""
    flat = probs.flatten(1) if probs.dim() > 1 else probs[:, None]
    if flat.shape[1] == 1:
        return [flat[:, 0] - 0.5]
    (first, second), index = flat.topk(2, dim=1).values.T, flat.argmax(1)
    return [torch.where(index == k, flat[:, k] - second, flat[:, k] - first) for k in range(1, flat.shape[1])]


def _scatter(axis: Axes, x: Tensor, y: Tensor, names: Sequence[str], size: float) -> list[Any]:
    """Draw the examples, and return what the legend shows of each class."""
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
