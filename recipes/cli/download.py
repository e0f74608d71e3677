"""The command `bayeslayers download`."""

from __future__ import annotations

import argparse

from recipes.cli.options import typed_path
from recipes.data.names import expanded


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `download`."""
    name = "OWNER/REPO[@REVISION], or a bundled name"
    parser.add_argument("posterior", type=expanded, metavar="NAME", help=name)
    parser.add_argument("--output", type=typed_path, metavar="FOLDER", help="copy it there, out of the Hub's cache")


def run(arguments: argparse.Namespace) -> int:
    """Download a posterior from the Hugging Face Hub, check it, and print its folder."""
    from zoo.loading import download

    print(download(arguments.posterior, arguments.output))
    return 0
