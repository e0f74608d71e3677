"""The command `bayeslayers publish`."""

from __future__ import annotations

import argparse

from recipes.cli.options import typed_path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `publish`."""
    parser.add_argument("folder", type=typed_path, help="folder of the posterior")
    parser.add_argument("repository", metavar="OWNER/REPO", help="repository of the Hub, made if there is none")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to, made if there is none (main)")


def run(arguments: argparse.Namespace) -> int:
    """Check a posterior and put it on the Hugging Face Hub."""
    from zoo.hub import parse
    from zoo.loading import publish

    name = arguments.repository
    if arguments.revision is not None:
        if (named := parse(name)[1]) is not None:
            raise ValueError(f"--revision must not be given where OWNER/REPO already names the revision {named!r}.")
        name = f"{name}@{arguments.revision}"
    from bayeslayers.display import printable

    print(printable(publish(arguments.folder, name, arguments.private)))
    return 0
