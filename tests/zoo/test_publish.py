"""Cards, pictures, licences, tags, and publishing all bundled posteriors, on the loopback Hub."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil

import pytest
import torch
import yaml
from support.small_posterior import same, saved, uncertain

import bayeslayers as bl
import zoo
from bayeslayers.storage.posterior import read_card
from recipes.cli import main
from zoo import hub as client
from zoo.loading import publish, publish_all

pytestmark = [
    pytest.mark.usefixtures("home"),
    pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning"),  # of huggingface_hub's, in its own upload
]
KINDS = {
    "images": ("mlp", {"input_size": [1, 4, 4], "num_classes": 3}, "image-classification"),
    "plane": ("mlp", {"input_size": [2], "num_classes": 1}, "tabular-classification"),
    "table": ("regressor", {"input_size": [3], "num_targets": 2}, "tabular-regression"),
    "scenes": ("unet_small", {"input_size": [3, 16, 16], "num_classes": 2}, "image-segmentation"),
    "text": ("text_lstm", {"vocabulary": 20, "num_classes": 3}, "text-classification"),
}


def card_on(hub, repository):
    return hub.git(repository, "show", "main:README.md")


def head_on(hub, repository):
    return yaml.safe_load(card_on(hub, repository).split("---\n")[1])


@pytest.fixture
def bundled(home, monkeypatch):
    """Three small posteriors in place of the bundled ones."""
    folder = home / "posteriors"
    for seed, name in enumerate(("a-digits", "b-digits", "c-digits")):
        saved(folder / name, seed, license="mit")
    monkeypatch.setattr("zoo.loading.BUNDLED", folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_of_a_published_card_runs_as_printed(home, hub, kind):
    builder, kwargs, task = KINDS[kind]
    torch.manual_seed(0)
    model = uncertain(zoo.create(builder, **kwargs))
    model.likelihood = {"plane": bl.Bernoulli(), "table": bl.Gaussian()}.get(kind, bl.Categorical())
    bl.save_posterior(model, home / "mine", dataset="things", metrics={"num_samples": 3})
    publish(home / "mine", f"ada/code-{kind}")
    assert head_on(hub, f"ada/code-{kind}")["pipeline_tag"] == task
    (code,) = re.findall(r"```python\n(.*?)```", card_on(hub, f"ada/code-{kind}"), re.S)
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, kind, "exec"), names)
    assert names["prediction"].num_samples == 3 and len(names["x"]) == 2
    assert printed.getvalue().startswith("tensor(") and names["model"].card.sha256 == model_hash(home)


def model_hash(home):
    return read_card(home / "mine").sha256


def test_the_card_on_the_hub_shows_a_picture_that_travels_with_it(home, hub):
    saved(home / "mine", metrics={"accuracy": 0.5})
    publish(home / "mine", "ada/pictured")
    assert "![Picture of ada/pictured](picture.png)" in card_on(hub, "ada/pictured")
    assert hub.raw("ada/pictured", "picture.png").startswith(b"\x89PNG")  # bars of its metrics
    drawn = b"\x89PNG\r\n\x1a\n drawn"
    publish(home / "mine", "ada/pictured", draw=lambda model: drawn * (model.card.dataset == "digits"))
    assert hub.raw("ada/pictured", "picture.png") == drawn
    (home / "mine/picture.png").write_bytes(drawn + b"own")
    publish(home / "mine", "ada/pictured", draw=lambda _: pytest.fail("it has a picture"))
    assert hub.raw("ada/pictured", "picture.png") == drawn + b"own"
    bl.save_posterior(zoo.load(home / "mine"), home / "mine", metrics={})  # a folder with a picture is a posterior
    assert not (home / "mine/picture.png").exists()
    publish(home / "mine", "ada/unpictured")
    assert "![" not in card_on(hub, "ada/unpictured")
    assert "picture.png" not in hub.git("ada/unpictured", "ls-tree", "--name-only", "main")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"GIF89a", "must be a PNG"), (b"\x89PNG\r\n\x1a\n" * 2**20, "must have at most 4194304 bytes")],
)
def test_a_picture_is_a_small_png(home, hub, content, message):
    saved(home / "mine")
    (home / "mine/picture.png").write_bytes(content)
    with pytest.raises(bl.PosteriorError, match=rf"picture\.png {message}"):
        publish(home / "mine", "ada/no-picture")
    assert hub.log == []


def test_a_picture_that_is_a_link_out_of_the_folder_is_not_published(home, hub):
    saved(home / "mine")
    (home / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n secret")
    (home / "mine/picture.png").symlink_to(home / "secret.png")
    with pytest.raises(bl.PosteriorError, match="got a link out of it"):
        publish(home / "mine", "ada/no-link")
    assert hub.log == []


def test_a_downloaded_card_is_rewritten_under_its_next_name(home, hub):
    publish(saved(home / "mine"), "ada/origin")
    zoo.download("ada/origin", home / "copy")
    publish(home / "copy", "ada/next")
    assert 'zoo.load("ada/next")' in card_on(hub, "ada/next") and "ada/origin" not in card_on(hub, "ada/next")


def test_the_licence_is_asked_for_where_the_card_has_none(home, hub, capsys, monkeypatch):
    folder = str(saved(home / "mine"))
    assert main(["publish", folder, "ada/licensed"]) == 0
    assert "the card names none. Add --license" in capsys.readouterr().err
    assert "license" not in head_on(hub, "ada/licensed")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal("cc-by-4.0\n"))
    assert main(["publish", folder, "ada/licensed"]) == 0
    assert "Licence, such as apache-2.0 or mit (empty for none): " in capsys.readouterr().err
    assert head_on(hub, "ada/licensed")["license"] == "cc-by-4.0"
    assert zoo.card_of(zoo.load("ada/licensed")).license == "cc-by-4.0"
    assert read_card(folder).license == ""  # the user's own folder stays
    monkeypatch.setattr("sys.stdin", Terminal("\n"))
    assert main(["publish", folder, "ada/unlicensed"]) == 0 and "license" not in head_on(hub, "ada/unlicensed")
    monkeypatch.setattr("sys.stdin", Terminal())
    assert main(["publish", folder, "ada/licensed", "--license", "mit"]) == 0
    captured = capsys.readouterr()
    assert head_on(hub, "ada/licensed")["license"] == "mit"
    assert main(["publish", folder, "ada/licensed", "--license", "MIT Licence"]) == 1
    assert "license must be as the Hub names it" in capsys.readouterr().err and captured.out


def test_search_finds_by_task_data_set_network_and_method(home, capsys):
    for name, data, method in (("one", "tag-one (9 train)", "vogn"), ("two", "tag-two", "ivon")):
        saved(home / name, dataset=data, optimizer={"name": method})
        publish(home / name, f"ada/tagged-{name}", license="mit")

    def found(*words):
        assert main(["search", "tagged", *words, "--json"]) == 0
        return [posterior["name"] for posterior in json.loads(capsys.readouterr().out)]

    both = ["ada/tagged-one", "ada/tagged-two"]
    assert found() == found("--tag", "image-classification") == found("--tag", "mlp", "--tag", "license:mit") == both
    assert found("--tag", "vogn") == found("--tag", "tag-one") == both[:1]
    assert found("--tag", "ivon", "--tag", "tag-one") == found("--tag", "tabular-regression") == []
    assert main(["search", "tagged-one"]) == 0
    assert capsys.readouterr().out.endswith("2026-01-02  image-classification mlp tag-one vogn\n")
    assert client.search("tagged", tags=["ivon"])[0].tags[:2] == ("bayeslayers", "image-classification")


def test_publishing_again_uploads_only_what_has_changed(home, hub):
    first = publish(saved(home / "mine"), "ada/twice")
    hub.log.clear()
    assert publish(home / "mine", "ada/twice") == first
    assert {line.split()[0] for line in hub.log} == {"GET"}
    assert publish(home / "mine", "ada/twice@trial") != first  # another branch
    assert publish(saved(home / "mine", seed=1), "ada/twice") != first
    same("ada/twice", 1)
    same("ada/twice@trial", 0)


def test_all_bundled_posteriors_are_published_and_a_second_call_uploads_nothing(home, hub, bundled, capsys):
    assert main(["publish", "--all", "--organisation", "ada"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[0] for line in lines] == [
        f"{number}/3 ada/{name}: uploaded" for number, name in enumerate(sorted(p.name for p in bundled.iterdir()), 1)
    ]
    for seed, name in enumerate(("a-digits", "b-digits", "c-digits")):
        same(f"ada/{name}", seed)
    hub.log.clear()
    assert main(["publish", "--all", "--organisation", "ada"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "1/3 ada/a-digits: unchanged"
    assert {line.split()[0] for line in hub.log} == {"GET"}
    saved(bundled / "b-digits", seed=7, license="mit")
    assert [one.uploaded for one in publish_all("ada")] == [False, True, False]
    same("ada/b-digits", 7)


def test_a_posterior_that_fails_is_named_and_the_others_are_published(home, hub, bundled, capsys, monkeypatch):
    monkeypatch.setattr(hub, "broken", {"ada/y-digits"})
    for old, new in (("a", "x"), ("b", "y"), ("c", "z")):
        (bundled / f"{old}-digits").rename(bundled / f"{new}-digits")
    (bundled / "x-digits/model.safetensors").write_bytes(b"")
    assert main(["publish", "--all", "--organisation", "ada"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("failed: ") == 2 and "3/3 ada/z-digits: uploaded" in captured.out
    assert captured.err.startswith("bayeslayers: 2 of 3 posteriors were not published: x-digits, y-digits. Call")
    same("ada/z-digits", 2)
    assert not hub.has("ada/x-digits")
    monkeypatch.setattr(hub, "broken", set())
    saved(bundled / "x-digits", 0, license="mit")
    assert main(["publish", "--all", "--organisation", "ada"]) == 0  # the rest
    assert [line.split(": ")[1].split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "uploaded",
        "uploaded",
        "unchanged",
    ]
    same("ada/y-digits", 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "must be given FOLDER and OWNER/REPO, or --all"),
        ("folder", "must be given FOLDER and OWNER/REPO, or --all"),
        ("--all", "must be given FOLDER and OWNER/REPO, or --all"),
        ("folder ada/x --organisation ada", "must be given FOLDER and OWNER/REPO, or --all"),
        ("folder ada/x --all --organisation ada", "publish --all takes no folder"),
        ("--all --organisation ada --license mit", "publish --all takes no folder"),
        ("--all --organisation a/b", "repository must be OWNER/REPO"),
        ("--all --organisation eve", "3 of 3 posteriors were not published"),
    ],
)
def test_what_is_published_and_where_is_said_once(hub, bundled, capsys, words, message):
    assert main(["publish", *words.split()]) == 1
    assert message in capsys.readouterr().err
    assert not [line for line in hub.log if "commit" in line]


def test_a_plain_name_that_is_not_bundled_is_found_in_the_organisation(home, hub, monkeypatch, capsys):
    monkeypatch.setenv("BAYESLAYERS_ORGANISATION", "ada")
    publish(saved(home / "mine", seed=3), "ada/big-digits")
    publish(saved(home / "mine", seed=4), "ada/big-digits@v2")
    same("big-digits", 3)
    same("big-digits@v2", 4)
    assert main(["info", "big-digits", "--json"]) == 0 and json.loads(capsys.readouterr().out)["dataset"] == "digits"
    monkeypatch.chdir(home)
    saved(home / "big-digits", seed=5)
    same("big-digits", 5)  # a folder comes first
    hub.log.clear()
    zoo.load("mlp-gap")
    assert hub.log == []  # as does a bundled one
    shutil.rmtree(home / "big-digits")
    monkeypatch.setattr(hub, "down", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    same("big-digits", 3)  # from the cache


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("resnet18-none", True, r"OWNER/REPO on the Hub, and ada/resnet18-none is not there\."),
        ("lenet5-mnits", True, r"ada/lenet5-mnits is not there\. Did you mean 'lenet5-mnist'"),
        ("plainword", False, r"a folder or OWNER/REPO on the Hub\."),
        ("Mine-Too", False, r"a folder or OWNER/REPO on the Hub\."),
        ("a--b", False, r"a folder or OWNER/REPO on the Hub\."),
    ],
)
def test_only_names_of_a_posteriors_form_are_asked_for(hub, monkeypatch, name, asked, message):
    monkeypatch.setenv("BAYESLAYERS_ORGANISATION", "ada")
    with pytest.raises(ValueError, match=message):
        zoo.load(name)
    assert bool(hub.log) == asked


def test_a_name_near_a_bundled_one_says_so_without_the_hub_and_another_says_why(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"and bayeslayers/lenet5-mnits cannot be asked for there\. Did you mean"):
        zoo.load("lenet5-mnits")
    with pytest.raises(ConnectionError, match="posterior 'bayeslayers/vast-imagenet' is not a folder and not in the"):
        zoo.load("vast-imagenet")


@pytest.mark.slow
def test_the_posteriors_of_the_package_reach_an_organisation_whole(home, hub):
    done = list(publish_all("ada"))
    assert [one.name for one in done] == zoo.list_posteriors() and all(one.uploaded for one in done), done
    for name in zoo.list_posteriors():
        assert head_on(hub, f"ada/{name}").keys() >= {"pipeline_tag", "license", "tags", "library_name", "model-index"}
        assert hub.raw(f"ada/{name}", "picture.png") == (zoo.resolve(name) / "picture.png").read_bytes()
        assert zoo.card_of(zoo.load(f"ada/{name}")).sha256 == read_card(zoo.resolve(name)).sha256
    assert not [one for one in publish_all("ada") if one.uploaded or one.error]
