"""The command line, `bayeslayers COMMAND`: words and errors. Nothing heavy is imported before a command runs.

Each command is a module beside this one: `add_options(parser)`, and `run(arguments)`, which returns the exit status and
whose docstring is the help of the command. A new command is one file and its line in `COMMANDS`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from recipes.cli import (
    benchmark,
    compare,
    demo,
    diagnose,
    download,
    evaluate,
    info,
    predict,
    publish,
    search,
    train,
    verify,
)
from recipes.cli import list as list_command
from recipes.cli.allocator import keep_freed_memory
from recipes.cli.options import check_numbers

COMMANDS = {
    "demo": demo,
    "list": list_command,
    "info": info,
    "predict": predict,
    "train": train,
    "publish": publish,
    "download": download,
    "search": search,
    "verify": verify,
    "compare": compare,
    "evaluate": evaluate,
    "diagnose": diagnose,
    "benchmark": benchmark,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status. Errors are one sentence; BAYESLAYERS_TRACEBACK=1 shows where."""
    if argv is None:
        keep_freed_memory()
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        parser = _parser(words)
        arguments, unknown = parser.parse_known_args(words)
        if unknown and arguments.run is train.run:
            raise ValueError(train.unrecognized(unknown))
        if unknown:
            shown = (word if word.isprintable() else ascii(word) for word in unknown)
            command = next(word for word in words if word in COMMANDS)
            parser.error(f"unrecognized arguments: {' '.join(shown)}. See bayeslayers {command} --help.")
        check_numbers(arguments)
        status = arguments.run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone, as in `bayeslayers list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at exit
        return 141
    except Exception as error:
        if os.environ.get("BAYESLAYERS_TRACEBACK"):
            raise
        print("bayeslayers:", _sentence(error), file=sys.stderr)
        return 1


def _sentence(error: Exception) -> str:
    """Return an error as one printable line, which says so where the error is not one that we raise."""
    text = str(error)
    if not isinstance(error, ValueError | TypeError | OSError | ArithmeticError | RuntimeError):
        text = f"unexpected {type(error).__name__}: {text}. BAYESLAYERS_TRACEBACK=1 shows where it comes from."
    if "bayeslayers" not in sys.modules:  # said at once, before torch is imported
        return line if (line := " ".join(text.split())).isprintable() else ascii(line)
    from bayeslayers.display import one_line

    return one_line(text)


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of all commands; the options of `train`, which import its tasks, only where it is named."""
    parser = argparse.ArgumentParser(prog="bayeslayers", description="Bayesian layers and a zoo of trained posteriors.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    added = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        doc = (command.run.__doc__ or "").strip()
        own = added.add_parser(name, help=doc, description=doc, allow_abbrev=command is not train)
        own.set_defaults(run=command.run)
        if command is not train:
            command.add_options(own)
        elif words[:1] == ["train"]:
            train.add_options(own, words[1:])
    return parser


class _Version(argparse.Action):
    """Print the version, which is imported only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import bayeslayers

        print(f"bayeslayers {bayeslayers.__version__}")
        parser.exit()
