"""The command `bayeslayers info`."""

from __future__ import annotations

import argparse

from recipes.cli.options import add_json, add_posterior


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `info`."""
    add_posterior(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
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
    Console().print(Markdown(text, hyperlinks=False))  # the terminal shows where a link leads
    return 0
