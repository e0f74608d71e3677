"""Commands of the command line that read and write the Hub."""

from __future__ import annotations

import argparse
import json


def publish(arguments: argparse.Namespace) -> int:
    """Check a posterior and put it on the Hugging Face Hub."""
    from zoo.hub import parse
    from zoo.loading import publish as run

    name = arguments.repository
    if arguments.revision is not None:
        if (named := parse(name)[1]) is not None:
            raise ValueError(f"--revision must not be given where OWNER/REPO already names the revision {named!r}.")
        name = f"{name}@{arguments.revision}"
    from bayeslayers.display import printable

    print(printable(run(arguments.folder, name, arguments.private)))
    return 0


def download(arguments: argparse.Namespace) -> int:
    """Download a posterior from the Hugging Face Hub, check it, and print its folder."""
    from zoo.loading import download as run

    print(run(arguments.posterior, arguments.output))
    return 0


def search(arguments: argparse.Namespace) -> int:
    """Search the Hugging Face Hub for posteriors."""
    from zoo.hub import search as run

    posteriors = run(arguments.query)
    if arguments.json:
        print(json.dumps([posterior._asdict() for posterior in posteriors], indent=2))
    else:
        from bayeslayers.display import printable

        for found in posteriors:
            words = f"{found.name}  {found.downloads} downloads, {found.likes} likes, {found.updated}"
            print(printable(words))
    return 0
