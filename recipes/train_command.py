"""The command `bayeslayers train`, whose options are those of its configuration."""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from recipes.names import without_folders

CONFIGS = Path(__file__).parent / "configs"
RECIPES = ("classification", "toy2d")
_FLAGS = ("--resume", "--help", "--print_config")
_PLACES = ("--data-root", "--data_root", "--output", "--baseline", "--device")


def train(arguments: argparse.Namespace) -> int:
    """Train a posterior from a configuration file."""
    from jsonargparse import ArgumentError, ArgumentParser

    words = _config_first(_underscores(arguments.words))
    recipe = _recipe(words)
    parser = ArgumentParser(
        prog="bayeslayers train CONFIG",
        description="Train a posterior. CONFIG is a YAML file, or the name of a bundled one as mnist/lenet5_vogn; "
        "options override it.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="the YAML file, in place of CONFIG")
    parser.add_argument("--resume", action="store_true", help="continue a run exactly where it was saved")
    parser.add_class_arguments(recipe.Config)
    try:
        options = parser.parse_args(words)
        config = parser.instantiate(options).as_dict()
    except ArgumentError as error:
        advice = "See" if "--config" in words else "Give a CONFIG, as mnist/lenet5_vogn, or see"
        raise ValueError(f"{str(error).rstrip('.')}. {advice} bayeslayers train --help.") from None
    del config["config"]
    resume = config.pop("resume")
    return 0 if recipe.train(recipe.Config(**config), resume, _command(arguments.words)) is not None else 130


def _recipe(words: Sequence[str]) -> ModuleType:
    """Return the module of the recipe that the words or their configuration name; classification if neither does."""
    import yaml

    from bayeslayers.checks import near

    name = "classification"
    if words[:1] == ["--config"] and len(words) > 1:
        try:
            content = yaml.safe_load(Path(words[1]).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            content = None  # the parser says what is wrong with it
        name = content.get("recipe", name) if isinstance(content, dict) else name
    for before, word in itertools.pairwise(["", *words]):
        name = word if before == "--recipe" else name
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}.{near(str(name), RECIPES)}")
    return importlib.import_module(f"recipes.{name}")


def _underscores(words: Sequence[str]) -> list[str]:
    """Let --data-root stand for --data_root."""
    return [re.sub("(?<=^--)[^=]+", lambda name: name[0].replace("-", "_"), word) for word in words]


def _config_first(words: Sequence[str]) -> list[str]:
    """Return the options behind the configuration that they override, wherever and however it was written."""
    words = [part for word in words for part in re.split("(?<=^--config)=|(?<=^--recipe)=", word)]
    before = ""
    for index, word in enumerate(words):
        named = before == "--config"
        takes_value = before.startswith("--") and "=" not in before and before not in _FLAGS
        if named or not (takes_value or word.startswith("-")):
            return ["--config", str(_config_file(word)), *words[: index - named], *words[index + 1 :]]
        before = word
    return list(words)


def _config_file(name: str) -> Path:
    """Return the file of that path, or the bundled configuration of that name."""
    from bayeslayers.checks import near

    bundled = CONFIGS / name.removeprefix("recipes/configs/")
    for path in (Path(name), bundled, bundled.with_suffix(".yaml")):
        if path.is_file():
            return path
    known = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))
    raise FileNotFoundError(
        f"config must be a YAML file or the name of a bundled one, got {name!r}.{near(name, known)} "
        f"{CONFIGS} has them all."
    )


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
