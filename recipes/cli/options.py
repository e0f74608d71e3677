"""Options that several commands share, and the checks of their numbers, which import nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes.data.names import expanded

METHODS = ("sample", "mean", "local", "moments", "linearised", "dropout")  # of `bl.predict`


def typed_path(text: str) -> Path:
    """Return a path that was typed, with the home folder in place of `~`."""
    return Path(expanded(text))


def add_json(parser: argparse._ActionsContainer) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_posterior(parser: argparse._ActionsContainer, **options: str) -> None:
    """Add the name of a posterior; `options` are those of `add_argument`."""
    text = "a bundled name, a folder, or OWNER/REPO[@REVISION] of the Hub"
    parser.add_argument("posterior", type=expanded, metavar="POSTERIOR", help=text, **options)  # pyright: ignore


def add_samples(parser: argparse.ArgumentParser) -> None:
    """Add `--num-samples` and `--seed`."""
    parser.add_argument("--num-samples", type=int, default=64, help="samples of the weights (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (%(default)s)")


def add_method(parser: argparse.ArgumentParser) -> None:
    """Add `--method`."""
    parser.add_argument("--method", choices=METHODS, help="how to predict (as the posterior's card says)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument("--device", metavar="NAME", help="where to compute, as torch names it: cuda, cuda:1 (cpu)")


def add_data_root(parser: argparse.ArgumentParser, text: str) -> None:
    """Add `--data-root` with its help text."""
    parser.add_argument("--data-root", type=typed_path, metavar="PATH", help=text)


def check_numbers(arguments: argparse.Namespace) -> None:
    """Reject a count below 1, and a seed that torch would not take.

    Raises:
        ValueError: If there is one.
    """
    for name in ("num_samples", "batch_size", "limit", "rounds"):
        if (value := getattr(arguments, name, None)) is not None and value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value}.")
    if abs(seed := getattr(arguments, "seed", 0)) >= 2**63:
        raise ValueError(f"seed must be an integer between -2**63 and 2**63, got {seed}.")
