"""The command `bayeslayers predict`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.cli.options import add_device, add_json, add_method, add_posterior, add_samples, typed_path

if TYPE_CHECKING:
    from torch import Tensor

    from bayeslayers import Prediction
    from bayeslayers.storage.card import Card

_METRICS = ("confidence", "total", "aleatoric", "epistemic")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `predict`."""
    add_posterior(parser)
    images = "image files of any size, grey or RGB, and folders of them; CSV files of real features"
    parser.add_argument("images", nargs="+", type=typed_path, metavar="IMAGE", help=images)
    folder = "folder for masks and panels, of a posterior of segmentations (%(default)s)"
    parser.add_argument("--output", type=typed_path, default=Path(), metavar="FOLDER", help=folder)
    parser.add_argument("--invert", action="store_true", help="swap black and white first (MNIST is white on black)")
    add_method(parser)
    add_samples(parser)
    add_device(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Predict images, the pixels of scenes, or rows of a CSV file, with uncertainty."""
    paths = _images(arguments.images)
    import torch

    import bayeslayers as bl
    import zoo
    from recipes.tasks.predict_scenes import predict_scenes
    from recipes.training.devices import device_named
    from zoo.networks.segmentation import labels_pixels

    device = device_named(arguments.device or "cpu")
    model = zoo.load(arguments.posterior).to(device)
    card = zoo.card_of(model)
    if card.likelihood == "gaussian" and len(card.input_size) == 1:
        from recipes.tasks.predict_table import predict_rows

        return predict_rows(model, paths, arguments)
    convert = zoo.transforms(model)
    if labels_pixels(card):
        return predict_scenes(model, paths, arguments)
    x = torch.stack([_input(path, convert) for path in paths])
    x = 1 - x if arguments.invert else x
    if advice := _inversion(float(x.mean()), card):
        print("bayeslayers:", advice, file=sys.stderr)
    prediction = bl.predict(
        model,
        x,
        arguments.num_samples,
        generator=torch.Generator(device).manual_seed(arguments.seed),
        batch_size=256,
        method=arguments.method or card.method,  # pyright: ignore[reportArgumentType]
        result_device="cpu",
    )
    names = _class_names(prediction, card)
    rows = [
        {"image": str(path), "label": names[int(prediction.labels[i])]}
        | {key: round(float(getattr(prediction, key)[i]), 6) for key in _METRICS}
        | {"probs": {name: round(float(p), 6) for name, p in zip(names, prediction.probs[i], strict=True)}}
        for i, path in enumerate(paths)
    ]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    from recipes.data.names import shortest_ends
    from recipes.reports.tables import print_table

    short = shortest_ends([path.absolute().parts[1:] for path in paths])
    lines = [(name, row["label"], *(row[key] for key in _METRICS)) for name, row in zip(short, rows, strict=True)]
    print_table(("image", "label", *_METRICS), lines, numbers=4)
    return 0


def _inversion(mean: float, card: Card) -> str:
    """Return what to say of images that look like the negatives of those that a posterior of grey images has seen."""
    known = card.kwargs.get("mean", ())
    if len(known) != 1 or abs(mean - known[0]) < abs(1 - mean - known[0]) + 0.2:
        return ""
    return (
        f"the images' mean is {mean:.2f}, that of the training images {known[0]:.2f}: --invert swaps black and white, "
        "as for ink on paper."
    )


def _class_names(prediction: Prediction, card: Card) -> list[str]:
    """Return the name of each class, its number where the card names none."""
    if prediction.likelihood.name != "categorical" or prediction.mean.dim() != 2:
        raise ValueError(f"posterior must be one of classes, got a {prediction.likelihood.name} one.")
    classes = prediction.probs.shape[1]
    names = card.class_names or [str(k) for k in range(classes)]
    if len(names) != classes:
        raise ValueError(f"posterior's card must name all {classes} classes, got {len(names)} names.")
    return names


def _images(paths: Sequence[Path]) -> list[Path]:
    """Return images once each, and in place of a folder those in it and below, in order, without hidden ones."""
    for path in paths:
        if not (path.is_dir() or path.is_file()):
            raise FileNotFoundError(f"image must be a file, got {path}, which is not there.")
    from zoo.images import images_in

    found: dict[Path, None] = {}
    for path in paths:
        inside = images_in(path) if path.is_dir() else [path]
        if not inside:
            raise FileNotFoundError(f"folder must hold images, got {path} without any.")
        found |= dict.fromkeys(inside)
    return list(found)


def _input(path: Path, convert: Callable[[object], Tensor]) -> Tensor:
    from PIL import ImageOps

    from zoo.images import header

    with header(path) as image:
        return convert(ImageOps.exif_transpose(image))  # upright, as viewers show it
