"""The commands of `bayeslayers`, each a function of its arguments to its exit status, which imports what it needs."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def demo(arguments: argparse.Namespace) -> int:
    """Show what bundled posteriors know and do not know, as a table and a picture."""
    from recipes.demo import demo as run

    run(arguments.output, arguments.num_samples, arguments.seed)
    return 0


def list_(arguments: argparse.Namespace) -> int:
    """List the zoo's models and the bundled posteriors."""
    import zoo
    from bayeslayers.checkpoint import read_card

    cards = {name: read_card(zoo.resolve(name)) for name in zoo.list_posteriors()}
    if arguments.json:
        print(json.dumps({"models": zoo.list_models(), "posteriors": list(cards)}))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title="posteriors", title_justify="left")
    for column in ("name", "model", "data", "accuracy", "NLL", "ECE"):
        table.add_column(column)
    for name, card in cards.items():
        figures = [f"{card.metrics[key]:.4f}" if key in card.metrics else "" for key in ("accuracy", "nll", "ece")]
        table.add_row(name, card.builder or "", card.dataset, *figures)
    Console().print("models:", ", ".join(zoo.list_models()))
    Console().print(table)
    return 0


list_.__name__ = "list"


def info(arguments: argparse.Namespace) -> int:
    """Show the card of a posterior."""
    import zoo
    from bayeslayers.card import model_card
    from bayeslayers.checkpoint import read_card

    card = read_card(zoo.resolve(arguments.posterior))
    if arguments.json:
        print(card.to_json(), end="")
        return 0
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(model_card(card).split("---\n", 2)[2]))
    return 0


def predict(arguments: argparse.Namespace) -> int:
    """Predict the class of images, with its uncertainty."""
    import torch

    import bayeslayers as bl
    import zoo

    model = zoo.load(arguments.posterior)
    convert = zoo.transforms(model)
    x = torch.stack([_input(path, convert) for path in arguments.images])
    generator = torch.Generator().manual_seed(arguments.seed)
    x = 1 - x if arguments.invert else x
    prediction = bl.predict(model, x, arguments.num_samples, generator=generator, batch_size=256)
    if prediction.likelihood.name != "categorical" or prediction.mean.dim() != 2:
        raise ValueError(f"posterior must be one of classes, got a {prediction.likelihood.name} one.")
    classes = prediction.probs.shape[1]
    names = zoo.card_of(model).class_names or [str(k) for k in range(classes)]
    if len(names) != classes:
        raise ValueError(f"posterior's card must name all {classes} classes, got {len(names)} names.")
    keys = ("confidence", "total", "aleatoric", "epistemic")
    rows = [
        {"image": str(path), "label": names[int(prediction.labels[i])]}
        | {key: round(float(getattr(prediction, key)[i]), 6) for key in keys}
        | {"probs": {name: round(float(p), 6) for name, p in zip(names, prediction.probs[i], strict=True)}}
        for i, path in enumerate(arguments.images)
    ]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows, ("image", "label", *keys))
    return 0


def _input(path: Path, convert: Callable[[object], Tensor]) -> Tensor:
    from PIL import Image, ImageOps

    if not path.is_file():
        raise FileNotFoundError(f"image must be a file, got {path}, which is none.")
    try:
        with Image.open(path) as image:
            return convert(ImageOps.exif_transpose(image))  # upright, as viewers show it
    except Exception as error:  # Pillow's formats raise what they will for a damaged file
        reason = str(error).rstrip(".")
        raise ValueError(f"image must be a picture that Pillow reads, got {path}: {reason}.") from None


def verify(arguments: argparse.Namespace) -> int:
    """Measure posteriors anew beside what their cards claim; status 1 if a figure is another."""
    import zoo
    from recipes.verify import record
    from recipes.verify import verify as run

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
        for (name, data), group in itertools.groupby(rows, lambda row: (row["posterior"], row["data"])):
            print(f"{name} on {data}")
            lines = [{key: f"{x:.5f}" if type(x) is float else x for key, x in row.items()} for row in group]
            _print_table(lines, ("figure", "claimed", "measured", "tolerance", "ok"))
    return 0 if all(check.ok for check in checks) else 1


def evaluate(arguments: argparse.Namespace) -> int:
    """Measure a posterior on data, and how well it tells strangers from it."""
    from recipes.evaluate import Question
    from recipes.evaluate import evaluate as run
    from recipes.run_folder import check_folder

    if (folder := arguments.report) is not None:
        check_folder("report", folder)
    options = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Question)}
    answer = run(Question(**options), arguments.data_root, progress=not arguments.json and sys.stdout.isatty())
    if folder is not None:
        from recipes.report import write_report

        write_report(answer, folder)
    if arguments.json:
        print(answer.to_json(), end="")
        return 0
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    console.print(f"{escape(answer.question.posterior)} on {escape(str(answer.question.data))}", highlight=False)
    console.print(answer.evaluation)
    if folder is not None:
        console.print(
            f"written to {escape(str(folder / 'report.html'))} and report.json", highlight=False, soft_wrap=True
        )
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Lay training runs side by side, as a table and a picture."""
    from recipes.compare import show

    return show(arguments)


def benchmark(arguments: argparse.Namespace) -> int:
    """Measure costs as ratios, side by side in one process."""
    from recipes.benchmark import benchmark_load, benchmark_predict, benchmark_step

    if arguments.what == "step":
        measured = benchmark_step(arguments.rounds, optimizers=arguments.optimizers, models=arguments.models)
    else:
        measured = {"load": benchmark_load, "predict": benchmark_predict}[arguments.what](arguments.rounds)
    rows = [dataclasses.asdict(row) for row in measured]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows, tuple(rows[0]))
    return 0


def _finite(value: object) -> object:
    """Return the value, or None for a number that JSON has not."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{row[c]:.4f}" if isinstance(row[c], float) else escape(str(row[c])) for c in columns))
    Console().print(table)
