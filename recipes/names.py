"""Names of data sets and run folders, without where their files are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def short_name(name: str) -> str:
    """Return the name of a data set without the place of its files.

    >>> short_name("npz:data/ood/notmnist_{split}.npz"), short_name("imagefolder:data/pets/"), short_name("svhn")
    ('notmnist', 'pets', 'svhn')
    """
    parts = _short_parts(name)
    return parts[-1] if parts else name


def by_short_name(names: Sequence[str]) -> dict[str, str]:
    """Return data sets by their short names, with so many folders before each as tell them apart.

    >>> by_short_name(["npz:/data/old/pets.npz", "npz:/data/new/pets.npz", "svhn"])
    {'old/pets': 'npz:/data/old/pets.npz', 'new/pets': 'npz:/data/new/pets.npz', 'svhn': 'svhn'}
    """
    unique = dict.fromkeys(names)
    return dict(zip(shortest_ends([_short_parts(name) or [name] for name in unique]), unique, strict=True))


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


def without_folders(word: str) -> str:
    """Return a word of a command without the folders of the files of data in it.

    >>> without_folders('["npz:/data/ood/dtd.npz", "imagefolder:../pets"]')
    '["npz:dtd.npz", "imagefolder:pets"]'
    """
    return re.sub(r"(npz|imagefolder):[^'\",\[\]]*[/\\]", r"\1:", word)


def _short_parts(name: str) -> list[str]:
    """Return the folders and the name of a data set of the user's files, nothing for another one."""
    kind, colon, path = name.partition(":")
    if not (colon and path):
        return []
    folder_or_file = Path(path.replace("{split}", ""))
    last = (folder_or_file.stem if kind == "npz" else folder_or_file.name).strip("_-. ")
    return [*folder_or_file.parent.parts, last] if last else []
