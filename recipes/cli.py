"""The command line, `bayeslayers COMMAND`: words and errors. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from recipes import commands, hub_commands, train_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status. Errors are one sentence; BAYESLAYERS_TRACEBACK=1 shows where."""
    words = sys.argv[1:] if argv is None else list(argv)
    trains = words[:1] == ["train"]  # whose options are those of its configuration
    arguments = _parser().parse_args(words[:1] if trains else words)
    if trains:
        arguments.words = words[1:]
    try:
        status = arguments.command(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone, as in `bayeslayers list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at exit
        return 141
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("BAYESLAYERS_TRACEBACK"):
            raise
        print("bayeslayers:", " ".join(str(error).split()), file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bayeslayers", description="Bayesian layers and a zoo of trained posteriors.")
    added = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(command: Callable[[argparse.Namespace], int], *, parse_help: bool = True) -> argparse.ArgumentParser:
        doc = (command.__doc__ or "").strip()
        own = added.add_parser(command.__name__, help=doc, description=doc, add_help=parse_help)
        own.set_defaults(command=command)
        return own

    own = add(commands.demo)
    own.add_argument("--output", type=Path, default=Path("demo.png"), help="picture to write (%(default)s)")
    _add_draws(own)

    own = add(commands.list_)
    _add_json(own)

    own = add(commands.info)
    own.add_argument("posterior", help="a bundled name, a folder, or OWNER/REPO[@REVISION]")
    _add_json(own)

    own = add(commands.predict)
    own.add_argument("posterior", help="a bundled name, a folder, or OWNER/REPO[@REVISION]")
    own.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files of any size, grey or RGB")
    own.add_argument("--invert", action="store_true", help="swap black and white first (MNIST is white on black)")
    _add_draws(own)
    _add_json(own)

    add(train_command.train, parse_help=False)

    own = add(hub_commands.publish)
    own.add_argument("folder", type=Path, help="folder of the posterior")
    own.add_argument("repository", metavar="OWNER/REPO", help="repository of the Hub, made if there is none")
    own.add_argument("--private", action="store_true", help="make the repository private")
    own.add_argument("--revision", metavar="BRANCH", help="branch to commit to, made if there is none (main)")

    own = add(hub_commands.download)
    own.add_argument("posterior", metavar="NAME", help="OWNER/REPO[@REVISION], or a bundled name")
    own.add_argument("--output", type=Path, metavar="FOLDER", help="copy it there, out of the Hub's cache")

    own = add(hub_commands.search)
    own.add_argument("query", nargs="?", default="", help="part of the name")
    _add_json(own)

    own = add(commands.verify)
    which = own.add_mutually_exclusive_group(required=True)
    which.add_argument("posterior", nargs="?", help="a bundled name, a folder, or OWNER/REPO[@REVISION]")
    which.add_argument("--all", action="store_true", help="every bundled posterior")
    own.add_argument("--data-root", type=Path, metavar="PATH", help="folder of test data, to check all figures on")
    own.add_argument("--record", action="store_true", help="measure on the bundled slice, and write to the card")
    _add_json(own)

    own = add(commands.compare)
    own.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training run")
    own.add_argument("--output", type=Path, metavar="PICTURE", help="draw the curves, as .png, .svg or .pdf")
    form = own.add_mutually_exclusive_group()
    _add_json(form)
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")

    own = add(commands.evaluate)
    own.add_argument("posterior", metavar="MODEL", help="a bundled name, a folder, or OWNER/REPO[@REVISION]")
    own.add_argument("--data", metavar="NAME", help="mnist, cifar10, npz:PATH, imagefolder:PATH, ... (the card's)")
    own.add_argument("--data-root", type=Path, metavar="PATH", help="folder of data already there (downloaded to data)")
    own.add_argument("--ood", action="append", default=[], metavar="NAME", help="data set of strangers; repeatable")
    own.add_argument("--method", choices=["sample", "mean"], default="sample", help="draws, or the posterior means")
    own.add_argument("--limit", type=int, metavar="N", help="use N examples of each set alone")
    own.add_argument("--batch-size", type=int, default=250, metavar="N", help="examples per forward pass (%(default)s)")
    own.add_argument("--report", type=Path, metavar="FOLDER", help="write report.html and report.json there")
    _add_draws(own)
    _add_json(own)

    own = add(commands.benchmark)
    own.add_argument(
        "what",
        choices=["step", "load", "predict"],
        help="step: a training step of VOGN beside one of Adam; load: a posterior loaded to predict one image, beside "
        "plain torch; predict: 32 draws beside one forward pass",
    )
    own.add_argument("--rounds", type=int, default=100, help="interleaved runs of each (%(default)s)")
    own.add_argument(
        "--optimizers",
        nargs="+",
        default=["vogn"],
        metavar="NAME",
        help="step: beside Adam, by their recipes' names (vogn)",
    )
    own.add_argument(
        "--models",
        nargs="+",
        default=["mlp", "lenet5"],
        metavar="NAME",
        help="step: classifiers of the zoo, on batches of 128 (mlp lenet5)",
    )
    _add_json(own)
    return parser


def _add_json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_draws(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-samples", type=int, default=64, help="draws of the weights (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (%(default)s)")


if __name__ == "__main__":
    sys.exit(main())
