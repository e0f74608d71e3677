"""Code and commands of the README and of the documentation: complete ones run, all others are parsed.

Pages whose code is complete and draws pictures are run by test_tutorials.py, those of trainers by their own tests.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import textwrap
from functools import reduce
from pathlib import Path

import pytest
import torch

import bayeslayers as bl
import zoo
from recipes.cli import main
from recipes.cli.parser import _parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WHOLE = ["README.md", "docs/index.md", "docs/start.md"]  # every block runs as printed, with no name from elsewhere


def blocks(path):
    return [textwrap.dedent(code) for code in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.S | re.M)]


def commands(text):
    """Return the command lines of `bayeslayers` in a page's blocks and in its indented lines, without placeholders."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    fenced, found = False, []
    for line in lines:
        fenced ^= line.startswith("```")
        if (fenced or line.startswith("    ")) and line.strip().startswith("bayeslayers "):
            words = shlex.split(line, comments=True)[1:]
            found.append([word for word in words if not word.startswith("$")])
    return [words for words in found if not re.search(r"\b(CONFIG|TASK|RUN|NAME)\b|METHOD", " ".join(words))]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", WHOLE)
def test_whole_pages_run_as_printed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks(ROOT / name)
    assert found
    with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
        for code in found:
            exec(compile(code, name, "exec"), {})


@pytest.mark.usefixtures("one_thread")
def test_the_line_of_the_readme_takes_every_optimiser_that_it_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "README.md").read_text()
    named = re.findall(r"`(\w+)`", re.findall(r"^(`IVON`.*?)can replace VOGN", page, re.S | re.M)[0])
    assert len(named) > 3
    (code,) = (block for block in blocks(ROOT / "README.md") if "optimizer = bl.VOGN" in block)
    for name in named:
        with torch.random.fork_rng():
            exec(compile(code.replace("bl.VOGN", f"bl.{name}"), name, "exec"), {})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_block_is_python_and_names_what_exists(path):
    for code in blocks(path):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and (name := ast.unparse(node)).startswith(("bl.", "zoo.")):
                if re.fullmatch(r"[\w.]+", name):
                    top, *rest = name.split(".")
                    reduce(getattr, rest, {"bl": bl, "zoo": zoo}[top])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_is_one_that_the_parser_knows(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(path.read_text()):
        arguments, unknown = _parser(words).parse_known_args(words)
        assert not unknown, words
        if words[0] == "train" and "runs/" not in str(arguments.config):
            with contextlib.redirect_stdout(io.StringIO()):
                assert main([*words, "--print_config"]) == 0, words


def test_the_pages_hold_what_is_looked_for():
    assert sum(len(blocks(path)) for path in PAGES) > 60
    assert sum(len(commands(path.read_text())) for path in PAGES) > 60
