"""The command `bayeslayers publish`."""

from __future__ import annotations

import argparse
import sys

from recipes.cli.options import typed_path

_REASON = "Nobody may use a posterior without a licence"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `publish`."""
    parser.add_argument("folder", nargs="?", type=typed_path, help="folder of the posterior")
    parser.add_argument("repository", nargs="?", metavar="OWNER/REPO", help="repository, made if there is none")
    parser.add_argument("--all", action="store_true", help="publish every bundled posterior, under its own name")
    parser.add_argument("--organisation", metavar="OWNER", help="whose repositories hold them, with --all")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to, made if there is none (main)")
    parser.add_argument("--license", metavar="NAME", help="licence as the Hub names it, such as mit (the card's)")


def run(arguments: argparse.Namespace) -> int:
    """Check a posterior and put it on the Hugging Face Hub, or every bundled one."""
    _check(arguments)
    return _all(arguments) if arguments.all else _one(arguments)


def _check(arguments: argparse.Namespace) -> None:
    one = [arguments.folder, arguments.repository]
    rest = [arguments.revision, arguments.license]
    given = arguments.all, arguments.organisation is not None
    if given != (True, True) and (any(given) or None in one):
        raise ValueError("publish must be given FOLDER and OWNER/REPO, or --all and --organisation OWNER.")
    if arguments.all and any(word is not None for word in one + rest):
        raise ValueError("publish --all takes no folder, repository, --revision or --license: it takes bundled ones.")


def _one(arguments: argparse.Namespace) -> int:
    from zoo.hub import parse
    from zoo.loading import publish

    name = arguments.repository
    if arguments.revision is not None:
        if (named := parse(name)[1]) is not None:
            raise ValueError(f"--revision must not be given where OWNER/REPO already names the revision {named!r}.")
        name = f"{name}@{arguments.revision}"
    from bayeslayers.display import printable
    from bayeslayers.storage.posterior import read_card
    from recipes.reports.card_picture import card_picture

    parse(name)
    licence = arguments.license
    missing = licence is None and not read_card(arguments.folder).license
    if missing and sys.stdin is not None and sys.stdin.isatty():
        licence = _asked()
    print(printable(publish(arguments.folder, name, arguments.private, license=licence, draw=card_picture)))
    if missing and licence is None:
        print(f"bayeslayers: {_REASON}: the card names none. Add --license apache-2.0 or another.", file=sys.stderr)
    return 0


def _asked() -> str | None:
    """Return the licence that the user types, None for no answer."""
    print(f"{_REASON}. Licence, such as apache-2.0 or mit (empty for none): ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() or None


def _all(arguments: argparse.Namespace) -> int:
    from bayeslayers.display import one_line, printable
    from zoo.loading import list_posteriors, publish_all

    count, failed = len(list_posteriors()), []
    for number, one in enumerate(publish_all(arguments.organisation, arguments.private), 1):
        done = f"uploaded, {one.address}" if one.uploaded else "unchanged"
        result = f"failed: {one_line(one.error)}" if one.error else done
        print(printable(f"{number}/{count} {one.repository}: {result}"), flush=True)
        failed += [one.name] if one.error else []
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {count} posteriors were not published: {', '.join(failed)}. Call the same command "
            "again: what is there unchanged is not uploaded."
        )
    return 0
