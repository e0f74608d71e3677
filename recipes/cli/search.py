"""The command `bayeslayers search`."""

from __future__ import annotations

import argparse
import json

from recipes.cli.options import add_json


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `search`."""
    parser.add_argument("query", nargs="?", default="", help="part of the name")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Search the Hugging Face Hub for posteriors."""
    from zoo.hub import search

    posteriors = search(arguments.query)
    if arguments.json:
        print(json.dumps([posterior._asdict() for posterior in posteriors], indent=2))
        return 0
    from bayeslayers.display import printable

    for found in posteriors:
        print(printable(f"{found.name}  {found.downloads} downloads, {found.likes} likes, {found.updated}"))
    return 0
