"""Pictures of predictions, in colours that colour-blind readers tell apart (Okabe & Ito 2008)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from bayeslayers.predict import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#999999"


def predictive_panels(
    rows: Sequence[tuple[str, Tensor, Prediction]], class_names: Sequence[str], path: str | Path | None = None
) -> Figure:
    """Draw images, one row a group, each over the predictive distribution of its classes.

    The bar of the predicted class is blue, or orange where total uncertainty is above a quarter
    of its greatest value, log(number of classes).

    Args:
        rows: Per group its title, images `(n, c, h, w)` in [0, 1], and their prediction.
        class_names: Short names of the classes, under the bars.
        path: PNG file to write, or None.

    Returns:
        The figure.
    """
    import math

    from matplotlib.figure import Figure

    columns = max(len(images) for _, images, _ in rows)
    figure = Figure(figsize=(1.45 * columns + 0.4, 2.75 * len(rows) + 0.3), layout="constrained")
    groups = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    threshold = math.log(len(class_names)) / 4
    for group, (title, images, prediction) in zip(groups, rows, strict=True):
        group.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
        axes = group.subplots(2, columns, height_ratios=[1.25, 1], squeeze=False)
        for axis in axes[:, len(images) :].flat:
            axis.axis("off")
        for column, image in enumerate(images):
            picture, bars = axes[:, column]
            picture.imshow(image.permute(1, 2, 0).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
            picture.axis("off")
            uncertain = float(prediction.total[column]) > threshold
            label, confidence = int(prediction.labels[column]), float(prediction.confidence[column])
            colours = [GREY] * len(class_names)
            colours[label] = ORANGE if uncertain else BLUE
            bars.bar(range(len(class_names)), prediction.probs[column].cpu().numpy(), color=colours)
            bars.set_title(f"{class_names[label]}: {confidence:.0%}", fontsize=9, color=colours[label])
            bars.set_xticks(range(len(class_names)), class_names, fontsize=6)
            bars.set_ylim(0, 1)
            bars.set_yticks([0, 1] if column == 0 else [])
            bars.set_xlabel(f"entropy {float(prediction.total[column]):.2f}", fontsize=7)
            bars.tick_params(labelsize=6, length=0)
            bars.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        f"Bars: predictive distribution. Orange: uncertain, entropy above {threshold:.2f} nats. Blue: certain.",
        fontsize=9,
    )
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure
