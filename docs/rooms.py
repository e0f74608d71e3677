"""Draws the map of the rooms in architecture.md from the imports of the source: `python docs/rooms.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/architecture.md"
BEGIN, END = "<!-- drawn by docs/rooms.py -->\n```text\n", "```\n<!-- end of the drawing -->"
PACKAGES = ("recipes", "zoo", "bayeslayers")
ALIAS = ROOT / "bayeslayers/zoo.py"  # another name of the zoo, which stands above the library
_WIDTH = 100


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(package: str) -> dict[str, set[str]]:
    """Return the rooms of a package, each with the rooms that it imports; one room is a folder or a file."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        if (room := path.relative_to(ROOT / package).parts[0].removesuffix(".py")) != "__init__" and path != ALIAS:
            names = [name.split(".") for name in imports(path)]
            found.setdefault(room, set()).update(name[1] for name in names if name[0] == package and name[1:])
    return {room: (needed & found.keys()) - {room} for room, needed in found.items()}


def packages() -> dict[str, set[str]]:
    """Return the packages, each with those that it imports."""
    found = {}
    for package in PACKAGES:
        names = {name.partition(".")[0] for p in (ROOT / package).rglob("*.py") if p != ALIAS for name in imports(p)}
        found[package] = names & set(PACKAGES) - {package}
    return found


def floors(needs: dict[str, set[str]]) -> list[list[str]]:
    """Return rooms by floor, the ground first: a room stands one floor above the highest that it imports.

    Raises:
        ValueError: If rooms import each other in a circle.
    """
    floor: dict[str, int] = {}
    while len(floor) < len(needs):
        ready = {room for room, needed in needs.items() if room not in floor and needed <= floor.keys()}
        if not ready:
            raise ValueError(f"rooms must not import each other in a circle, got {sorted(needs.keys() - floor)}.")
        floor |= {room: max((floor[below] + 1 for below in needs[room]), default=0) for room in ready}
    return [sorted(room for room in floor if floor[room] == level) for level in range(max(floor.values()) + 1)]


def drawing() -> str:
    """Return the map: each package with its rooms floor by floor, the top first, and what each room imports."""
    lines = []
    for package, needed in packages().items():
        below = ", ".join(name for name in PACKAGES if name in needed)
        lines += [f"{package}/" + (f"  imports {below}" if below else "  imports no other package of ours")]
        needs = rooms(package)
        width = max(map(len, needs))
        for level, names in reversed(list(enumerate(floors(needs)))):
            for name in names:
                lines += _wrapped(f"  {level:2}  {name:{width}}  ", sorted(needs[name]))
        lines += [""]
    return "\n".join(lines[:-1]) + "\n"


def _wrapped(head: str, words: list[str]) -> Iterator[str]:
    """Yield lines of words behind an arrow, each at most `_WIDTH` wide, the first one headed."""
    line = head + "-> " * bool(words)
    indent = " " * len(line)
    for word in words:
        if len(line) + len(word) > _WIDTH:
            yield line.rstrip()
            line = indent
        line += f"{word} "
    yield line.rstrip()


def redrawn(page: str) -> str:
    """Return the page with the drawing of today."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + drawing() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(redrawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
