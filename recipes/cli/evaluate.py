"""The command `bayeslayers evaluate`."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from recipes.cli.options import add_data_root, add_device, add_json, add_method, add_posterior, add_samples, typed_path
from recipes.data.names import expanded

_ALL = "all"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    add_posterior(parser)
    data = "mnist, cifar10, npz:PATH, csv:PATH, imagefolder:PATH, ... or card (the card's)"
    parser.add_argument("--data", type=expanded, metavar="NAME", help=data)
    add_data_root(parser, "folder of data already there (downloaded to data)")
    ood = "out-of-distribution data; repeatable"
    parser.add_argument("--ood", type=expanded, action="append", default=[], metavar="NAME", help=ood)
    corruptions = "measure with corrupted images too: with all 15 kinds, or with those named, as fog,snow"
    parser.add_argument("--corruptions", nargs="?", const=_ALL, default="", metavar="KINDS", help=corruptions)
    add_method(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="use only N examples of each set")
    batch = "examples per forward pass (%(default)s)"
    parser.add_argument("--batch-size", type=int, default=250, metavar="N", help=batch)
    report = "write report.html and report.json there, and corruptions.png"
    parser.add_argument("--report", type=typed_path, metavar="FOLDER", help=report)
    add_samples(parser)
    add_device(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure a posterior on data, and how well it recognises out-of-distribution data."""
    from bayeslayers.corruptions import KINDS
    from recipes.reports.measure import EvaluationRequest
    from recipes.tasks.evaluate import evaluate
    from recipes.training.run_folder import check_folder

    if (folder := arguments.report) is not None:
        check_folder("report", folder)
    options = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(EvaluationRequest)}
    named = [word.strip() for word in arguments.corruptions.split(",") if word.strip()]
    options["corruptions"] = list(KINDS) if arguments.corruptions == _ALL else named
    shown = not arguments.json and sys.stdout.isatty()
    result = evaluate(EvaluationRequest(**options), arguments.data_root, progress=shown, device=arguments.device)
    if folder is not None:
        from recipes.reports.html import write_report

        write_report(result, folder)
    if arguments.json:
        print(result.to_json(), end="")
        return 0
    from rich.console import Console

    from bayeslayers.display import printable

    print(printable(f"{result.request.posterior} on {result.request.data}"))
    Console().print(result.evaluation)
    if folder is not None:
        others = "report.json and corruptions.png" if options["corruptions"] else "report.json"
        print(printable(f"written to {folder / 'report.html'}, with {others}"))
    return 0
