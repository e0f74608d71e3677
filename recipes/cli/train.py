"""The command `bayeslayers train`, whose options are those of its configuration."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.data.names import without_folders
from recipes.tasks.table import DEFAULT, TASKS
from recipes.training.interruption import exit_status

if TYPE_CHECKING:
    from recipes.tasks.task import Task

CONFIGS = Path(__file__).parents[1] / "configs"
_FLAGS = ("--resume", "--json")
_PLACES = ("--data-root", "--data_root", "--output", "--baseline", "--device")
_HELP = "See bayeslayers train --help."


def run(arguments: argparse.Namespace) -> int:
    """Train a posterior from a configuration file."""
    task, config = _asked_for(arguments)
    if arguments.print_config:
        import yaml

        print(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), end="")
        return 0
    run = task(config)
    metrics = run.train(arguments.resume, _command(arguments.words))
    if metrics is None:
        return exit_status()
    if not run.world.leads:  # the first rank prints
        return 0
    if arguments.json:
        print(json.dumps(metrics, indent=2))
    else:
        from rich.console import Console

        Console().print(task.metrics_table(metrics))
    return 0


def add_options(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of `train` to a parser.

    Args:
        parser: The parser.
        words: What was typed, which names the options of fields with free keys, as `--model.widths`.
    """
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="a YAML file, or the name of a bundled one, as mnist/lenet5_vogn"
    )
    parser.add_argument("--config", dest="file", metavar="CONFIG", help="the same")
    parser.add_argument("--resume", action="store_true", help="continue a run exactly where it was saved")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    for name in ("--print_config", "--print-config"):
        text = "print the configuration with all options, and do nothing" if "_" in name else argparse.SUPPRESS
        parser.add_argument(name, action="store_true", help=text)
    parser.set_defaults(overrides=[], words=list(words))
    fields = _fields()
    for title in ("configuration", *dict.fromkeys(path[0] for path in fields if path[1:])):
        group = parser.add_argument_group(title)
        for path, texts in fields.items():
            if title == (path[0] if path[1:] else "configuration"):
                _add(group, path, "; ".join(texts))
    free = {match[1] for word in words if (match := re.match(r"--([\w-]+(\.[\w-]+)+)(=|$)", word))}
    for name in sorted(free):
        path = tuple(name.replace("-", "_").split("."))
        if path not in fields and path[:1] in fields:
            parser.add_argument(f"--{name}", action="append", dest="overrides", type=_at(path), help=argparse.SUPPRESS)


@cache
def _fields() -> dict[tuple[str, ...], list[str]]:
    """Return the path of each option of any recipe, with what it is in each that has it."""
    from recipes.training.options import options, type_name

    found: dict[tuple[str, ...], list[str]] = {}
    for name, make in TASKS.items():
        for option in options(make().Config):
            required, part = option.default is dataclasses.MISSING, dataclasses.is_dataclass(option.default)
            given = ", required" if required else "" if part else f", default: {json.dumps(option.default)}"
            text = f"{option.text} ({type_name(option.kind)}{given})"
            found.setdefault(option.path, []).append(text if name == DEFAULT else f"{name}: {text}")
    return found


def _add(group: Any, path: tuple[str, ...], text: str) -> None:
    """Add an option, of which underscores may be typed as hyphens."""
    name, metavar = "--" + ".".join(path), path[-1].upper()
    for form, shown in {name.replace("_", "-"): argparse.SUPPRESS, name: text.replace("%", "%%")}.items():
        group.add_argument(form, action="append", dest="overrides", type=_at(path), metavar=metavar, help=shown)


def _at(path: tuple[str, ...]) -> Any:
    return lambda text: (path, text)


def _asked_for(arguments: argparse.Namespace) -> tuple[type[Task], Any]:
    """Return the task and the configuration that the file and the options make."""
    from bayeslayers.checks import did_you_mean
    from recipes.training.options import configuration, override

    name = arguments.config if arguments.file is None else arguments.file
    if arguments.config is not None and arguments.file is not None:
        raise ValueError(f"CONFIG must be given once, got {arguments.config!r} and --config {arguments.file!r}.")
    values = {} if name is None else _read(_config_file(name))
    recipe = values.get("recipe", DEFAULT)
    for path, text in arguments.overrides:
        recipe = text if path == ("recipe",) else recipe
    if recipe not in tuple(TASKS):
        raise ValueError(f"recipe must be one of {', '.join(TASKS)}, got {recipe!r}.{did_you_mean(str(recipe), TASKS)}")
    task = TASKS[recipe]()
    try:
        for path, text in arguments.overrides:
            override(values, task.Config, path, text)
        return task, configuration(task.Config, values)
    except ValueError as error:
        advice = "Give a CONFIG, as mnist/lenet5_vogn, or see" if name is None else "See"
        raise ValueError(f"{error} {advice} bayeslayers train --help.") from None


def _read(path: Path) -> dict[str, Any]:
    """Return the plain data of a configuration file."""
    from recipes.training.plain_yaml import MAX_CHARACTERS, read_yaml

    with path.open("rb") as file:
        content = file.read(4 * MAX_CHARACTERS + 1)
    try:
        values = read_yaml(content.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError:
        raise ValueError(f"{path} must be text in UTF-8, got other bytes.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of options to values, got {type(values).__name__}. {_HELP}")
    return values


def _config_file(name: str) -> Path:
    """Return the file of that path, or the bundled configuration of that name."""
    from bayeslayers.checks import did_you_mean
    from recipes.data.names import expanded

    bundled = CONFIGS / name.removeprefix("recipes/configs/")
    for path in (Path(expanded(name)), bundled, bundled.with_name(f"{bundled.name}.yaml")):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"config must be a YAML file or the name of a bundled one, got {name!r}.{did_you_mean(name, configurations())} "
        f"`bayeslayers list --configurations` has them all, {CONFIGS} their files."
    )


def configurations() -> list[str]:
    """Return the names of the bundled configurations."""
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))


def _command(words: Sequence[str]) -> str:
    """Return the command for the card, without what says where files are on this machine."""
    kept, rest = ["bayeslayers", "train"], iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name in _PLACES and not equals:
            next(rest, None)
        elif name not in _PLACES and word not in _FLAGS:
            kept.append(without_folders(word))
    return shlex.join(kept)


def unrecognized(words: Sequence[str]) -> str:
    """Return what to say of words that are no options."""
    from bayeslayers.checks import did_you_mean

    known = ["--" + ".".join(path) for path in _fields()]
    name = next((word.partition("=")[0] for word in words if word.startswith("--")), "")
    hint = did_you_mean("--" + name[2:].replace("-", "_"), known) if name else ""
    return f"unrecognized arguments: {' '.join(words)}.{hint} {_HELP}"
