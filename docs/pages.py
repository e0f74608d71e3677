"""Run the pages of the documentation whose code is complete, and rewrite what they print and the pictures they show.

python docs/pages.py                             # every page
python docs/pages.py tutorials/regression        # one

The blocks of a page run in order, in one namespace and in an empty folder: `python` as code, or as a file where the
first line is `# NAME.py`; `bash` as commands of `bayeslayers` and `torchrun`. A `text` block behind one holds what it
prints.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).parent
PAGES = [*sorted(f"tutorials/{path.stem}" for path in (DOCS / "tutorials").glob("*.md")), "bad_posteriors"]
_BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```\n(?:\n^```text\n(.*?)^```\n)?", re.M | re.S)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


class Cell(NamedTuple):
    """A block of code, and what the page says that it prints, or None."""

    kind: str
    code: str
    printed: str | None


def cells(text: str) -> list[Cell]:
    return [Cell(match[1], match[2], match[3]) for match in _BLOCK.finditer(text)]


def pictures(text: str) -> list[str]:
    """Return the paths of the pictures that a page shows and its code makes, from the page's folder."""
    return re.findall(r"!\[[^\]]*\]\(([^)]*images/tutorials/[^)]*)\)", text)


def run(page: str) -> Iterator[tuple[Cell, str]]:
    """Yield each block of a page in the current folder, with what it printed."""
    names: dict[str, Any] = {"__name__": "page"}
    for cell in cells((DOCS / f"{page}.md").read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if script := re.match(r"# (\w+\.py)\n", cell.code):
                Path(script[1]).write_text(cell.code)
            elif cell.kind == "python":
                exec(compile(cell.code, f"{page}.md", "exec"), names)
            else:
                for line in cell.code.replace("\\\n", " ").splitlines():
                    _command(shlex.split(line, comments=True))
        yield cell, printed.getvalue()


def _command(words: list[str]) -> None:
    """Run a command line; `bayeslayers` in this process."""
    if words[:1] == ["bayeslayers"]:
        from recipes.cli import main

        assert main(words[1:]) in (0, None), words
    elif words:
        python = {"torchrun": ["-m", "torch.distributed.run"], "python": []}[words[0]]
        environment = os.environ | {"PYTHONPATH": str(DOCS.parent), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *python, *words[1:]], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        print(done.stdout, end="")


def agree(printed: str, output: str) -> bool:
    """Return whether two outputs have the same words, and numbers within a third of each other."""
    one, other = ([line.rstrip() for line in text.strip().splitlines()] for text in (printed, output))
    if _NUMBER.sub("#", re.sub(r"\s+", " ", "\n".join(one))) != _NUMBER.sub("#", re.sub(r"\s+", " ", "\n".join(other))):
        return False
    numbers = (map(float, _NUMBER.findall("\n".join(lines))) for lines in (one, other))
    return all(abs(a - b) <= 0.35 * max(abs(a), abs(b)) + 0.1 for a, b in zip(*numbers, strict=True))


def rewritten(text: str, outputs: list[str]) -> str:
    """Return a page with other outputs in its `text` blocks."""
    left = iter(outputs)

    def block(match: re.Match[str]) -> str:
        output = next(left)
        shown = "\n".join(line.rstrip() for line in output.strip("\n").splitlines())
        return match[0] if match[3] is None else f"```{match[1]}\n{match[2]}```\n\n```text\n{shown}\n```\n"

    return _BLOCK.sub(block, text)


def compact(source: Path, target: Path) -> None:
    """Copy a picture with at most 256 colours: half of the bytes."""
    from PIL import Image

    with Image.open(source) as image:
        image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            target, optimize=True
        )


def _rewrite(page: str) -> None:
    path = DOCS / f"{page}.md"
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        outputs = [output for _, output in run(page)]
        os.chdir(before)
        text = path.read_text()
        for picture in pictures(text):
            target = path.parent / picture
            compact(Path(folder) / target.name, target)
    path.write_text(rewritten(text, outputs))


if __name__ == "__main__":
    import torch

    sys.path.insert(0, str(DOCS.parent))
    torch.set_num_threads(1)
    for page in sys.argv[1:] or PAGES:
        print(page, file=sys.stderr)
        _rewrite(page)
