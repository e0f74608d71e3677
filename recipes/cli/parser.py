"""The command line, `bayeslayers COMMAND`: words and errors. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from recipes.cli import commands
from recipes.cli import hub as hub_commands
from recipes.cli import train as train_command
from recipes.data.names import expanded

METHODS = ("sample", "mean", "local", "moments", "linearised", "dropout")  # of `bl.predict`


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status. Errors are one sentence; BAYESLAYERS_TRACEBACK=1 shows where."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        parser = _parser(words)
        arguments, unknown = parser.parse_known_args(words)
        if unknown and arguments.command is train_command.train:
            raise ValueError(train_command.unrecognized(unknown))
        if unknown:
            shown = (word if word.isprintable() else ascii(word) for word in unknown)
            parser.error(f"unrecognized arguments: {' '.join(shown)}")
        _check_numbers(arguments)
        status = arguments.command(arguments)
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
    """Return the parser of all commands; the options of `train`, which import its recipes, only where it is named."""
    parser = argparse.ArgumentParser(prog="bayeslayers", description="Bayesian layers and a zoo of trained posteriors.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    added = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(command: Callable[[argparse.Namespace], int], *, allow_abbrev: bool = True) -> argparse.ArgumentParser:
        doc = (command.__doc__ or "").strip()
        own = added.add_parser(command.__name__, help=doc, description=doc, allow_abbrev=allow_abbrev)
        own.set_defaults(command=command)
        return own

    own = add(commands.demo)
    own.add_argument("--output", type=_path, default=Path("demo.png"), help="picture to write (%(default)s)")
    _add_samples(own)
    _add_device(own)

    own = add(commands.list_)
    _add_json(own)

    own = add(commands.info)
    _add_posterior(own)
    _add_json(own)

    own = add(commands.predict)
    _add_posterior(own)
    own.add_argument(
        "images",
        nargs="+",
        type=_path,
        metavar="IMAGE",
        help="image files of any size, grey or RGB, and folders of them",
    )
    own.add_argument("--invert", action="store_true", help="swap black and white first (MNIST is white on black)")
    _add_method(own)
    _add_samples(own)
    _add_device(own)
    _add_json(own)

    own = add(train_command.train, allow_abbrev=False)
    if words[:1] == ["train"]:
        train_command.add_options(own, words[1:])

    own = add(hub_commands.publish)
    own.add_argument("folder", type=_path, help="folder of the posterior")
    own.add_argument("repository", metavar="OWNER/REPO", help="repository of the Hub, made if there is none")
    own.add_argument("--private", action="store_true", help="make the repository private")
    own.add_argument("--revision", metavar="BRANCH", help="branch to commit to, made if there is none (main)")

    own = add(hub_commands.download)
    own.add_argument("posterior", type=expanded, metavar="NAME", help="OWNER/REPO[@REVISION], or a bundled name")
    own.add_argument("--output", type=_path, metavar="FOLDER", help="copy it there, out of the Hub's cache")

    own = add(hub_commands.search)
    own.add_argument("query", nargs="?", default="", help="part of the name")
    _add_json(own)

    own = add(commands.verify)
    which = own.add_mutually_exclusive_group(required=True)
    _add_posterior(which, nargs="?")
    which.add_argument("--all", action="store_true", help="every bundled posterior")
    own.add_argument("--data-root", type=_path, metavar="PATH", help="folder of test data, to check all metrics on")
    own.add_argument("--record", action="store_true", help="measure on the bundled slice, and write to the card")
    _add_json(own)

    own = add(commands.compare)
    own.add_argument("runs", nargs="+", type=_path, metavar="RUN", help="folder of a training run")
    own.add_argument("--output", type=_path, metavar="PICTURE", help="draw the curves, as .png, .svg or .pdf")
    form = own.add_mutually_exclusive_group()
    _add_json(form)
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")

    own = add(commands.evaluate)
    _add_posterior(own)
    own.add_argument(
        "--data", type=expanded, metavar="NAME", help="mnist, cifar10, npz:PATH, imagefolder:PATH, ... (the card's)"
    )
    own.add_argument(
        "--data-root", type=_path, metavar="PATH", help="folder of data already there (downloaded to data)"
    )
    own.add_argument(
        "--ood", type=expanded, action="append", default=[], metavar="NAME", help="out-of-distribution data; repeatable"
    )
    _add_method(own)
    own.add_argument("--limit", type=int, metavar="N", help="use N examples of each set alone")
    own.add_argument("--batch-size", type=int, default=250, metavar="N", help="examples per forward pass (%(default)s)")
    own.add_argument("--report", type=_path, metavar="FOLDER", help="write report.html and report.json there")
    _add_samples(own)
    _add_device(own)
    _add_json(own)

    own = add(commands.benchmark)
    own.add_argument(
        "what",
        choices=["step", "load", "predict", "defaults"],
        help="step: a training step of VOGN beside one of Adam; load: a posterior loaded to predict one image, beside "
        "plain torch; predict: 32 draws beside one forward pass; defaults: what VOGN and IVON reach with nothing but "
        "dataset_size given, beside Adam",
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
    tasks = ["toy", "mnist", "energy"]
    own.add_argument(
        "--tasks",
        nargs="+",
        default=tasks,
        metavar="NAME",
        help=f"defaults: of {' '.join(tasks)} (these), fashion resnet18 unet (minutes)",
    )
    own.add_argument("--seeds", type=int, default=3, metavar="N", help="defaults: runs of each (%(default)s)")
    own.add_argument("--data-root", type=_path, metavar="PATH", help="defaults: folder of data (stand-ins are drawn)")
    _add_json(own)
    return parser


def _add_json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_posterior(parser: argparse._ActionsContainer, **options: str) -> None:
    text = "a bundled name, a folder, or OWNER/REPO[@REVISION] of the Hub"
    parser.add_argument("posterior", type=expanded, metavar="POSTERIOR", help=text, **options)  # pyright: ignore


def _add_samples(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-samples", type=int, default=64, help="samples of the weights (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (%(default)s)")


def _add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=METHODS, help="how to predict (as the posterior's card says)")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="where to compute, as torch names it: cuda, cuda:1 (cpu)")


def _path(text: str) -> Path:
    return Path(expanded(text))


def _check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse a count below 1, and a seed that torch would not take, before anything heavy is imported."""
    for name in ("num_samples", "batch_size", "limit", "rounds"):
        if (value := getattr(arguments, name, None)) is not None and value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value}.")
    if abs(seed := getattr(arguments, "seed", 0)) >= 2**63:
        raise ValueError(f"seed must be an integer between -2**63 and 2**63, got {seed}.")


class _Version(argparse.Action):
    """Print the version, which is imported only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import bayeslayers

        print(f"bayeslayers {bayeslayers.__version__}")
        parser.exit()
