"""The command `bayeslayers diagnose`."""

from __future__ import annotations

import argparse
import json
import sys

from recipes.cli.options import add_data_root, add_device, add_json, add_posterior, add_samples, typed_path
from recipes.data.names import expanded


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diagnose`."""
    add_posterior(parser)
    data = "mnist, npz:PATH, ..., or card for the card's: compare means with samples on its test split"
    parser.add_argument("--data", type=expanded, metavar="NAME", help=data)
    add_data_root(parser, "folder of data already there (downloaded to data)")
    parser.add_argument("--limit", type=int, metavar="N", default=2000, help="use only N examples (%(default)s)")
    plot = "write signal-to-noise ratios by layer to a .png, .svg or .pdf"
    parser.add_argument("--plot", type=typed_path, metavar="FILE", help=plot)
    add_samples(parser)
    add_device(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Show what a posterior's layers hold, what sampling does to predictions, and what to do about it."""
    import bayeslayers as bl
    import zoo
    from bayeslayers.diagnosis.tensors import tensors_of

    model = zoo.load(arguments.posterior)
    means, samples = [_evaluated(arguments, method) if arguments.data else None for method in ("mean", None)]
    diagnosis = bl.Diagnosis(tuple(tensors_of(model)), means, samples)
    if arguments.plot is not None:
        bl.plots.signal_to_noise(model, arguments.plot)
    if arguments.json:
        print(json.dumps(diagnosis.to_dict(), indent=2))
        return 0
    from rich.console import Console

    Console().print(diagnosis)
    if arguments.plot is not None:
        print(f"written to {arguments.plot}")
    return 0


def _evaluated(arguments: argparse.Namespace, method: str | None):
    """Return the evaluation of the posterior by one method; None is that of its card."""
    from recipes.reports.measure import EvaluationRequest
    from recipes.tasks.evaluate import evaluate

    request = EvaluationRequest(
        arguments.posterior,
        data=arguments.data,
        num_samples=1 if method else arguments.num_samples,
        seed=arguments.seed,
        method=method,
        limit=arguments.limit,
    )
    shown = not arguments.json and sys.stdout.isatty()
    return evaluate(request, arguments.data_root, progress=shown, device=arguments.device).evaluation
