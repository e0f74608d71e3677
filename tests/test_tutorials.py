"""The complete pages of the documentation run as they stand, and print and draw what they show."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"


def _loaded():
    spec = importlib.util.spec_from_file_location("pages", DOCS / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages = _loaded()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", pages.PAGES)
def test_a_page_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / f"{page}.md").read_text()
    assert pages.cells(text)
    with torch.random.fork_rng():
        for cell, printed in pages.run(page):
            if cell.printed is not None:
                assert pages.agree(cell.printed, printed), (
                    f"{cell.code}prints\n{printed}Run python docs/pages.py {page}."
                )
    drawn = pages.pictures(text)
    assert drawn and [name for name in drawn if not (tmp_path / Path(name).name).is_file()] == []


@pytest.mark.parametrize("page", pages.PAGES)
def test_a_page_shows_compact_pictures_and_leads_on(page):
    text = (DOCS / f"{page}.md").read_text()
    for name in pages.pictures(text):
        assert 1000 < ((DOCS / page).parent / name).stat().st_size < 150_000
    if page.startswith("tutorials/"):
        assert text.index("![") < text.index("## ")  # the picture first
        assert re.search(r"^## What to look at|^## Look at it", text, re.M) and "## What can go wrong" in text
        assert re.search(r"^Next: \[", text, re.M)


def test_outputs_agree_by_words_and_loosely_by_numbers():
    assert pages.agree("accuracy 0.91, 12 of 40\n", "accuracy  0.87, 14 of 40")
    assert not pages.agree("accuracy 0.91", "accuracy 0.31")
    assert not pages.agree("accuracy 0.91", "nll 0.91")
    assert not pages.agree("accuracy 0.91", "accuracy 0.91, 3")


def test_a_page_is_rewritten_with_what_it_prints():
    text = "```python\nprint(1)\n```\n\n```text\n0\n```\n\n```python\nx = 2\n```\n"
    assert pages.rewritten(text, ["1\n", ""]) == text.replace("\n0\n", "\n1\n")
    assert [cell.printed for cell in pages.cells(text)] == ["0\n", None]
