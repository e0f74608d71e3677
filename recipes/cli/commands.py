"""The commands of `bayeslayers`, each a function of its arguments to its exit status, which imports what it needs."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def demo(arguments: argparse.Namespace) -> int:
    """Show what bundled posteriors know and do not know, as a table and a picture."""
    _check_picture(arguments.output)
    from recipes.reports.demo import demo as run

    run(arguments.output, arguments.num_samples, arguments.seed, arguments.device)
    return 0


def _check_picture(path: Path) -> None:
    """Refuse a picture that could not be written, and make its folder."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"output must be a .png file, got {path}.")
    if path.is_dir():
        raise IsADirectoryError(f"output must be a .png file, got {path}, which is a folder.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"output must be in a folder that can be made, got {path}: {error.strerror}.") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"output must be a file that you may write, got {path}.")


def list_(arguments: argparse.Namespace) -> int:
    """List the zoo's models and the bundled posteriors."""
    import zoo
    from bayeslayers.storage.posterior import read_card

    cards = {name: read_card(zoo.resolve(name)) for name in zoo.list_posteriors()}
    if arguments.json:
        print(json.dumps({"models": zoo.list_models(), "posteriors": list(cards)}))
        return 0
    from rich.console import Console

    from recipes.reports.tables import print_table

    rows = [
        (name, card.builder or "", card.dataset, *(card.metrics.get(key, "") for key in ("accuracy", "nll", "ece")))
        for name, card in cards.items()
    ]
    Console(highlight=False).print("models:", ", ".join(zoo.list_models()))
    print_table(("name", "model", "data", "accuracy", "NLL", "ECE"), rows, numbers=3, title="posteriors")
    return 0


list_.__name__ = "list"


def info(arguments: argparse.Namespace) -> int:
    """Show the card of a posterior."""
    import zoo
    from bayeslayers.display import printable_lines
    from bayeslayers.storage.model_card import model_card
    from bayeslayers.storage.posterior import read_card

    card = read_card(zoo.resolve(arguments.posterior))
    if arguments.json:
        print(card.to_json(), end="")
        return 0
    from rich.console import Console
    from rich.markdown import Markdown

    text = printable_lines(model_card(card).split("---\n", 2)[2])
    Console().print(Markdown(text, hyperlinks=False))  # a card's link shows where it leads
    return 0


def predict(arguments: argparse.Namespace) -> int:
    """Predict the class of images, with its uncertainty."""
    paths = _images(arguments.images)
    import torch

    import bayeslayers as bl
    import zoo
    from recipes.training.devices import device_named

    device = device_named(arguments.device or "cpu")
    model = zoo.load(arguments.posterior).to(device)
    card, convert = zoo.card_of(model), zoo.transforms(model)
    x = torch.stack([_input(path, convert) for path in paths])
    x = 1 - x if arguments.invert else x
    prediction = bl.predict(
        model,
        x,
        arguments.num_samples,
        generator=torch.Generator(device).manual_seed(arguments.seed),
        batch_size=256,
        method=arguments.method or card.method,  # pyright: ignore[reportArgumentType]
        result_device="cpu",
    )
    if prediction.likelihood.name != "categorical" or prediction.mean.dim() != 2:
        raise ValueError(f"posterior must be one of classes, got a {prediction.likelihood.name} one.")
    classes = prediction.probs.shape[1]
    names = card.class_names or [str(k) for k in range(classes)]
    if len(names) != classes:
        raise ValueError(f"posterior's card must name all {classes} classes, got {len(names)} names.")
    keys = ("confidence", "total", "aleatoric", "epistemic")
    rows = [
        {"image": str(path), "label": names[int(prediction.labels[i])]}
        | {key: round(float(getattr(prediction, key)[i]), 6) for key in keys}
        | {"probs": {name: round(float(p), 6) for name, p in zip(names, prediction.probs[i], strict=True)}}
        for i, path in enumerate(paths)
    ]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    from recipes.data.names import shortest_ends
    from recipes.reports.tables import print_table

    short = shortest_ends([path.absolute().parts[1:] for path in paths])
    lines = [(name, row["label"], *(row[key] for key in keys)) for name, row in zip(short, rows, strict=True)]
    print_table(("image", "label", *keys), lines, numbers=4)
    return 0


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


def verify(arguments: argparse.Namespace) -> int:
    """Measure posteriors anew beside what their cards claim; status 1 if a figure is another."""
    import zoo
    from recipes.reports.verify import record
    from recipes.reports.verify import verify as run

    names = zoo.list_posteriors() if arguments.all else [arguments.posterior]
    if arguments.record:
        for name in names:
            record(name)
    checks = [check for name in names for check in run(name, arguments.data_root)]
    rows = [dataclasses.asdict(check) | {"ok": check.ok} for check in checks]
    if arguments.json:
        plain = [{key: _finite(value) for key, value in row.items()} for row in rows]
        print(json.dumps(plain, indent=2, allow_nan=False))
    else:
        from recipes.reports.tables import print_table

        keys = ("figure", "claimed", "measured", "tolerance", "ok")
        for (name, data), group in itertools.groupby(rows, lambda row: (row["posterior"], row["data"])):
            lines = [[f"{row[key]:.5f}" if type(row[key]) is float else row[key] for key in keys] for row in group]
            print_table(keys, lines, title=f"{name} on {data}")
    return 0 if all(check.ok for check in checks) else 1


def evaluate(arguments: argparse.Namespace) -> int:
    """Measure a posterior on data, and how well it recognises out-of-distribution data."""
    from recipes.reports.measure import Question
    from recipes.reports.measure import evaluate as run
    from recipes.training.run_folder import check_folder

    if (folder := arguments.report) is not None:
        check_folder("report", folder)
    options = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Question)}
    shown = not arguments.json and sys.stdout.isatty()
    answer = run(Question(**options), arguments.data_root, progress=shown, device=arguments.device)
    if folder is not None:
        from recipes.reports.html import write_report

        write_report(answer, folder)
    if arguments.json:
        print(answer.to_json(), end="")
        return 0
    from rich.console import Console

    from bayeslayers.display import printable

    print(printable(f"{answer.question.posterior} on {answer.question.data}"))
    Console().print(answer.evaluation)
    if folder is not None:
        print(printable(f"written to {folder / 'report.html'} and report.json"))
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Lay training runs side by side, as a table and a picture."""
    from recipes.reports.compare import show

    return show(arguments)


def benchmark(arguments: argparse.Namespace) -> int:
    """Measure costs as ratios, or what defaults reach, side by side in one process."""
    from recipes.reports.benchmark import benchmark_load, benchmark_predict, benchmark_step

    if arguments.what == "defaults":
        from recipes.reports.benchmark_defaults import benchmark_defaults

        measured = benchmark_defaults(arguments.tasks, arguments.seeds, arguments.data_root)
    elif arguments.what == "step":
        measured = benchmark_step(arguments.rounds, optimizers=arguments.optimizers, models=arguments.models)
    else:
        measured = {"load": benchmark_load, "predict": benchmark_predict}[arguments.what](arguments.rounds)
    rows = [dataclasses.asdict(row) for row in measured]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        from recipes.reports.tables import print_table

        print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    return 0


def _finite(value: object) -> object:
    """Return the value, or None for a number that JSON has not."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
