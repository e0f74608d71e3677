"""Images beside their predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayeslayers.plots.canvas import (
    BLUE,
    GREY,
    ORANGE,
    RED,
    UNCERTAINTY,
    array,
    finish,
    legend_below,
    new_figure,
    short,
)
from bayeslayers.plots.canvas import palette as default_palette
from bayeslayers.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BARS = 12  # classes that fit below an image
_VOID = "#E5E5E5"


def predictive_panels(
    rows: Sequence[tuple[str, Tensor, Prediction]],
    class_names: Sequence[str],
    path: str | Path | None = None,
    targets: Sequence[Tensor | None] | None = None,
) -> Figure:
    """Plot images, one row per group, each above the predictive distribution of its classes.

    The bar of the predicted class is blue, or orange where total uncertainty exceeds a quarter
    of its maximum, log(number of classes). Only the 12 most probable classes are shown. A red frame marks an image
    whose predicted class is not its label.

    Args:
        rows: For each group its title, images `(n, c, h, w)` in [0, 1], and their prediction.
        class_names: Names of the classes, under the bars.
        path: File to write, or None.
        targets: For each group the labels `(n,)` of its images, or None where they have none.

    Returns:
        The figure.

    Raises:
        ValueError: If there are not as many labels as images.
    """
    labels = _labels_of(rows, targets)
    columns = max(len(images) for _, images, _ in rows)
    names = [short(name, 12) for name in class_names]
    tall = max(map(len, names)) > 2  # long names are rotated
    figure = new_figure(1.45 * columns + 0.4, (2.75 + 0.5 * tall) * len(rows) + 0.3)
    groups = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    threshold = math.log(len(names)) / 4
    for group, own, (title, images, prediction) in zip(groups, labels, rows, strict=True):
        group.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
        axes = group.subplots(2, columns, height_ratios=[1.25, 1], squeeze=False)
        for axis in axes[:, len(images) :].flat:
            axis.axis("off")
        for column, image in enumerate(images):
            picture, bars = axes[:, column]
            _show(picture, image)
            uncertain = float(prediction.total[column]) > threshold
            label, confidence = int(prediction.labels[column]), float(prediction.confidence[column])
            probs = prediction.probs[column].cpu()
            shown = probs.topk(min(_BARS, len(names))).indices.sort().values.tolist()
            colours = [(ORANGE if uncertain else BLUE) if k == label else GREY for k in shown]
            bars.bar(range(len(shown)), array(probs[shown]), color=colours)
            truth = label if own is None else int(own[column])
            wrong = truth != label
            told = f"{names[label]}: {confidence:.0%}" + f", is {names[truth]}" * wrong
            bars.set_title(told, fontsize=9, color=RED if wrong else colours[shown.index(label)])
            if wrong:
                picture.spines[:].set(visible=True, color=RED, linewidth=3)
            bars.set_xticks(range(len(shown)), [names[k] for k in shown], fontsize=6, rotation=90 * tall)
            bars.set_ylim(0, 1)
            bars.set_yticks([0, 1] if column == 0 else [])
            bars.set_xlabel(f"entropy {float(prediction.total[column]):.2f}", fontsize=7)
            bars.tick_params(labelsize=6, length=0)
            bars.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        f"Bars: predictive distribution. Orange: uncertain, entropy above {threshold:.2f} nats. Blue: confident."
        + " Red frame: another class than the label." * any(own is not None for own in labels),
        fontsize=9,
    )
    return finish(figure, path)


def _labels_of(
    rows: Sequence[tuple[str, Tensor, Prediction]], targets: Sequence[Tensor | None] | None
) -> Sequence[Tensor | None]:
    if targets is None:
        return [None] * len(rows)
    found = [None if own is None else len(own) for own in targets]
    expected = [len(images) for _, images, _ in rows]
    if len(found) != len(rows) or any(n not in (None, size) for n, size in zip(found, expected, strict=True)):
        raise ValueError(f"targets must have {expected} labels, one for each image, or None for a group, got {found}.")
    return targets


def segmentation_panels(
    images: Tensor,
    targets: Tensor | None,
    prediction: Prediction,
    *,
    class_names: Sequence[str] | None = None,
    palette: Sequence[str] | None = None,
    ignore_index: int | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Plot one row per image: the image, its labels, the predicted labels, and the uncertainty.

    The entropy scale goes from 0 to its maximum, log(number of classes). The mutual information of label and
    weights is usually far smaller, so its scale ends at the largest value that occurs. The legend lists the classes
    that occur.

    Args:
        images: `(n, c, h, w)` in [0, 1], grey or RGB.
        targets: Class per pixel, `(n, h, w)`; None where it is unknown, and no labels are shown.
        prediction: Prediction for the images: of classes `(n, c, h, w)`, or binary `(n, h, w)` or `(n, 1, h, w)`.
        class_names: Names of the classes; their numbers if None.
        palette: A matplotlib colour per class; None takes colours that colour-blind readers can distinguish.
        ignore_index: Label of pixels without a class, shown in light grey.
        path: File to write, or None.

    Raises:
        ValueError: If the shapes do not fit, or a class lacks a name or a colour.
    """
    shape = (len(images), *images.shape[-2:])
    _check_pixels(prediction, targets, shape)
    classes = prediction.probs.shape[1] if prediction.likelihood.name == "categorical" else 2
    names = [str(k) for k in range(classes)] if class_names is None else list(class_names)
    colours = default_palette(classes) if palette is None else list(palette)
    if not len(names) == len(colours) == classes:
        raise ValueError(
            f"class_names and palette must have an entry for each of {classes} classes, got {len(names)} and "
            f"{len(colours)}."
        )
    predicted, total, epistemic = (
        values.detach().reshape(shape).cpu() for values in (prediction.labels, prediction.total, prediction.epistemic)
    )
    labels = None if targets is None else _with_void(targets, ignore_index, classes)

    titles = ["image", *["label"] * (labels is not None), "prediction", "entropy", "mutual information"]
    width = 2.3
    height = width * shape[1] / shape[2]
    figure = new_figure(len(titles) * width, (height + 0.1) * len(images) + 1.4)
    ratios = [height] * len(images) + [0.1]
    axes = figure.subplots(len(images) + 1, len(titles), squeeze=False, height_ratios=ratios)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=11)
    for row, image in enumerate(images):
        _show(axes[row, 0], image)
        if labels is not None:
            _show(axes[row, 1], _coloured(labels[row], [*colours, _VOID]))
        _show(axes[row, -3], _coloured(predicted[row], colours))
    _draw_maps(figure, list(axes[:, -2]), total, math.log(classes))
    _draw_maps(figure, list(axes[:, -1]), epistemic, max(float(epistemic.max()), 1e-6))
    for axis in axes[-1, :-2]:
        axis.axis("off")
    occurring = {*predicted.unique().tolist(), *([] if labels is None else labels.unique().tolist())}
    entries = [(colours[k], names[k]) for k in sorted(occurring - {classes})]
    legend_below(figure, _patches(entries + [(_VOID, "ignored")] * (classes in occurring)))
    return finish(figure, path)


def _with_void(targets: Tensor, ignore_index: int | None, classes: int) -> Tensor:
    """Return labels on the CPU, `classes` for ignored ones.

    Raises:
        ValueError: If another label is not a class.
    """
    targets = targets.detach().cpu().long()
    void = targets == ignore_index if ignore_index is not None else torch.zeros_like(targets, dtype=torch.bool)
    if (bad := targets[~void]).numel() and not 0 <= int(bad.min()) <= int(bad.max()) < classes:
        raise ValueError(f"targets must be from 0 to {classes - 1}, got {int(bad.min())} to {int(bad.max())}.")
    return targets.masked_fill(void, classes)


def _check_pixels(prediction: Prediction, targets: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise unless prediction and targets are classes of pixels `(n, h, w)`."""
    likelihood, given = prediction.likelihood, shape if targets is None else tuple(targets.shape)
    if not likelihood.discrete or prediction.total.numel() != math.prod(shape) or given != shape:
        raise ValueError(
            f"targets and prediction must be classes of shape {shape} as the images, got {given} and "
            f"{likelihood.name} of shape {tuple(prediction.total.shape)}."
        )


def _draw_maps(figure: Figure, axes: Sequence[Axes], values: Tensor, greatest: float) -> None:
    """Plot a map of uncertainty on each axis but the last, which gets the colour bar.

    Args:
        figure: The figure.
        axes: One per image, and one more.
        values: Uncertainty per pixel `(n, h, w)`, in nats.
        greatest: Upper end of the colour scale.
    """
    for axis, image in zip(axes, values, strict=False):
        axis.imshow(array(image), cmap=UNCERTAINTY, vmin=0, vmax=greatest)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.colorbar(axes[0].images[0], cax=axes[-1], orientation="horizontal", label="nats")


def _patches(entries: Sequence[tuple[str, str]]) -> list[Any]:
    """Return legend handles for colours and names."""
    from matplotlib.patches import Patch

    return [Patch(facecolor=colour, edgecolor=GREY, label=short(name)) for colour, name in entries]


def _show(axis: Axes, image: Tensor) -> None:
    """Show an image `(c, h, w)` in [0, 1], grey or RGB, without ticks."""
    axis.imshow(array(image.permute(1, 2, 0)), cmap="gray", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _coloured(labels: Tensor, colours: Sequence[str]) -> Tensor:
    """Return an image `(3, h, w)` of class indices."""
    from matplotlib.colors import to_rgb

    return torch.tensor([to_rgb(colour) for colour in colours], dtype=torch.float64)[labels].permute(2, 0, 1)
