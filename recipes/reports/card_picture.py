"""The picture in a posterior's card: what it predicts for bundled examples of its test data, from a fixed seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

import bayeslayers as bl
import zoo
from bayeslayers.plots.canvas import rendered
from bayeslayers.storage.card import Card
from recipes.data.examples import Points
from recipes.data.slices import load_slice, sliced
from recipes.data.split import Split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_VOID = 255  # the label of pixels without a class, in the bundled scenes


def card_picture(model: nn.Module) -> bytes | None:
    """Return a PNG of a posterior's predictions; None where no bundled examples fit its card.

    Args:
        model: Network that `zoo.load` returned.
    """
    card = zoo.card_of(model)
    name = card.dataset.partition(" ")[0]
    if name not in sliced() or not card.input_size:
        return None
    try:
        return rendered(_figure(model, card, name, torch.Generator().manual_seed(0)))
    except (ValueError, RuntimeError, LookupError):  # examples of that name, but of other shapes, classes or targets
        return None


def _figure(model: nn.Module, card: Card, name: str, generator: torch.Generator) -> Figure:
    data = load_slice(name, card.input_size)
    if isinstance(data, Points) and data.labels.is_floating_point():
        return _intervals(model, data, generator)
    if isinstance(data, Points) and data.x.shape[1:] == (2,):
        names = card.class_names or None
        return bl.plots.decision_boundary(
            model, data.x[:200], data.labels[:200], generator=generator, class_names=names
        )
    if len(card.input_size) == 1:
        examples = data.inputs(slice(None)), data.targets
        return bl.plots.reliability_diagram(bl.evaluate(model, examples, generator=generator))
    assert isinstance(data, Split)
    if data.labels.dim() == 3:
        images = data.inputs(slice(0, 2))
        prediction = bl.predict(model, images, 8, generator=generator)
        return bl.plots.segmentation_panels(
            images, data.labels[:2], prediction, class_names=card.class_names or None, ignore_index=_VOID
        )
    images = data.inputs(slice(0, 8))
    groups = {name: images, "turned by a quarter": images.rot90(1, (2, 3))}
    rows = [(title, x, bl.predict(model, x, 32, generator=generator)) for title, x in groups.items()]
    classes = card.class_names or [str(k) for k in range(rows[0][2].probs.shape[-1])]
    return bl.plots.predictive_panels(rows, [text.split(" - ")[-1] for text in classes])


def _intervals(model: nn.Module, data: Points, generator: torch.Generator) -> Figure:
    """Draw a regression: bands over a single input, else predictions and their 90 % intervals against targets."""
    if data.x.shape[1] == 1:
        grid = torch.linspace(float(data.x.min()), float(data.x.max()), 300)[:, None]
        figure = bl.plots.regression_bands(grid, bl.predict(model, grid, generator=generator), data.x, data.labels)
        for text in figure.legends[0].get_texts():
            text.set_text(text.get_text().replace("training", "test"))
        return figure
    from matplotlib.figure import Figure

    prediction = bl.predict(model, data.x, generator=generator)
    low, high = prediction.quantile([0.05, 0.95])
    figure = Figure(figsize=(5, 4), layout="constrained")
    axis = figure.subplots()
    y, mean = data.labels.flatten(), prediction.mean.flatten()
    errors = torch.stack([mean - low.flatten(), high.flatten() - mean]).numpy()
    axis.errorbar(y.numpy(), mean.numpy(), errors, fmt="o", ms=3, lw=1, color="#0072B2", label="mean, 90 % interval")
    ends = [float(y.min()), float(y.max())]
    axis.plot(ends, ends, "--", color="black", lw=1, label="equal")
    axis.set(xlabel="target", ylabel="prediction")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure
