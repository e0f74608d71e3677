"""The command line: `bayeslayers COMMAND`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes import hub_commands, train_command

if TYPE_CHECKING:
    from torch import Tensor


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status. Errors are one sentence; BAYESLAYERS_TRACEBACK=1 shows where."""
    words = sys.argv[1:] if argv is None else list(argv)
    trains = words[:1] == ["train"]  # whose options are those of its configuration
    arguments = _parser().parse_args(words[:1] if trains else words)
    if trains:
        arguments.words = words[1:]
    try:
        status = arguments.command(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone, as in `bayeslayers list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at exit
        return 141
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("BAYESLAYERS_TRACEBACK"):
            raise
        print("bayeslayers:", " ".join(str(error).split()), file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bayeslayers", description="Bayesian layers and a zoo of trained posteriors.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(command: Callable[[argparse.Namespace], int], *, parse_help: bool = True) -> argparse.ArgumentParser:
        doc = (command.__doc__ or "").strip()
        own = commands.add_parser(command.__name__, help=doc, description=doc, add_help=parse_help)
        own.set_defaults(command=command)
        return own

    own = add(demo)
    own.add_argument("--output", type=Path, default=Path("demo.png"), help="picture to write (%(default)s)")
    _add_draws(own)

    own = add(list_)
    _add_json(own)

    own = add(info)
    own.add_argument("posterior", help="a bundled name, a folder, or OWNER/REPO[@REVISION]")
    _add_json(own)

    own = add(predict)
    own.add_argument("posterior", help="a bundled name, a folder, or OWNER/REPO[@REVISION]")
    own.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files of any size, grey or RGB")
    own.add_argument("--invert", action="store_true", help="swap black and white first (MNIST is white on black)")
    _add_draws(own)
    _add_json(own)

    add(train_command.train, parse_help=False)

    own = add(hub_commands.publish)
    own.add_argument("folder", type=Path, help="folder of the posterior")
    own.add_argument("repository", metavar="OWNER/REPO", help="repository of the Hub, made if there is none")
    own.add_argument("--private", action="store_true", help="make the repository private")
    own.add_argument("--revision", metavar="BRANCH", help="branch to commit to, made if there is none (main)")

    own = add(hub_commands.download)
    own.add_argument("posterior", metavar="NAME", help="OWNER/REPO[@REVISION], or a bundled name")
    own.add_argument("--output", type=Path, metavar="FOLDER", help="copy it there, out of the Hub's cache")

    own = add(hub_commands.search)
    own.add_argument("query", nargs="?", default="", help="part of the name")
    _add_json(own)

    own = add(verify)
    which = own.add_mutually_exclusive_group(required=True)
    which.add_argument("posterior", nargs="?", help="a bundled name, a folder, or OWNER/REPO[@REVISION]")
    which.add_argument("--all", action="store_true", help="every bundled posterior")
    own.add_argument("--data-root", type=Path, metavar="PATH", help="folder of test data, to check all figures on")
    own.add_argument("--record", action="store_true", help="measure on the bundled slice, and write to the card")
    _add_json(own)

    own = add(compare)
    own.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training run")
    own.add_argument("--output", type=Path, metavar="PICTURE", help="draw the curves, as .png, .svg or .pdf")
    form = own.add_mutually_exclusive_group()
    _add_json(form)
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")

    own = add(evaluate)
    own.add_argument("posterior", metavar="MODEL", help="a bundled name, a folder, or OWNER/REPO[@REVISION]")
    own.add_argument("--data", metavar="NAME", help="mnist, cifar10, npz:PATH, imagefolder:PATH, ... (the card's)")
    own.add_argument("--data-root", type=Path, metavar="PATH", help="folder of data already there (downloaded to data)")
    own.add_argument("--ood", action="append", default=[], metavar="NAME", help="data set of strangers; repeatable")
    own.add_argument("--method", choices=["sample", "mean"], default="sample", help="draws, or the posterior means")
    own.add_argument("--limit", type=int, metavar="N", help="use N examples of each set alone")
    own.add_argument("--batch-size", type=int, default=250, metavar="N", help="examples per forward pass (%(default)s)")
    own.add_argument("--report", type=Path, metavar="FOLDER", help="write report.html and report.json there")
    _add_draws(own)
    _add_json(own)

    own = add(benchmark)
    own.add_argument(
        "what",
        choices=["step", "load", "predict"],
        help="step: a training step of VOGN beside one of Adam; load: a posterior loaded to predict one image, beside "
        "plain torch; predict: 32 draws beside one forward pass",
    )
    own.add_argument("--rounds", type=int, default=100, help="interleaved runs of each (%(default)s)")
    own.add_argument(
        "--optimizers",
        nargs="+",
        default=["vogn"],
        metavar="NAME",
        help="step: beside Adam, by their recipes' names (vogn)",
    )
    _add_json(own)
    return parser


def _add_json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_draws(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-samples", type=int, default=64, help="draws of the weights (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (%(default)s)")


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
    from recipes.evaluate import Question, write_report
    from recipes.evaluate import evaluate as run
    from recipes.run_folder import check_folder

    if (folder := arguments.report) is not None:
        check_folder("report", folder)
    options = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Question)}
    answer = run(Question(**options), arguments.data_root, progress=not arguments.json and sys.stdout.isatty())
    if folder is not None:
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
        measured = benchmark_step(arguments.rounds, optimizers=arguments.optimizers)
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


if __name__ == "__main__":
    sys.exit(main())
