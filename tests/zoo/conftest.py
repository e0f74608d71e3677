"""The Hub on loopback, for every test that publishes or downloads."""

from __future__ import annotations

import importlib.util
import shutil

import huggingface_hub.constants as settings
import pytest
from support.hub_server import TOKEN, running


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    if shutil.which("git") is None or importlib.util.find_spec("olah") is None:
        pytest.skip("needs git, and olah from PyPI")
    with running(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def home(tmp_path, monkeypatch, hub):
    """A user's own cache and token, and the Hub on loopback in place of the real one."""
    monkeypatch.setattr(settings, "ENDPOINT", hub.url)
    monkeypatch.setattr(settings, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(settings, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(settings, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(settings, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.down = hub.damaged = False
    hub.cuts, hub.meanwhile = 0, None
    hub.log.clear()
    return tmp_path
