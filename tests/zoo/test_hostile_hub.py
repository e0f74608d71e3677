"""Hub repositories that are not what they should be: links, pickles, sizes, downloads that end, files that change."""

from __future__ import annotations

import hashlib
import json
import pickle

import pytest
from support.hub_server import POINTER
from support.small_posterior import same, saved

import bayeslayers as bl
import zoo
from bayeslayers.storage import posterior as storage
from zoo.loading import download, publish

pytestmark = [
    pytest.mark.usefixtures("home"),
    pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning"),  # of huggingface_hub's, in its own upload
]


class Boom:
    """An object whose unpickling writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def good(home, hub):
    """Publish a posterior and return its name; a test then commits something else over it."""
    name = f"ada/hostile-{len([*(hub.mirrors / 'ada').glob('*')]) if (hub.mirrors / 'ada').exists() else 0}"
    publish(saved(home / "mine"), name)
    return name


def over(hub, name, files, mode="100644"):
    hub.commit(name, "main", files, "other", mode)


def with_weights(hub, name, weights):
    """Put other weights in place of a posterior's, with a card that has their hash."""
    card = json.loads(hub.raw(name, "config.json")) | {"sha256": hashlib.sha256(weights).hexdigest()}
    over(hub, name, {"config.json": json.dumps(card).encode(), "model.safetensors": pointed(hub, name, weights)})


def pointed(hub, name, content):
    oid = hashlib.sha256(content).hexdigest()
    path = hub.mirrors / name / ".git/lfs/objects" / oid[:2] / oid[2:4] / oid
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return POINTER.format(oid=oid, size=len(content)).encode()


def test_a_pickle_in_place_of_the_weights_is_not_unpickled(home, hub, good):
    with_weights(hub, good, pickle.dumps(Boom(home / "ran")))
    for use in (zoo.load, download):
        with pytest.raises(bl.PosteriorError, match=r"model\.safetensors must be a safetensors file"):
            use(good)
    assert not (home / "ran").exists()


def test_pickles_and_code_beside_a_posterior_are_neither_downloaded_nor_run(home, hub, good):
    bad = pickle.dumps(Boom(home / "ran"))
    over(hub, good, {"pytorch_model.bin": bad, "training_args.bin": bad, "modeling.py": b"open('ran', 'w')"})
    same(good)
    assert not (home / "ran").exists()
    assert not [line for line in hub.log if "resolve" in line and line.endswith((".bin", ".py"))]


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "README.md"])
def test_a_link_in_a_repository_gives_no_file_of_the_user(home, hub, good, file):
    secret = home / "secret"
    secret.write_text('{"secret": 1}')
    over(hub, good, {file: str(secret).encode()}, mode="120000")
    if file == "README.md":
        same(good)  # which loading does not read
        assert download(good, home / "copy") and "secret" not in (home / "copy/README.md").read_text().split('"')
    else:
        with pytest.raises((bl.PosteriorError, ConnectionError)):
            zoo.load(good)
    for path in (home / "cache").rglob("*"):
        assert not path.is_symlink() or path.resolve().is_relative_to(home / "cache")
        assert not path.is_file() or b'"secret"' not in path.read_bytes()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "README.md"])
def test_an_oversized_file_is_not_downloaded(hub, good, file):
    content, limit = b" " * (2**22 + 1), 2**22
    if file == "model.safetensors":
        content, limit = POINTER.format(oid="0" * 64, size=2**36 + 1).encode(), 2**36
    over(hub, good, {file: content})
    hub.log.clear()
    with pytest.raises(
        bl.PosteriorError, match=rf"{file} of {good} must have at most {limit} bytes, got {limit + 1}: it"
    ):
        zoo.load(good)
    assert not [line for line in hub.log if "resolve" in line]


def test_a_download_that_ends_in_the_middle_goes_on_and_leaves_nothing_half(home, hub, good, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's attempts
    hub.cuts = 1
    same(good)  # the client goes on where it ended
    assert hub.cuts == 0
    publish(saved(home / "mine", seed=1), good)
    hub.cuts = 10**6
    with pytest.raises(ConnectionError, match="must answer for"):
        zoo.load(good)
    hub.cuts = 0
    same(good, 1)


def test_a_repository_that_changes_during_a_download_gives_one_commit(hub, good):
    hub.meanwhile = lambda: over(hub, good, {"config.json": b"{}", "model.safetensors": b"other"})
    same(good)
    assert hub.meanwhile is None
    with pytest.raises((bl.PosteriorError, ConnectionError)):  # the next load takes the next commit
        zoo.load(good)


def test_weights_that_change_after_their_hash_was_checked_are_not_those_that_load(home, good, monkeypatch):
    file = (zoo.resolve(good) / "model.safetensors").resolve()
    other = (saved(home / "other", seed=1) / "model.safetensors").read_bytes()
    parse = storage.parse_weights

    def swapped(*arguments):
        found = parse(*arguments)
        file.write_bytes(other)
        return found

    monkeypatch.setattr(storage, "parse_weights", swapped)
    same(good, 0)
    monkeypatch.setattr(storage, "parse_weights", parse)
    assert file.read_bytes() == other
    with pytest.raises(bl.PosteriorError, match="damaged or changed"):
        zoo.load(good)


@pytest.mark.parametrize(
    "card",
    [
        b"[" * 100_000,
        b"\xff\xfe{}",
        b'{"format_version": 1, "builder": "os.system", "kwargs": {"command": "true"}}',
        b'{"format_version": 1, "builder": "timm:hf-hub:eve/x"}',
        b'{"format_version": 1, "builder": "mlp", "kwargs": {"widths": [1000000000]}}',
        b'{"format_version": 1, "builder": "mlp", "surprise": 1}',
        b'{"format_version": 99}',
    ],
    ids=["deep", "bytes", "code", "download", "huge", "unknown", "newer"],
)
def test_a_hostile_card_is_one_sentence(hub, good, card):
    over(hub, good, {"config.json": card})
    with pytest.raises(bl.PosteriorError) as caught:
        zoo.load(good)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
