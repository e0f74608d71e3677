"""The command `bayeslayers search`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable

from recipes.cli.options import add_json

_MOST_TAGS = 8
_EVERYWHERE = {"bayeslayers", "bayesian", "uncertainty", "variational-inference", "safetensors", "model-index"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `search`."""
    parser.add_argument("query", nargs="?", default="", help="part of the name")
    text = "task (image-classification), data set (mnist), network (lenet5) or method (vogn); may be repeated"
    parser.add_argument("--tag", action="append", default=[], dest="tags", metavar="TAG", help=text)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Search the Hugging Face Hub for posteriors."""
    from zoo.hub import search

    posteriors = search(arguments.query, tags=arguments.tags)
    if arguments.json:
        print(json.dumps([posterior._asdict() for posterior in posteriors], indent=2))
        return 0
    from bayeslayers.display import printable

    for found in posteriors:
        numbers = f"{found.downloads} downloads, {found.likes} likes, {found.updated}"
        print(printable(f"{found.name}  {numbers}  {' '.join(_telling(found.tags))}").rstrip())
    return 0


def _telling(tags: Iterable[str]) -> list[str]:
    """Return the tags that tell posteriors apart; the Hub's own have a colon."""
    return [tag[:64] for tag in tags if tag not in _EVERYWHERE and ":" not in tag][:_MOST_TAGS]
