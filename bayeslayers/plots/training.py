"""Plots of a training run, and of the signal-to-noise ratio of its weights."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bayeslayers.checks import positive
from bayeslayers.files import write_atomically
from bayeslayers.plots.canvas import (
    BLACK,
    BLUE,
    COLOURS,
    array,
    finish,
    label,
    legend_below,
    new_figure,
    rendered,
    short,
)
from bayeslayers.sampling import sites_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

_UNITS = {"loss": "loss (nats)", "nll": "NLL (nats)", "ece": "ECE", "brier": "Brier score", "lr": "learning rate"}
_SPLITS = {"train": "--", "test": "-", "val": "-."}
_COLOURS = 64  # of an animation, beside those of `canvas`
_PALETTE_FRAMES = 8  # that determine these colours
_DECIBELS = (-60.0, 60.0)


def training_curves(
    runs: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path | None = None
) -> Figure:
    """Plot each metric of a run's log over the epochs, one panel for all splits; a constant temperature is omitted.

    Args:
        runs: Rows of a log, as `csv.DictReader` reads them from a run's log.csv: "epoch", and metrics with names
            such as "train_loss" or "test_nll"; or several runs by name.
        path: File to write, or None.

    Raises:
        ValueError: If there is no row, or a row has no epoch.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    named = dict(runs) if isinstance(runs, Mapping) else {"": runs}
    if not named or not all(rows and all("epoch" in row for row in rows) for rows in named.values()):
        raise ValueError("runs must hold rows with an epoch, got a run without. Read a run's log.csv.")
    keys = dict.fromkeys(key for rows in named.values() for row in rows for key in row)
    keys = [key for key in keys if key not in ("epoch", "seconds")]
    temperatures = {row["temperature"] for rows in named.values() for row in rows if row.get("temperature")}
    keys = [key for key in keys if key != "temperature" or len(temperatures) > 1]
    panels = sorted(dict.fromkeys(_split(key)[1] for key in keys), key=("lr", "temperature").__contains__)  # last
    if not panels:
        raise ValueError("runs must hold metrics besides the epoch, got none.")
    across = 2 if len(panels) == 4 else min(3, len(panels))
    down = -(-len(panels) // across)
    figure = new_figure(3.6 * across, 2.8 * down + 0.6)
    figure.suptitle("Training", fontsize=11)
    axes = figure.subplots(down, across, squeeze=False).flat
    for axis, panel in zip(axes, panels, strict=False):
        for number, rows in enumerate(named.values()):
            for split, metric in map(_split, keys):
                if metric == panel:
                    key = f"{split}_{panel}" if split else panel
                    values = [float(row[key]) if row.get(key) not in (None, "") else math.nan for row in rows]
                    style = {"color": COLOURS[number % len(COLOURS)], "ls": _SPLITS.get(split, "-")}
                    epochs = [float(row["epoch"]) for row in rows]
                    axis.plot(epochs, values, marker="o" if len(rows) < 3 else None, ms=5, lw=1.6, **style)
        label(axis, "", "epoch", _UNITS.get(panel, panel.replace("_", " ")))
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    for axis in figure.axes[len(panels) :]:
        axis.remove()
    splits = [split for split in dict.fromkeys(_split(key)[0] for key in keys) if split]
    handles = [Line2D([], [], color=BLACK, ls=_SPLITS[split], label=split) for split in splits]
    handles += [
        Line2D([], [], color=COLOURS[number % len(COLOURS)], label=short(name))
        for number, name in enumerate(named)
        if name
    ]
    if handles:
        legend_below(figure, handles)
    return finish(figure, path)


def _split(key: str) -> tuple[str, str]:
    """Return the data split and the metric of a column of a log.

    >>> _split("train_loss"), _split("lr")
    (('train', 'loss'), ('', 'lr'))
    """
    split, _, metric = key.partition("_")
    return (split, metric) if split in _SPLITS and metric else ("", key)


def training_gif(
    frames: Iterable[Figure | np.ndarray],
    path: str | Path,
    *,
    duration: float = 0.2,
    last: float = 1.5,
) -> Path:
    """Write an animation and return its path; all frames share one palette, so that the file stays small.

    Consecutive equal frames become one that is shown longer.

    Args:
        frames: Figures, or images `(h, w, 3)` of bytes, all of one size.
        path: File to write, .gif.
        duration: Seconds that a frame is shown.
        last: Seconds that the last frame is shown, before the animation starts again.

    Raises:
        ValueError: If there is no frame, sizes differ, or the path does not end in .gif.
    """
    from PIL import Image, ImageColor

    path = Path(path)
    if path.suffix.lower() != ".gif":
        raise ValueError(f"path must end in .gif, got {path}.")
    for name, seconds in (("duration", duration), ("last", last)):
        positive(name, seconds)
    images = [_image(frame) for frame in frames]
    if not images or len({image.size for image in images}) > 1:
        sizes = ", ".join(f"{w} x {h}" for w, h in dict.fromkeys(image.size for image in images)) or "no frame"
        raise ValueError(f"frames must be one or more of one size, got {sizes}.")
    chosen = images[:: -(-len(images) // _PALETTE_FRAMES)] + images[-1:]
    montage = Image.new("RGB", (images[0].width, images[0].height * len(chosen)))
    for number, image in enumerate(chosen):
        montage.paste(image, (0, number * image.height))
    colours = montage.quantize(_COLOURS)
    numbers = np.array(colours.getpalette()).reshape(-1, 3)
    numbers[numbers.sum(1).argmax()] = 255  # the background stays white, not the average of similar colours
    lines = [ImageColor.getrgb(colour) for colour in COLOURS]  # exact, because thin lines would be averaged away
    colours.putpalette([*numbers.ravel().tolist(), *itertools.chain(*lines)])
    first, *rest = [image.quantize(palette=colours, dither=Image.Dither.NONE) for image in images]
    stream = io.BytesIO()
    shown = [*[round(1000 * duration)] * len(rest), round(1000 * last)]
    first.save(stream, "GIF", save_all=True, append_images=rest, duration=shown, loop=0, optimize=True)
    write_atomically(path, stream.getvalue())
    return path


def _image(frame: Figure | np.ndarray) -> Image:
    from PIL import Image

    if not isinstance(frame, np.ndarray):
        return Image.open(io.BytesIO(rendered(frame, dpi=80))).convert("RGB")
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise ValueError(f"frames must be figures or bytes of shape (h, w, 3), got {frame.dtype} {frame.shape}.")
    return Image.fromarray(frame)


def signal_to_noise(model: nn.Module, path: str | Path | None = None) -> Figure:
    """Plot the distribution of each layer's signal-to-noise ratios, in decibels.

        20 log10(abs(mean) sqrt(precision))

    Weights below 0 dB are noise rather than signal, and pruning them costs a network little
    (Blundell et al. 2015, arXiv 1505.05424, Sec. 5.1). Ratios beyond +-60 dB are counted at the ends.

    Args:
        model: Model with Bayesian layers.
        path: File to write, or None.

    Raises:
        ValueError: If no layer is Bayesian.
    """
    layers: dict[str, list[np.ndarray]] = {}
    with torch.no_grad():
        for site in sites_of(model):
            ratio = array(20 * (site.mean.abs().double() * site.precision.double().sqrt()).log10())
            name = site.name.rpartition(".")[0] or site.name
            layers.setdefault(name, []).append(np.clip(ratio, *_DECIBELS).ravel())
    ratios = {name: np.concatenate(parts) for name, parts in layers.items()}
    ends = [min(part.min() for part in ratios.values()), max(part.max() for part in ratios.values())]
    edges = np.linspace(min(ends[0], -1.0), max(ends[1], 1.0), 81)
    figure = new_figure(7.5, 0.42 * len(ratios) + 1.2)
    axis = figure.subplots()
    for row, values in enumerate(ratios.values()):
        height = np.histogram(values, edges)[0]
        axis.bar(edges[:-1], 0.85 * height / height.max(), np.diff(edges), bottom=-row, align="edge", color=BLUE)
        axis.annotate(
            f"{(values < 0).mean():.0%} of {values.size:,}",
            (1.01, -row + 0.1),
            xycoords=("axes fraction", "data"),
            fontsize=8,
        )
    axis.axvline(0, color=BLACK, lw=1, ls="--")
    axis.set_yticks([-row for row in range(len(ratios))], [short(name, 32) for name in ratios], fontsize=8)
    axis.set(xlim=(edges[0], edges[-1]), ylim=(-len(ratios) + 0.9, 1.0))
    axis.annotate("below 0 dB", (1.01, 1.0), xycoords="axes fraction", fontsize=8, va="bottom")
    label(axis, "Signal-to-noise ratio of the weights", "|mean| / standard deviation (dB)", "layer")
    return finish(figure, path)
