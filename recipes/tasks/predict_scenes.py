"""What `bayeslayers predict` does with a posterior of segmentations: a mask and a panel of uncertainty per picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayeslayers as bl
import zoo
from bayeslayers.display import printable
from bayeslayers.files import write_atomically
from bayeslayers.plots import segmentation_panels
from recipes.data.names import shortest_ends
from recipes.data.segmentation_files import read_picture
from recipes.reports.scenes import colours_of, mask_png
from recipes.reports.tables import print_table

_METRICS = ("confidence", "total", "aleatoric", "epistemic")
_MOST_PIXELS = 2**20  # of a picture as it is predicted; the mask of a larger one is enlarged
_COMMON = 3  # classes that the table names


def predict_scenes(model: nn.Module, paths: Sequence[Path], arguments: argparse.Namespace) -> int:
    """Write `NAME-mask.png` and `NAME-panel.png` for each picture, and print what they show.

    The mask has the size of the picture, its values are the numbers of the classes, and it shows their colours.

    Args:
        model: Network of the zoo with an output for each pixel.
        paths: The pictures.
        arguments: Options of the command.
    """
    card = zoo.card_of(model)
    names = card.class_names or [str(k) for k in range(card.kwargs.get("num_classes", 2))]
    network = bl.SlidingWindow(model, card.input_size[1:])
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for path, name in zip(paths, _file_names(paths), strict=True):
        image = read_picture(path)
        x = _at_most(image[None].float() / 255, _MOST_PIXELS)
        x = 1 - x if arguments.invert else x
        prediction = _predicted(network, x, arguments.method or card.method, arguments.num_samples, arguments.seed)
        mask, panel = (arguments.output / f"{name}-{kind}.png" for kind in ("mask", "panel"))
        labels = F.interpolate(prediction.labels[None].float(), image.shape[1:], mode="nearest-exact")[0, 0]
        write_atomically(mask, mask_png(labels, names))
        segmentation_panels(x, None, prediction, class_names=names, palette=colours_of(names), path=panel)
        rows.append({"image": str(path), "mask": str(mask), "panel": str(panel)} | _summary(prediction, names))
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    short = shortest_ends([path.absolute().parts[1:] for path in paths])
    lines = [
        (end, _most_common(row["classes"]), *(row[key] for key in _METRICS))
        for end, row in zip(short, rows, strict=True)
    ]
    print_table(("image", "classes", *_METRICS), lines, numbers=4)
    for row in rows:
        print(printable(f"written: {row['mask']} and {row['panel']}"))
    return 0


def _predicted(network: nn.Module, x: Tensor, method: Any, num_samples: int, seed: int) -> bl.Prediction:
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    return bl.predict(network, x.to(device), num_samples, method=method, generator=generator, result_device="cpu")


def _summary(prediction: bl.Prediction, names: Sequence[str]) -> dict[str, Any]:
    """Return the mean uncertainties of a picture's pixels, and the share of each class among them."""
    shares = prediction.labels.flatten().bincount(minlength=len(names)) / prediction.labels.numel()
    means = {key: round(float(getattr(prediction, key).mean()), 6) for key in _METRICS}
    return means | {"classes": {name: round(float(part), 6) for name, part in zip(names, shares, strict=True)}}


def _most_common(shares: dict[str, float]) -> str:
    first = sorted(shares, key=lambda name: -shares[name])[:_COMMON]
    return ", ".join(f"{name} {shares[name]:.0%}" for name in first if shares[name] > 0)


def _file_names(paths: Sequence[Path]) -> list[str]:
    """Return a file name for each picture, with so many folders before its own as tell it from the others.

    >>> _file_names([Path("a/0.png"), Path("b/0.png"), Path("b/1.png"), Path("b/1.jpg")])
    ['a-0', 'b-0', '1.png', '1.jpg']
    """
    stems = [path.absolute().with_suffix("").parts[1:] for path in paths]
    whole = [path.absolute().parts[1:] for path in paths]
    parts = [own if stems.count(stem) > 1 else stem for stem, own in zip(stems, whole, strict=True)]
    return [end.replace("/", "-") for end in shortest_ends(parts)]


def _at_most(x: Tensor, pixels: int) -> Tensor:
    """Return images `(n, c, h, w)`, made smaller if they have more pixels."""
    scale = (pixels / x.shape[-2:].numel()) ** 0.5
    if scale >= 1:
        return x
    size = [max(1, int(extent * scale)) for extent in x.shape[-2:]]
    return F.interpolate(x, size, mode="bilinear", antialias=True)
