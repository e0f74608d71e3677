from __future__ import annotations

import json
import os
import subprocess
import sys

import huggingface_hub.constants as settings
import pytest
import torch
from support.hub_server import TOKEN, free_port
from support.small_posterior import same, saved, uncertain
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.storage.model_card import model_card
from bayeslayers.storage.posterior import read_card
from recipes.cli import main
from zoo import hub as client
from zoo.loading import download, publish

pytestmark = [
    pytest.mark.usefixtures("home"),
    pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning"),  # of huggingface_hub's, in its own upload
]


def test_publish_then_load_predicts_the_same(home, hub):
    address = publish(saved(home / "mine", metrics={"accuracy": 0.5}), "ada/first")
    assert address.startswith(f"{hub.url}/ada/first/commit/")
    same("ada/first")
    assert hub.git("ada/first", "ls-tree", "--name-only", "main").split() == [
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "picture.png",
    ]
    assert hub.git("ada/first", "show", "main:model.safetensors").startswith("version https://git-lfs")
    folder = zoo.resolve("ada/first")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (folder / "config.json").is_symlink() and not (home / "mine/config.json").is_symlink()


def test_the_model_card_names_the_repository_unless_edited(home, hub):
    publish(saved(home / "mine"), "ada/carded")
    assert 'zoo.load("ada/carded")' in hub.git("ada/carded", "show", "main:README.md")
    assert (home / "mine/README.md").read_text() == model_card(read_card(home / "mine"))
    (home / "mine/README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    publish(home / "mine", "ada/carded")
    assert hub.git("ada/carded", "show", "main:README.md").endswith("Mine.")
    (home / "mine/README.md").unlink()
    publish(home / "mine", "ada/carded")
    assert 'zoo.load("ada/carded")' in hub.git("ada/carded", "show", "main:README.md")


def test_a_revision_is_a_branch_a_tag_or_a_commit(home, hub):
    first = publish(saved(home / "mine"), "ada/revised").rpartition("/")[2]
    hub.git("ada/revised", "tag", "v1", "main")
    publish(saved(home / "mine", seed=1), "ada/revised")
    publish(saved(home / "mine", seed=2), "ada/revised@trial")
    same("ada/revised", 1)
    for revision, seed in (("v1", 0), (first, 0), ("main", 1), ("trial", 2)):
        same(f"ada/revised@{revision}", seed)
    publish(saved(home / "mine", seed=3), "ada/revised@trial")
    same("ada/revised@trial", 3)


def test_an_address_names_repository_and_revision(home, hub):
    publish(saved(home / "mine"), "hf://ada/addressed")
    publish(saved(home / "mine", seed=1), f"{hub.url}/ada/addressed/tree/trial")
    for name in ("hf://ada/addressed", f"{hub.url}/ada/addressed/", f"{hub.url}/ada/addressed/blob/main/config.json"):
        same(name, 0)
    for name in ("hf://ada/addressed@trial", f"{hub.url}/ada/addressed/resolve/trial/README.md?x=1"):
        same(name, 1)
    with pytest.raises(ValueError, match="revision of 'ada/addressed' must be a branch, tag or commit, got 'v9'"):
        zoo.load("hf://ada/addressed@v9/config.json")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("hf://ada/x", ("ada/x", None)),
        ("HF://models/ada/x@v1", ("ada/x", "v1")),
        ("hf://ada/x@refs/pr/3/config.json", ("ada/x", "refs/pr/3")),
        ("https://huggingface.co/ada/x", ("ada/x", None)),
        ("https://huggingface.co/ada/x/?library=true#files", ("ada/x", None)),
        ("https://huggingface.co/ada/x/tree/v1", ("ada/x", "v1")),
        ("hf://ada/x@a%2Fb/config.json", ("ada/x", "a/b")),
        ("https://huggingface.co/ada/x/tree/refs%2Fpr%2F3", ("ada/x", "refs/pr/3")),
        ("https://huggingface.co/ada/x/blob/0123abc/model.safetensors", ("ada/x", "0123abc")),
        ("http://hf.co/ada/x/resolve/main/config.json?download=true", ("ada/x", "main")),
        ("https://huggingface.co/ada/x/commit/0123abc", ("ada/x", "0123abc")),
        ("hf://datasets/ada/x", None),
        ("https://huggingface.co/datasets/ada/x", None),
        ("https://huggingface.co/ada/x/discussions/3", None),
        ("https://huggingface.co/ada", None),
        ("https://example.org/ada/x", None),
        ("hf://", None),
        ("hf://ada/..", None),
        ("hf://ada/x@", None),
        ("hf://ada/x@..%2F..%2Fy", None),
    ],
)
def test_addresses_are_read_without_asking_the_hub(address, expected):
    if expected is not None:
        assert client.parse(address) == expected
        return
    with pytest.raises(ValueError, match="repository must be OWNER/REPO or OWNER/REPO@REVISION, or a link to its page"):
        zoo.load(address)


def test_what_was_downloaded_once_loads_without_the_hub(home, hub, monkeypatch):
    publish(saved(home / "mine"), "ada/kept")
    same("ada/kept")
    hub.log.clear()
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    same("ada/kept")
    assert hub.log == []
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(settings, "ENDPOINT", f"http://127.0.0.1:{free_port()}")  # where nobody listens
    same("ada/kept")


def test_a_second_load_downloads_nothing(home, hub):
    publish(saved(home / "mine"), "ada/again")
    same("ada/again")
    hub.log.clear()
    same("ada/again")
    assert not [line for line in hub.log if "resolve" in line]


def test_files_that_are_no_posterior_stay_on_the_hub(home, hub):
    publish(saved(home / "mine"), "ada/more")
    hub.commit("ada/more", "main", {"big.bin": b"x", "sub/config.json": b"{}", "model.py": b"boom()"}, "more")
    same("ada/more")
    assert {path.name for path in zoo.resolve("ada/more").rglob("*")} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    assert not [line for line in hub.log if "big" in line or "model.py" in line]


def test_a_private_posterior_is_its_owners(home, hub, monkeypatch):
    publish(saved(home / "mine"), "ada/secret", private=True)
    same("ada/secret")
    monkeypatch.setattr(settings, "HF_HUB_CACHE", str(home / "other"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=r"unknown posterior 'ada/secret'.*If it is private: log in"):
        zoo.load("ada/secret")
    assert client.search("secret") == []
    (home / "token").write_text(TOKEN)  # as `hf auth login` leaves it
    same("ada/secret")


def test_nothing_private_goes_to_a_public_repository(home, hub):
    publish(saved(home / "mine"), "ada/open")
    before = hub.git("ada/open", "rev-parse", "main")
    with pytest.raises(ValueError, match="'ada/open' must be private, got a public one"):
        publish(saved(home / "mine", seed=1), "ada/open", private=True)
    assert hub.git("ada/open", "rev-parse", "main") == before


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("ada/none", ValueError, "unknown posterior 'ada/none': no folder of that path, and no repository on http"),
        ("ada/present@none", ValueError, "revision of 'ada/present' must be a branch, tag or commit, got 'none'"),
        ("ada/empty", bl.PosteriorError, "ada/empty must be a posterior on the Hub, got a repository without config"),
        ("ada/a--b", ValueError, "not a bundled name, a folder or OWNER/REPO"),
        ("ada/present@../../x", ValueError, "not a bundled name, a folder or OWNER/REPO"),
    ],
)
def test_what_is_not_there_is_one_sentence(home, hub, name, error, message):
    if not hub.has("ada/present"):
        publish(saved(home / "mine"), "ada/present")
        hub.create("ada/empty", private=False)
    with pytest.raises(error, match=message) as caught:
        zoo.load(name)
    assert "\n" not in str(caught.value)


def test_without_hub_or_cache_the_reason_is_said(home, hub, monkeypatch):
    hub.down = True
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its attempts
    with pytest.raises(ConnectionError, match=r"http.* must answer for 'ada/x', got HfHubHTTPError: .*503"):
        zoo.load("ada/x")
    monkeypatch.setattr(settings, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ConnectionError, match=r"must answer for 'ada/x', got ConnectError"):
        zoo.load("ada/x")
    with pytest.raises(ConnectionError, match=r"must answer for 'x', got ConnectError"):
        client.search("x")
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"'ada/x@v1' is not a folder and not in the Hub's cache, and HF_HUB_OFF"):
        zoo.load("ada/x@v1")
    with pytest.raises(ConnectionError, match="but HF_HUB_OFFLINE is set"):
        client.search("x")


def test_search_without_a_network_says_so_at_once(home, monkeypatch, capsys, caplog):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: pytest.fail("it tries again"))
    monkeypatch.setattr(settings, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert main(["search", "x"]) == 1
    out, error = capsys.readouterr()
    assert error.startswith("bayeslayers: http://127.0.0.1:") and error.count("\n") == 1 and not out
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"search needs http.*, but HF_HUB_OFFLINE is set\. Unset it"):
        client.search("x")
    with pytest.raises(ConnectionError, match=r"publish needs http.*, but HF_HUB_OFFLINE is set\. Unset it"):
        zoo.publish(zoo.resolve("mlp-blobs"), "ada/x")


@pytest.mark.parametrize(("token", "name"), [(None, "ada/x"), ("hf_of_eve", "ada/x"), (TOKEN, "eve/x")])
def test_who_may_not_write_is_told(home, monkeypatch, token, name):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PermissionError, match=f"rejects your token for '{name}'. Log in with"):
        publish(saved(home / "mine"), name)


def test_a_changed_byte_on_the_way_is_refused(home, hub):
    publish(saved(home / "mine"), "ada/damaged")
    hub.damaged = True
    for use in (zoo.load, download):
        with pytest.raises(bl.PosteriorError, match=r"model.safetensors must have the sha256 .* damaged or changed"):
            use("ada/damaged")


def test_a_broken_posterior_is_not_published(home, hub):
    folder = saved(home / "mine")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(bl.PosteriorError, match="damaged or changed"):
        publish(folder, "ada/broken")
    (folder / "model.safetensors").write_bytes(data)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"kwargs": config["kwargs"] | {"widths": [7]}}))
    with pytest.raises(bl.PosteriorError, match=r"hidden1\.weight"):
        publish(folder, "ada/broken")
    with pytest.raises(ValueError, match="repository must be OWNER/REPO"):
        publish(folder, "broken")
    assert hub.log == []


def test_download_copies_a_posterior(home):
    publish(saved(home / "mine"), "ada/copied")
    assert download("ada/copied") == zoo.resolve("ada/copied")
    assert download("ada/copied", home / "copy") == home / "copy"
    files = {path.name: path for path in (home / "copy").iterdir()}
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    assert not any(path.is_symlink() for path in files.values())
    same(home / "copy")
    download("mlp-mnist", home / "copy")  # a posterior in the place of a posterior
    assert read_card(home / "copy").name == "mlp-mnist"
    (home / "project").mkdir()
    (home / "project/main.c").write_text("int main;")
    with pytest.raises(FileExistsError, match="holds something else"):
        download("ada/copied", home / "project")


def test_a_network_of_the_users_own_can_be_published(home):
    bl.save_posterior(bl.BayesLinear(2, 2), home / "own")
    publish(home / "own", "ada/own")
    model = bl.BayesLinear(2, 2)
    bl.load_posterior(zoo.resolve("ada/own"), model)
    assert_close(model.state_dict(), bl_state(home / "own"))


def bl_state(folder):
    model = bl.BayesLinear(2, 2)
    bl.load_posterior(folder, model)
    return model.state_dict()


def test_the_command_line_publishes_searches_and_downloads(home, capsys):
    folder = str(saved(home / "mine"))
    assert main(["publish", folder, "ada/by-hand", "--private", "--revision", "v2"]) == 0
    assert "/ada/by-hand/commit/" in capsys.readouterr().out
    assert main(["publish", folder, "ada/shown"]) == 0
    capsys.readouterr()
    assert main(["download", "ada/by-hand@v2", "--output", str(home / "copy")]) == 0
    assert capsys.readouterr().out == f"{home / 'copy'}\n"
    same(home / "copy")
    assert main(["search", "shown", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "name": "ada/shown",
            "downloads": 3,
            "likes": 1,
            "updated": "2026-01-02",
            "tags": "bayeslayers image-classification bayesian uncertainty variational-inference mlp digits".split(),
        }
    ]
    assert main(["search", "shown"]) == 0
    assert "ada/shown" in capsys.readouterr().out
    assert main(["search", "nothing-of-that-name"]) == 0
    assert main(["info", "ada/shown", "--json"]) == 0
    assert main(["download", "ada/none"]) == 1
    assert main(["publish", folder, "nowhere"]) == 1
    assert main(["publish", folder, "ada/x@v1", "--revision", "v2"]) == 1
    error = capsys.readouterr().err
    assert error.count("bayeslayers: ") == 3 and "already names the revision 'v1'" in error


def test_the_environment_decides_where_the_hub_is_and_whether_it_is_asked(home, hub):
    """In a process of its own, as the Hub's client reads the environment when it is imported."""
    publish(saved(home / "mine"), "ada/env")
    code = "import sys\nfrom recipes.cli import main\nsys.exit(main(['download', 'ada/env']))"
    env = os.environ | {"HF_HOME": str(home / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    env["HF_HUB_OFFLINE"] = "0"

    def run(**more):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env | more)
        return done.returncode, done.stdout.strip(), done.stderr

    status, out, error = run()
    assert status == 0 and out.startswith(str(home / "hf")), error
    nowhere = f"http://127.0.0.1:{free_port()}"
    assert run(HF_HUB_OFFLINE="1", HF_ENDPOINT=nowhere)[:2] == (0, out)
    same(out)


@pytest.mark.parametrize("name", ["text_transformer", "text_lstm"])
def test_a_network_of_sentences_is_published_and_predicts_a_tokenizers_batch(home, name):
    torch.manual_seed(0)
    model = uncertain(zoo.create(name, vocabulary=20, num_classes=3))
    bl.save_posterior(model, home / "mine", dataset="sentences")
    publish(home / "mine", f"ada/{name}")
    loaded = zoo.load(f"ada/{name}")
    ids = torch.tensor([[5, 7, 2, 0, 0], [3, 3, 9, 11, 4]])
    one, two = (bl.predict(net, ids, 4, generator=torch.Generator().manual_seed(0)) for net in (model, loaded))
    assert one.probs.shape == (2, 3) and float(one.epistemic.min()) > 0
    assert_close(one.probs, two.probs, rtol=0, atol=0)
