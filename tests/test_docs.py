"""The documentation keeps up with the source: the map of the rooms, the pages, the names, the files for newcomers."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayeslayers as bl
import zoo
from bayeslayers.storage.model_card import model_card
from bayeslayers.storage.posterior import read_card

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def paths():
    """Return the pages of the site as a toctree names them."""
    return [str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md") if "_build" not in path.parts]


def script(name):
    """Return a script of the documentation as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rooms():
    return script("rooms")


def test_the_map_of_the_rooms_is_that_of_the_source(rooms):
    page = (DOCS / "architecture.md").read_text()
    assert page == rooms.redrawn(page), "run python docs/rooms.py"
    assert max(map(len, rooms.drawing().splitlines())) <= 100


def test_packages_and_rooms_point_downwards(rooms):
    assert rooms.packages() == {"recipes": {"zoo", "bayeslayers"}, "zoo": {"bayeslayers"}, "bayeslayers": set()}
    floors = rooms.floors(rooms.rooms("recipes"))
    assert floors[0] == ["data"] and floors[-1] == ["cli"]
    with pytest.raises(ValueError, match=r"circle, got \['a', 'b'\]"):
        rooms.floors({"a": {"b"}, "b": {"a"}, "c": set()})


def test_the_map_shows_another_import(rooms, monkeypatch):
    page = (DOCS / "architecture.md").read_text()
    real = rooms.rooms

    def changed(package):
        return real(package) | ({"plots": set()} if package == "bayeslayers" else {})

    monkeypatch.setattr(rooms, "rooms", changed)
    assert page != rooms.redrawn(page)


def test_every_page_is_in_one_section():
    index = (DOCS / "index.md").read_text()
    assert re.findall(r":caption: (.*)", index) == ["Start", "Tutorials", "Guides", "Concepts", "Reference", "Results"]
    listed = [line for block in re.findall(r"```\{toctree\}\n(.*?)```", index, re.S) for line in block.split()]
    pages = [word for word in listed if (DOCS / f"{word}.md").is_file()]
    assert sorted(pages) == sorted(path for path in paths() if path != "index")


@pytest.mark.parametrize("module", [bl, zoo], ids=["bayeslayers", "zoo"])
def test_the_reference_has_every_public_name(module):
    words = set(re.findall(r"\w+", (DOCS / "api.md").read_text()))
    assert sorted(set(module.__all__) - words - {"plots"}) == []


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *DOCS.rglob("*.md")], ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / link).exists(), f"{path.name} links to {link}"


def test_files_that_the_guide_for_contributors_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = [word for word in re.findall(r"`([\w/.-]+/[\w.-]*)`", text) if not re.search("[A-Z]{3}", word)]
    assert len(named) > 10 and [word for word in named if not (ROOT / word).exists()] == []


def test_newcomers_find_what_they_look_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["version"] == bl.__version__ and citation["authors"]
    for name in ("LICENSE", "SECURITY.md", "CHANGELOG.md", ".github/pull_request_template.md"):
        assert (ROOT / name).stat().st_size > 200
    for package in ("bayeslayers", "zoo", "recipes"):
        assert (ROOT / package / "py.typed").is_file()
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.md"):
        assert {"name", "about"} <= yaml.safe_load(path.read_text().split("---\n")[1]).keys()


@pytest.mark.usefixtures("one_thread")
def test_what_to_write_in_place_of_other_libraries_runs():
    page = (DOCS / "coming_from.md").read_text()
    blocks = re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", page, re.M | re.S)
    assert [title.split(",")[0] for title, _ in blocks] == re.findall(r"^## ([\w-]+)", page, re.M)
    for _, block in blocks:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        loader = DataLoader(TensorDataset(torch.randn(60, 4), torch.randint(3, (60,))), 20)
        names = {"bl": bl, "zoo": zoo, "torch": torch, "F": nn.functional, "net": net, "loader": loader, "N": 60}
        exec(block, names | {"x": torch.randn(5, 4)})


def test_the_page_of_bundled_posteriors_is_made_from_their_cards():
    text = (DOCS / "bundled.md").read_text()
    assert text == script("bundled").page(), "run python docs/bundled.py --pictures"
    assert re.findall(r"^## (.*)", text, re.M) == sorted(zoo.list_posteriors())
    for name in zoo.list_posteriors():
        folder = zoo.resolve(name)
        card = (folder / "README.md").read_text()
        assert card == model_card(read_card(folder), picture=True), f"run python docs/bundled.py for {name}"


def test_every_picture_is_on_a_page_and_is_compact():
    shown = set()
    for path in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", path.read_text()):
            assert (path.parent / link).is_file(), f"{path.name} shows {link}"
            shown.add((path.parent / link).resolve())
    kept = [*(DOCS / "images").rglob("*"), *(ROOT / "zoo/posteriors").glob("*/picture.png")]
    assert shown == {path for path in kept if path.is_file()}
    assert all(path.stat().st_size < (1_500_000 if path.suffix == ".gif" else 200_000) for path in shown)
