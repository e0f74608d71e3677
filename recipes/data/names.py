"""Names of data sets and run folders, without where their files are."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path


def short_name(name: str) -> str:
    """Return the name of a data set without the place of its files.

    >>> short_name("npz:data/ood/notmnist_{split}.npz"), short_name("imagefolder:data/pets/"), short_name("svhn")
    ('notmnist', 'pets', 'svhn')
    >>> short_name("npz:data/energy.npz@3")
    'energy@3'
    >>> short_name("npz:data/cifar10/{split}.npz")
    'cifar10'
    """
    base, number = without_split(name)
    return with_split(_short_parts(base)[-1], number)


def without_split(name: str) -> tuple[str, int]:
    """Return the name of a table without the number of its split, and this; 0 where it has none.

    >>> without_split("energy@3"), without_split("csv:cars.csv")
    (('energy', 3), ('csv:cars.csv', 0))
    """
    base, at, number = name.rpartition("@")
    return (base, int(number)) if at and re.fullmatch(r"\d{1,6}", number) else (name, 0)


def with_split(name: str, number: int) -> str:
    """Return the name of a table with that of one of its splits; the name alone for the first.

    >>> with_split("energy", 3), with_split("energy", 0)
    ('energy@3', 'energy')
    """
    return f"{name}@{number}" if number else name


def by_short_name(names: Sequence[str]) -> dict[str, str]:
    """Return data sets by their short names, with so many folders before each as tell them apart.

    >>> by_short_name(["npz:/data/old/pets.npz", "npz:/data/new/pets.npz", "svhn"])
    {'old/pets': 'npz:/data/old/pets.npz', 'new/pets': 'npz:/data/new/pets.npz', 'svhn': 'svhn'}

    Raises:
        ValueError: If nothing tells two of them apart.
    """
    unique = list(dict.fromkeys(names))
    short = shortest_ends([_short_parts(name) for name in unique])
    for number, name in enumerate(short):
        if name in short[:number]:
            raise ValueError(
                f"data sets must have names of their own, got two of the name {name!r}. Rename the files of one."
            )
    return dict(zip(short, unique, strict=True))


def shortest_ends(paths: Sequence[Sequence[str]]) -> list[str]:
    """Return the shortest end of each path, given by its parts, that no other one has.

    >>> shortest_ends([("a", "vogn"), ("b", "vogn"), ("a", "ivon")])
    ['a/vogn', 'b/vogn', 'ivon']
    """
    names = []
    for path in paths:
        length = 1
        while length < len(path) and sum(other[-length:] == path[-length:] for other in paths) > 1:
            length += 1
        names.append("/".join(path[-length:]))
    return names


def expanded(name: str) -> str:
    """Return a path, or the name of a data set, with the home folder in place of a `~` that its path begins with.

    >>> expanded("npz:~/letters.npz") == "npz:" + expanded("~/letters.npz"), expanded("svhn")
    (True, 'svhn')
    """
    kind, colon, path = name.partition(":")
    if colon and kind in ("npz", "csv", "imagefolder"):
        return f"{kind}:{os.path.expanduser(path)}"
    return os.path.expanduser(name)


def without_folders(word: str) -> str:
    """Return a word of a command without the folders of the files in it, but those below the working folder.

    >>> without_folders("--evaluation.ood=['npz:/data/dtd.npz','imagefolder:../pets/']"), without_folders("runs/a.yaml")
    ("--evaluation.ood=['npz:dtd.npz','imagefolder:pets']", 'runs/a.yaml')
    """
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    if Path(value).is_absolute() or value.startswith(("..", "~")):
        value = Path(value).name
    pattern = r"(npz|csv|imagefolder):(.+)" if value.startswith(("npz:", "csv:", "imagefolder:")) else _IN_A_LIST
    return option + equals + re.sub(pattern, lambda found: f"{found[1]}:{Path(found[2]).name}", value)


_IN_A_LIST = r"(npz|csv|imagefolder):([^'\",\[\]]+)"


def _short_parts(name: str) -> list[str]:
    """Return the folders and the name of a data set of the user's files; the name alone of another one."""
    kind, colon, path = name.partition(":")
    if not (colon and path):
        return [name]
    whole = Path(path.removesuffix(f".{kind}" * (kind in ("npz", "csv"))).replace("{split}", ""))
    return [short for part in whole.parts if (short := part.strip("_-. /\\"))] or [name]
