"""The command line: `bayeslayers COMMAND`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status. Errors are one sentence; BAYESLAYERS_TRACEBACK=1 shows where."""
    arguments, rest = _parser().parse_known_args(argv)
    if rest and arguments.command is not train:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        return arguments.command(arguments)
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, ArithmeticError) as error:
        if os.environ.get("BAYESLAYERS_TRACEBACK"):
            raise
        print(f"bayeslayers: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bayeslayers", description="Bayesian layers and a zoo of trained posteriors.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(command: Callable[[argparse.Namespace], int], *, parse_help: bool = True) -> argparse.ArgumentParser:
        doc = (command.__doc__ or "").strip()
        own = commands.add_parser(command.__name__, help=doc, description=doc, add_help=parse_help)
        own.set_defaults(command=command)
        return own

    own = add(demo)
    own.add_argument("--output", type=Path, default=Path("demo.png"), help="picture to write (%(default)s)")
    _add_draws(own)

    own = add(list_)
    _add_json(own)

    own = add(info)
    own.add_argument("posterior", help="a bundled name, or a folder")
    _add_json(own)

    own = add(predict)
    own.add_argument("posterior", help="a bundled name, or a folder")
    own.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files of any size, grey or RGB")
    own.add_argument("--invert", action="store_true", help="swap black and white first (MNIST is white on black)")
    _add_draws(own)
    _add_json(own)

    own = add(train, parse_help=False)
    own.add_argument("config", nargs="?", help="a YAML file, or the name of a bundled one as mnist/lenet5_vogn")
    own.add_argument("--resume", action="store_true", help="continue a run exactly where it was saved")

    own = add(benchmark)
    own.add_argument("what", choices=["step"], help="step: a training step of VOGN beside one of Adam")
    own.add_argument("--rounds", type=int, default=100, help="interleaved runs of each (%(default)s)")
    _add_json(own)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_draws(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-samples", type=int, default=64, help="draws of the weights (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (%(default)s)")


def demo(arguments: argparse.Namespace) -> int:
    """Show what bundled posteriors know and do not know, as a table and a picture."""
    from recipes.demo import demo as run

    run(arguments.output, arguments.num_samples, arguments.seed)
    return 0


def list_(arguments: argparse.Namespace) -> int:
    """List the zoo's models and the bundled posteriors."""
    import zoo
    from bayeslayers.checkpoint import read_card

    cards = {name: read_card(zoo.resolve(name)) for name in zoo.list_posteriors()}
    if arguments.json:
        print(json.dumps({"models": zoo.list_models(), "posteriors": list(cards)}))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title="posteriors", title_justify="left")
    for column in ("name", "model", "data", "accuracy", "NLL", "ECE"):
        table.add_column(column)
    for name, card in cards.items():
        figures = [f"{card.metrics[key]:.4f}" if key in card.metrics else "" for key in ("accuracy", "nll", "ece")]
        table.add_row(name, card.builder or "", card.dataset, *figures)
    Console().print("models:", ", ".join(zoo.list_models()))
    Console().print(table)
    return 0


list_.__name__ = "list"


def info(arguments: argparse.Namespace) -> int:
    """Show the card of a posterior."""
    import zoo
    from bayeslayers.card import model_card
    from bayeslayers.checkpoint import read_card

    card = read_card(zoo.resolve(arguments.posterior))
    if arguments.json:
        print(card.to_json(), end="")
        return 0
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(model_card(card).split("---\n", 2)[2]))
    return 0


def predict(arguments: argparse.Namespace) -> int:
    """Predict the class of images, with its uncertainty."""
    import torch

    import bayeslayers as bl
    import zoo

    model = zoo.load(arguments.posterior)
    convert = zoo.transforms(model)
    x = torch.stack([convert(_open_image(path)) for path in arguments.images])
    generator = torch.Generator().manual_seed(arguments.seed)
    prediction = bl.predict(model, 1 - x if arguments.invert else x, arguments.num_samples, generator=generator)
    names = zoo.card_of(model).class_names or [str(k) for k in range(prediction.probs.shape[1])]
    keys = ("confidence", "total", "aleatoric", "epistemic")
    rows = [
        {"image": str(path), "label": names[int(prediction.labels[i])]}
        | {key: round(float(getattr(prediction, key)[i]), 6) for key in keys}
        | {"probs": {name: round(float(p), 6) for name, p in zip(names, prediction.probs[i], strict=True)}}
        for i, path in enumerate(arguments.images)
    ]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows, ("image", "label", *keys))
    return 0


def _open_image(path: Path) -> object:
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise FileNotFoundError(f"image must be a file, got {path}, which is none.")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"image must be a picture that Pillow reads, got {path}: {error}.") from None


def train(arguments: argparse.Namespace) -> int:
    """Train a posterior from a configuration file."""
    from jsonargparse import ArgumentParser

    from recipes.classification import Config
    from recipes.classification import train as run

    parser = ArgumentParser(
        prog="bayeslayers train CONFIG", description="Train a posterior; options override the configuration."
    )
    parser.add_argument("--config", action="config", help="the YAML file, in place of CONFIG")
    parser.add_argument("--resume", action="store_true", help="continue a run exactly where it was saved")
    parser.add_class_arguments(Config)
    given = [] if arguments.config is None else ["--config", str(_config_file(arguments.config))]
    options = parser.parse_args([*given, *_dashes(arguments.rest)])
    config = parser.instantiate(options).as_dict()
    for key in ("config", "resume"):
        config.pop(key)
    return 0 if run(Config(**config), arguments.resume) is not None else 130


def _config_file(name: str) -> Path:
    """Return the file of that path, or the bundled configuration of that name."""
    bundled = CONFIGS / name.removeprefix("recipes/configs/")
    for path in (Path(name), bundled, bundled.with_suffix(".yaml")):
        if path.is_file():
            return path
    known = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))
    raise FileNotFoundError(f"config must be a YAML file or one of {', '.join(known)}, got {name}.")


def _dashes(arguments: Sequence[str]) -> list[str]:
    """Let --data-root stand for --data_root."""
    return ["--" + a[2:].replace("-", "_") if a.startswith("--") and "=" not in a else a for a in arguments]


def benchmark(arguments: argparse.Namespace) -> int:
    """Measure costs as ratios, side by side in one process."""
    from recipes.benchmark import benchmark_step

    rows = [dataclasses.asdict(row) for row in benchmark_step(arguments.rounds)]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows, tuple(rows[0]))
    return 0


def _print_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{row[c]:.4f}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
