"""The command `bayeslayers list`."""

from __future__ import annotations

import argparse
import json

from recipes.cli.options import add_json
from recipes.cli.train import configurations


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `list`."""
    text = "list the configurations that `bayeslayers train` takes by name instead"
    parser.add_argument("--configurations", action="store_true", help=text)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """List the zoo's models and the bundled posteriors, or the configurations of trainings."""
    if arguments.configurations:
        names = configurations()
        print(json.dumps({"configurations": names}) if arguments.json else "\n".join(names))
        return 0
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
