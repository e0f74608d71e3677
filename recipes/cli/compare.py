"""The command `bayeslayers compare`."""

from __future__ import annotations

import argparse

from recipes.cli.options import add_json, typed_path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compare`."""
    parser.add_argument("runs", nargs="+", type=typed_path, metavar="RUN", help="folder of a training run")
    parser.add_argument("--output", type=typed_path, metavar="PICTURE", help="draw the curves, as .png, .svg or .pdf")
    form = parser.add_mutually_exclusive_group()
    add_json(form)
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(arguments: argparse.Namespace) -> int:
    """Show training runs side by side, as a table and a picture."""
    from recipes.reports.compare import compare

    comparison = compare(arguments.runs, arguments.output)
    if arguments.json or arguments.markdown:
        print(comparison.to_json() if arguments.json else comparison.to_markdown(), end="")
        return 0
    from rich.console import Console

    from recipes.reports.tables import print_fitting

    console = Console(highlight=False)
    print_fitting(console, comparison.__rich__(), comparison.titles(), comparison.cells(), fit=console.is_terminal)
    return 0
